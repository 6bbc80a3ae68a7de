"""The limits of this machine: matrix products by dtype, memory copies, JPEG decoding by a core, disk writes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jobs.bench.timing import Row, in_turns

SIDES = (320, 1024, 2400)
"""Longest sides, in pixels, of the photographs that are decoded."""

_MATRIX = {"cpu": 2048, "cuda": 8192}
_PRODUCTS = 5
"""In one call: a second on each core, since rates of moments swing."""
_COPIED_BYTES = 268_435_456
_WRITTEN_BYTES = 536_870_912
_PHOTOS = {320: 64, 1024: 12, 2400: 3}


def limits(folder: Path, device: str, dtypes: Sequence[str]) -> Iterator[Row]:
    """All of them, a row each."""
    yield from _matrix(device, dtypes)
    yield _copy()
    yield from _decode()
    yield _write(folder)


def _matrix(device: str, dtypes: Sequence[str]) -> Iterator[Row]:
    """GFLOP/s of a square matrix product, two per multiplication and addition."""
    for name in dtypes:
        product, gflop = matrix_product(device, name)
        yield in_turns({f"matrix product, {name}": product}).row("limits", f"matrix product, {name}", gflop, "GFLOP/s")


def matrix_product(device: str, dtype: str) -> tuple[Callable[[], None], float]:
    """A call that multiplies square matrices, on a CPU others on each core, as the towers do it; and its GFLOP."""
    import torch

    from pipeline.model.lanes import Lanes

    side = _MATRIX[device]
    lanes = Lanes() if device == "cpu" else None
    count = lanes.count if lanes else 1
    pairs = [
        tuple(torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2)) for _ in range(count)
    ]

    def multiply(pair: tuple[torch.Tensor, ...]) -> None:
        with torch.inference_mode():
            for _ in range(_PRODUCTS):
                pair[0] @ pair[1]

    def product() -> None:
        if lanes:
            lanes.map(multiply, pairs)
        else:
            multiply(pairs[0])
            torch.cuda.synchronize()

    return product, count * _PRODUCTS * 2 * side**3 / 1e9


def _copy() -> Row:
    source, target = np.ones(_COPIED_BYTES, np.uint8), np.empty(_COPIED_BYTES, np.uint8)
    return in_turns({"memory copy": lambda: np.copyto(target, source)}).row(
        "limits", "memory copy", _COPIED_BYTES / 1e9, "GB/s"
    )


def photo(side_px: int, seed: int = 0) -> bytes:
    """A JPEG with the detail of a photograph: noise of several sizes, quality 85, 3:4."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    size = (side_px * 3 // 4, side_px)
    layers = [
        np.asarray(
            Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        )
        for n in (4, 16, 64)
    ]
    mixed = np.average(np.stack(layers), axis=0, weights=[6, 3, 1]).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(mixed).save(out, "JPEG", quality=85)
    return out.getvalue()


def _decode() -> Iterator[Row]:
    """The decoder that the pipeline uses, on one core."""
    import simplejpeg

    for side in SIDES:
        data = photo(side)

        def decode(data: bytes = data, count: int = _PHOTOS[side]) -> None:
            for _ in range(count):
                simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)

        name = f"JPEG decode, one core, {side} px"
        yield in_turns({name: decode}).row("limits", name, _PHOTOS[side], "images/s")


def _write(folder: Path) -> Row:
    """One file, synced to the disk."""
    data, path = os.urandom(1 << 20), folder / "written"

    def write() -> None:
        with path.open("wb") as file:
            for _ in range(_WRITTEN_BYTES >> 20):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    row = in_turns({"disk write, synced": write}, warm=False).row(
        "limits", "disk write, synced", _WRITTEN_BYTES / 1e9, "GB/s"
    )
    path.unlink()
    return row
