"""Bytes to RGB to crop: bit-exact where the published code is, right where it is not, and safe with anything."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from safetensors.numpy import load_file

from pipeline.errors import ImageRejected, ModelError
from pipeline.model import images
from pipeline.model.canary import draw
from pipeline.model.images import read_rgb
from pipeline.model.preprocess import PUBLISHED_MEAN, PUBLISHED_STD, PixelRecipe, read_recipe
from pipeline.records import ImageLimits, Reason

SHARED = Path(__file__).parents[2] / "shared"
GOLDENS, NASTY = SHARED / "reference" / "goldens", SHARED / "data" / "nasty"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="the golden crops are not beside this checkout")
needs_nasty = pytest.mark.skipif(not NASTY.is_dir(), reason="the nasty images are not beside this checkout")

SHOP, PUBLISHED = PixelRecipe(64), PixelRecipe(64, style="published")

# The manifest's short reasons, and the project's. A bad header is "not an image" where the magic bytes are gone; a text
# chunk that unpacks without end is "corrupt": the pixels may be fine, but the file was made to exhaust memory.
REASONS = {
    "truncated": {Reason.IMAGE_TRUNCATED},
    "bad_header": {Reason.IMAGE_NOT_AN_IMAGE, Reason.IMAGE_UNDECODABLE},
    "corrupt_data": {Reason.IMAGE_CORRUPT},
    "too_many_pixels": {Reason.IMAGE_TOO_MANY_PIXELS},
    "decompression_bomb": {Reason.IMAGE_CORRUPT},
    "bad_dimensions": {Reason.IMAGE_UNDECODABLE},
    "empty": {Reason.IMAGE_EMPTY},
    "not_an_image": {Reason.IMAGE_NOT_AN_IMAGE},
    "unsupported_format": {Reason.IMAGE_UNSUPPORTED_FORMAT},
    "extreme_aspect": {Reason.IMAGE_EXTREME_ASPECT},
    "too_small": {Reason.IMAGE_TOO_SMALL},
}
# Where the manifest leaves it open: a JPEG without its end marker is refused, since nothing proves that its last rows
# are there; a damaged scan that libjpeg repairs is taken as decoded; what is transparent everywhere is a white image.
OPEN_CASES = {
    "jpeg_missing_eoi.jpg": Reason.IMAGE_TRUNCATED,
    "jpeg_scan_corrupt.jpg": None,
    "png_fully_transparent.png": None,
}


def manifest() -> list[dict[str, str]]:
    if not NASTY.is_dir():
        return []
    with (NASTY / "manifest.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def nasty(name: str) -> bytes:
    return (NASTY / "files" / name).read_bytes()


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reason_of(data: bytes | Image.Image, **limits: float) -> str | None:
    try:
        SHOP.prepare(data, limits=ImageLimits(**limits))  # type: ignore[arg-type]
    except ImageRejected as error:
        return error.reason if error.detail else "a reason without a detail"
    return None


@needs_goldens
def test_published_crops_are_bit_exact():
    golden = load_file(GOLDENS / "preprocess.safetensors")
    cases = json.loads((GOLDENS / "preprocess.json").read_text())["cases"]
    compared = 0
    for name, case in cases.items():
        data = (GOLDENS / "images" / name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            rgb = image.convert("RGB")
        if hashlib.sha256(rgb.tobytes()).hexdigest() != case["decoded_rgb_sha256"]:
            continue  # another JPEG decoder
        stem = name.partition(".")[0]
        crop = PixelRecipe(case["target"], style="published").prepare(data).crop
        assert np.array_equal(crop.transpose(2, 0, 1), golden[f"{stem}.crop_u8"]), name
        if f"{stem}.pixel_values" in golden:
            mean, std = (np.float32(values)[:, None, None] for values in (PUBLISHED_MEAN, PUBLISHED_STD))
            pixels = (np.float32(crop.transpose(2, 0, 1)) / 255 - mean) / std
            assert np.abs(pixels - golden[f"{stem}.pixel_values"]).max() <= 1e-6, name
        if name.startswith("rgb_"):
            assert np.array_equal(PixelRecipe(case["target"]).prepare(data).crop, crop), name
        compared += 1
    assert compared >= 8


@needs_nasty
@pytest.mark.parametrize("row", manifest(), ids=lambda row: row["file"])
def test_every_nasty_file_comes_out_as_its_manifest_says(row: dict[str, str]):
    got = reason_of(nasty(row["file"]))
    if row["expected"] == "decode":
        assert got is None
    elif row["expected"] == "either":
        assert got == OPEN_CASES[row["file"]]
    else:
        wanted = next(reasons for short, reasons in REASONS.items() if row["reason_or_note"].startswith(short))
        assert got in wanted


@needs_nasty
def test_what_a_person_would_see():
    def pixels(name: str) -> np.ndarray:
        return read_rgb(nasty(name), limits=ImageLimits()).pixels[..., :3].astype(np.float32)

    plain = pixels("jpeg_baseline_ok.jpg")
    for turn in (3, 6, 8):
        assert np.abs(pixels(f"jpeg_exif_orient{turn}.jpg") - plain).mean() < 4
    assert np.abs(pixels("jpeg_cmyk.jpg") - plain).mean() < 12
    assert np.abs(pixels("png_named.jpg") - plain).mean() < 4
    assert pixels("png_cutout_alpha.png")[0, 0].tolist() == [255, 255, 255]
    assert pixels("png_fully_transparent.png").min() == 255
    assert pixels("png_cutout_alpha.png").mean() > 100


@needs_nasty
def test_memory_stays_bounded_by_headers():
    """All 62 files, bombs of 1.2 and 17 GB among them, in a process of their own."""
    code = """
import resource, sys
from pathlib import Path
from pipeline.errors import ImageRejected
from pipeline.model.preprocess import PixelRecipe
recipe = PixelRecipe(224)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        recipe.prepare(path.read_bytes(), thumbnail=True)
    except ImageRejected:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(NASTY / "files")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150  # MiB


def test_limits_are_applied_in_order():
    assert reason_of(b"") == Reason.IMAGE_EMPTY
    assert reason_of(b"x" * 11, max_bytes=10) == Reason.IMAGE_TOO_LARGE_BYTES
    assert reason_of(encode(Image.new("RGB", (200, 100))), max_pixels=19_999) == Reason.IMAGE_TOO_MANY_PIXELS
    assert reason_of(encode(Image.new("RGB", (200, 9)))) == Reason.IMAGE_EXTREME_ASPECT
    assert reason_of(encode(Image.new("RGB", (7, 100)))) == Reason.IMAGE_TOO_SMALL
    assert reason_of(Image.new("RGB", (7, 100))) == Reason.IMAGE_TOO_SMALL
    assert reason_of(encode(Image.new("RGB", (160, 8)))) is None


@pytest.mark.parametrize("start", [b"8BPS", b"\0\0\1\0", b"\xff\x0a", b"II+\0", b" <?xml version='1.0'?><svg/>"])
def test_images_of_other_formats_are_named(start: bytes):
    assert reason_of(start + b"\0" * 40) == Reason.IMAGE_UNSUPPORTED_FORMAT


def test_sixteen_bits_are_scaled():
    levels = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    got = SHOP.prepare(encode(Image.fromarray(levels))).crop[..., 0]
    assert np.abs(got - levels / 257.0).max() <= 0.51


def test_palette_with_transparency_is_laid_on_white():
    image = Image.new("P", (64, 64), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.paste(0, (0, 0, 32, 64))
    crop = SHOP.prepare(encode(image, transparency=0)).crop
    assert crop[5, 5].tolist() == [255, 255, 255]
    assert crop[5, 60].tolist() == [200, 10, 10]
    assert PUBLISHED.prepare(encode(image, transparency=0)).crop[5, 5].tolist() == [0, 0, 0]


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert abs(int(SHOP.prepare(encode(image)).crop[0, 0, 0]) - 127) <= 1
    grey = Image.merge("LA", [Image.new("L", (64, 64), 0), Image.new("L", (64, 64), 0)])
    assert SHOP.prepare(encode(grey)).crop.min() == 255


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_and_original_size(turn: int):
    upright = draw("checks")
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = encode(upright, "PNG", exif=exif.tobytes())
    got = read_rgb(stored, limits=ImageLimits())
    swapped = turn >= 5
    assert (got.width_px, got.height_px) == ((150, 100) if swapped else (100, 150))
    assert got.pixels.shape == (got.height_px, got.width_px, 4)
    with Image.open(io.BytesIO(stored)) as image:
        assert np.array_equal(got.pixels[..., :3], np.asarray(ImageOps.exif_transpose(image)))
    assert read_rgb(stored, limits=ImageLimits(), style="published").pixels.shape == (150, 100, 4)


def test_draft_decodes_less_and_stays_near():
    photo = encode(draw("gradient").resize((1600, 1200), Image.Resampling.BICUBIC), "JPEG", quality=92)
    whole = SHOP.prepare(photo)
    quick = PixelRecipe(64, jpeg_draft=True).prepare(photo)
    assert (quick.width_px, quick.height_px) == (1600, 1200)
    assert read_rgb(photo, limits=ImageLimits(), draft_px=128).pixels.shape == (150, 200, 4)
    assert np.abs(whole.crop.astype(int) - quick.crop).mean() < 3


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 90), st.integers(8, 90)),
    mode=st.sampled_from(["RGB", "L"]),
    draft_px=st.integers(1, 100),
    options=st.fixed_dictionaries(
        {"quality": st.integers(10, 100)},
        optional={
            "subsampling": st.sampled_from([0, 1, 2]),
            "progressive": st.just(True),
            "restart_marker_rows": st.integers(1, 3),
            "keep_rgb": st.just(True),
        },
    ),
)
def test_plain_jpeg_files_are_decoded_as_pillow_does(
    size: tuple[int, int], mode: str, draft_px: int, options: dict[str, object]
):
    if "keep_rgb" in options:  # Pillow writes such a file with all of its colours only
        options = {**options, "subsampling": 0}
    stored = encode(draw("gradient").resize(size).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(stored)) as image:
        wanted = np.asarray(image.convert("RGB"))
    assert images._jpeg_pixels(stored, size) is not None, "none of these goes back to Pillow"
    with Image.open(io.BytesIO(stored)) as image:
        image.draft(mode, (-(-size[0] * draft_px // min(size)), -(-size[1] * draft_px // min(size))))
        drafted = np.asarray(image.convert("RGB"))
    got = read_rgb(stored, limits=ImageLimits(), draft_px=draft_px)
    assert np.array_equal(got.pixels[..., :3], drafted)
    assert (got.width_px, got.height_px) == size
    for style in ("shop", "published"):
        assert np.array_equal(read_rgb(stored, limits=ImageLimits(), style=style).pixels[..., :3], wanted)


def scans(data: bytes) -> bytes:
    """The last scan of a JPEG file, without its end marker."""
    return data[data.rindex(b"\xff\xda") : -2]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_of_thousands_of_scans_is_not_decoded(progressive: bool):
    whole = encode(draw("gradient"), "JPEG", progressive=progressive)
    bomb = whole[:-2] + scans(whole) * 1000 + whole[-2:]
    with pytest.raises(ImageRejected, match="made to keep a decoder busy") as found:
        SHOP.prepare(bomb)
    assert found.value.reason == Reason.IMAGE_CORRUPT
    for behind in (scans(whole) * 1000, b"\xff\xda" * 1000):  # as the film is behind a telephone's photo
        assert np.array_equal(SHOP.prepare(whole + behind).crop, SHOP.prepare(whole).crop)
    comment = b"\xff\xfe" + (2 + 4000).to_bytes(2) + b"\xff\xda" * 2000
    assert np.array_equal(SHOP.prepare(whole[:2] + comment + whole[2:]).crop, SHOP.prepare(whole).crop)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "CMYK"), ("JPEG", "RGB")])
def test_memory_of_a_large_image(kind: str, mode: str):
    code = """
import io, resource, sys
from PIL import Image
from pipeline.model.preprocess import PixelRecipe
kind, mode = sys.argv[1:]
out = io.BytesIO()
Image.new(mode, (6000, 4000), 90).save(out, kind)
data = out.getvalue()
if kind == "JPEG" and mode == "RGB":
    data = data[:-2] + bytes(8) + data[-2:]  # which libjpeg-turbo warns of, so that Pillow decodes it
recipe = PixelRecipe(64)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recipe.prepare(data)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""
    done = subprocess.run([sys.executable, "-c", code, kind, mode], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 6000 * 4000 * 14  # 4 bytes a pixel: the image, its conversions, one copy


def test_what_is_not_a_plain_jpeg_file_goes_to_pillow():
    whole = encode(draw("gradient"), "JPEG")
    assert images._jpeg_pixels(whole[:-400], (320, 240)) is None
    assert images._jpeg_pixels(whole[:-2], (320, 240)) is None  # without its end marker
    assert reason_of(whole[:-2]) == Reason.IMAGE_TRUNCATED
    cmyk = encode(draw("gradient").convert("CMYK"), "JPEG")
    assert np.abs(SHOP.prepare(cmyk).crop.astype(int) - SHOP.prepare(encode(draw("gradient"))).crop).mean() < 12


def test_thumbnails():
    made = SHOP.prepare(encode(draw("gradient").resize((640, 480))), thumbnail=True).thumbnail
    assert made is not None
    with Image.open(io.BytesIO(made)) as image:
        assert (image.format, image.size) == ("JPEG", (224, 168))
    for size in ((240, 960), (960, 700), (100, 400)):  # made of what was scaled for a model of 224 pixels, but the last
        image = draw("gradient").resize(size)
        fresh, scaled = (PixelRecipe(px).prepare(encode(image), thumbnail=True).thumbnail for px in (8, 224))
        pair = [np.asarray(Image.open(io.BytesIO(data or b""))).astype(int) for data in (fresh, scaled)]
        assert pair[0].shape == pair[1].shape
        assert max(pair[0].shape) == 224
        assert np.abs(pair[0] - pair[1]).mean() < 2
    small = SHOP.prepare(encode(draw("noise")), thumbnail=True).thumbnail
    assert small is not None
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (64, 64)


def test_bytes_and_pillow_images_agree():
    image = draw("gradient")
    data = encode(image)
    for same in (image, memoryview(data), bytearray(data)):
        assert np.array_equal(SHOP.prepare(data).crop, SHOP.prepare(same).crop)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(width=st.integers(8, 150), height=st.integers(8, 150), seed=st.integers(0, 99))
def test_shop_equals_published_for_plain_rgb(width: int, height: int, seed: int):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = encode(Image.fromarray(pixels))
    shop = SHOP.prepare(data)
    assert np.array_equal(shop.crop, PUBLISHED.prepare(data).crop)
    assert shop.crop.shape == (64, 64, 3)
    assert (shop.width_px, shop.height_px) == (width, height)


SEEDS = [
    encode(draw("noise"), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
]  # one small file of each format, to be damaged


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damage_is_a_reason_and_never_another_exception(data: st.DataObject):
    broken = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(0, 6))):
        broken[data.draw(st.integers(0, min(len(broken) - 1, 200)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(broken)))
    for damaged in (bytes(broken), bytes(broken[:cut])):
        reason = reason_of(damaged)
        assert reason is None or reason in list(Reason)


@settings(max_examples=50, deadline=None)
@given(junk=st.binary(max_size=200))
def test_noise_is_not_an_image(junk: bytes):
    assert reason_of(junk) is not None


@needs_nasty
def test_threads_and_warning_filters():
    """Broken EXIF makes Pillow warn; under `-W error`, on eight threads, that must change nothing and leave nothing."""
    names = ["jpeg_exif_broken.jpg", "png_palette_alpha.png", "jpeg_mpo.jpg", "jpeg_baseline_ok.jpg"] * 8
    before = list(warnings.filters)
    alone = {name: SHOP.prepare(nasty(name)).crop for name in set(names)}
    with ThreadPoolExecutor(8) as threads:
        crops = list(threads.map(lambda name: SHOP.prepare(nasty(name)).crop, names))
    assert all(np.array_equal(crop, alone[name]) for name, crop in zip(names, crops, strict=True))
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"size": 32}',
        '{"interpolation": "bilinear"}',
        '{"mean": [1, 2]}',
        '{"std": [0, 1, 1]}',
        '{"resize_mode": "squash"}',
        "{",
    ],
)
def test_unsupported_pixel_settings_are_refused(tmp_path: Path, content: str):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        read_recipe(path, 64, style="shop", jpeg_draft=False)


def test_reading_images_needs_no_torch():
    code = "import sys, pipeline.model.images, pipeline.model.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
