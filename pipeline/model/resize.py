"""Resizing to Pillow's bytes in a seventh of its time, where a C compiler was there at the installation."""

from __future__ import annotations

import importlib
from types import ModuleType

import numpy as np
from PIL import Image

from pipeline.model.images import Bytes, rgbx

_compiled: ModuleType | None
try:
    _compiled = importlib.import_module("pipeline.model._resample")
except ImportError:  # installed without a compiler: the same pixels, later
    _compiled = None
IS_COMPILED = _compiled is not None
"""Whether `resample.c` does the work, or Pillow and numpy."""


def resized(pixels: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    """Resize in width and then in height, as Pillow did before 13, where a tall image may be resized in height first.

    Args:
        pixels: uint8 (H, W, 4), contiguous: red, green, blue, and a byte that says nothing.
        size: width and height of the result, in pixels.
        resample: Pillow's number of the filter, 2 for bilinear and 3 for bicubic.

    Returns:
        uint8 (height, width, 4); the image itself where it has that size.

    Raises:
        ValueError: another filter, or other pixels.
    """
    width, height = size
    if not _is_image(pixels) or min(size) < 1 or resample not in (2, 3):
        told = f"not {pixels.dtype} {pixels.shape} to {size} by {resample}"
        raise ValueError(f"resized takes contiguous uint8 pixels (H, W, 4), a size and filter 2 or 3, {told}")
    if pixels.shape[:2] == (height, width):
        return pixels
    if _compiled is None:
        return _by_pillow(pixels, size, resample)
    out = np.empty((height, width, 4), np.uint8)
    _compiled.resample(pixels, pixels.shape[0], pixels.shape[1], out, height, width, resample)
    return out


def cropped(pixels: Bytes, left: int, top: int, size: int) -> Bytes:
    """A square part of uint8 (H, W, 4) as uint8 (size, size, 3); ValueError where it does not lie inside."""
    height, width = pixels.shape[:2]
    if not _is_image(pixels) or min(left, top) < 0 or size < 1 or left + size > width or top + size > height:
        raise ValueError(f"{size} x {size} pixels from {left}, {top} are not inside of {pixels.dtype} {pixels.shape}")
    if _compiled is None:
        return np.ascontiguousarray(pixels[top : top + size, left : left + size, :3])
    out = np.empty((size, size, 3), np.uint8)
    _compiled.crop(pixels, height, width, top, left, out, size, size)
    return out


def _is_image(pixels: Bytes) -> bool:
    is_shaped = pixels.ndim == 3 and pixels.shape[2] == 4 and pixels.size > 0
    return is_shaped and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


def _by_pillow(pixels: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    width, height = size
    whole = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.tobytes(), "raw", "RGBX")
    narrow = whole.resize((width, whole.height), Image.Resampling(resample))
    return rgbx(narrow.resize((width, height), Image.Resampling(resample)))
