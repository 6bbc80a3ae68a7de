"""The resize beside Pillow's: the same bytes, compiled or not."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.model import resize
from pipeline.model.resize import cropped, resized

SIDE = st.integers(1, 200)


def by_pillow(pixels: np.ndarray, width: int, height: int, resample: int) -> np.ndarray:
    """In width, and then in height: Pillow 13 resizes some images the other way round."""
    image = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
    narrow = image.resize((width, image.height), Image.Resampling(resample))
    return np.asarray(narrow.resize((width, height), Image.Resampling(resample)))


def drawn(height: int, width: int, kind: str) -> np.ndarray:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 4), np.uint8)
    if kind == "extremes":  # which overshoot in every pass
        return ((pixels > 127) * 255).astype(np.uint8)
    return pixels if kind == "noise" else np.sort(pixels, axis=1)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(SIDE, SIDE), width=SIDE, height=SIDE, resample=st.sampled_from([2, 3]),
    kind=st.sampled_from(["noise", "extremes", "smooth"]),
)  # fmt: skip
@example(shape=(1, 1), width=200, height=200, resample=3, kind="noise")
@example(shape=(3, 200), width=1, height=1, resample=3, kind="extremes")
@example(shape=(200, 1), width=7, height=3, resample=2, kind="noise")
@example(shape=(5, 3), width=8, height=9, resample=3, kind="extremes")
def test_the_bytes_are_pillows(shape: tuple[int, int], width: int, height: int, resample: int, kind: str):
    pixels = drawn(*shape, kind)
    wanted = by_pillow(pixels, width, height, resample)
    assert np.array_equal(resized(pixels, (width, height), resample)[..., :3], wanted)
    assert np.array_equal(resize._by_pillow(pixels, (width, height), resample)[..., :3], wanted)


@pytest.mark.parametrize(
    ("height", "width", "size"), [(3000, 2000, (224, 336)), (40, 4000, (224, 2)), (900, 300, (224, 672))]
)
def test_large_and_tall_images(height: int, width: int, size: tuple[int, int]):
    pixels = drawn(height, width, "noise")
    assert np.array_equal(resized(pixels, size, 3)[..., :3], by_pillow(pixels, *size, 3))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_an_installation_compiles_the_resize():
    assert resize.IS_COMPILED, "pip install builds pipeline/model/resample.c"


def test_an_image_of_that_size_is_left_as_it_is():
    pixels = drawn(8, 9, "noise")
    assert resized(pixels, (9, 8), 3) is pixels


@pytest.mark.parametrize(("shape", "resample"), [((8, 8, 3), 3), ((8, 8), 3), ((8, 8, 4), 1), ((0, 8, 4), 3)])
def test_other_arguments_are_refused(shape: tuple[int, ...], resample: int):
    with pytest.raises(ValueError, match=r"contiguous uint8 pixels \(H, W, 4\)"):
        resized(np.zeros(shape, np.uint8), (4, 4), resample)


@pytest.mark.parametrize("compiled", [resize._compiled, None])
def test_other_pixels_are_refused_compiled_or_not(monkeypatch: pytest.MonkeyPatch, compiled: object):
    monkeypatch.setattr(resize, "_compiled", compiled)
    pixels = drawn(9, 9, "noise")
    for other in (pixels[:, ::2], pixels.astype(np.int8), pixels.astype(np.float32)):
        with pytest.raises(ValueError, match="contiguous uint8"):
            resized(other, (4, 4), 3)
        with pytest.raises(ValueError, match="are not inside of"):
            cropped(other, 0, 0, 3)
    for size in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match="a size"):
            resized(pixels, size, 3)
    for side in (0, -1):
        with pytest.raises(ValueError, match="are not inside of"):
            cropped(pixels, 0, 0, side)


@settings(max_examples=60, deadline=None)
@given(shape=st.tuples(SIDE, SIDE), data=st.data())
def test_a_crop_is_the_part_without_fourth_bytes(shape: tuple[int, int], data: st.DataObject):
    pixels = drawn(*shape, "noise")
    size = data.draw(st.integers(1, min(shape)))
    top, left = (data.draw(st.integers(0, side - size)) for side in shape)
    assert np.array_equal(cropped(pixels, left, top, size), pixels[top : top + size, left : left + size, :3])
    for at in ((left, shape[0] - size + 1), (shape[1] - size + 1, top), (-1, top), (left, -1)):
        with pytest.raises(ValueError, match="are not inside of"):
            cropped(pixels, *at, size)


def test_without_the_compiled_module_pillow_resizes(monkeypatch: pytest.MonkeyPatch):
    pixels = drawn(300, 100, "noise")
    compiled, crop = resized(pixels, (50, 60), 3), cropped(pixels, 3, 4, 90)
    monkeypatch.setattr(resize, "_compiled", None)
    assert np.array_equal(resized(pixels, (50, 60), 3)[..., :3], compiled[..., :3])
    assert np.array_equal(cropped(pixels, 3, 4, 90), crop)
