"""Resizing as Pillow does, bit for bit, in a seventh of its time where a C compiler was there at the installation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _compiled() -> Callable[[Bytes, int, int, Bytes, int, int, int], None] | None:
    try:
        from pipeline.model._resample import resample
    except ImportError:  # installed without a compiler: the same pixels, later
        return None
    return resample


_resample = _compiled()
IS_COMPILED = _resample is not None
"""Whether it runs in `resample.c`, or in Pillow."""


def resized(pixels: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    """Resize in width and then in height, as Pillow did before 13, where a tall image may be resized in height first.

    Args:
        pixels: uint8 (H, W, 4), contiguous: red, green, blue, and a byte that says nothing.
        size: width and height of the result, in pixels.
        resample: Pillow's number of the filter, 2 for bilinear and 3 for bicubic.

    Returns:
        uint8 (height, width, 4); the image itself where it has that size.

    Raises:
        ValueError: another filter, or another shape.
    """
    width, height = size
    if pixels.ndim != 3 or pixels.shape[2] != 4 or not pixels.size or resample not in (2, 3):
        raise ValueError(f"resized takes pixels (H, W, 4) and filter 2 or 3, not {pixels.shape} and {resample}")
    if pixels.shape[:2] == (height, width):
        return pixels
    if _resample is None:
        return _by_pillow(pixels, size, resample)
    out = np.empty((height, width, 4), np.uint8)
    _resample(pixels, pixels.shape[0], pixels.shape[1], out, height, width, resample)
    return out


def _by_pillow(pixels: Bytes, size: tuple[int, int], resample: int) -> Bytes:
    width, height = size
    whole = Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.tobytes(), "raw", "RGBX")
    narrow = whole.resize((width, whole.height), Image.Resampling(resample))
    short = narrow.resize((width, height), Image.Resampling(resample))
    return np.frombuffer(short.tobytes("raw", "RGBX"), np.uint8).reshape(height, width, 4)
