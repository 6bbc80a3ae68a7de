"""Images as the square uint8 crop that the image tower takes. Pillow and numpy, never torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import simplejpeg
from PIL import Image

from pipeline.errors import ModelError
from pipeline.model.images import Bytes, Style, read_rgb
from pipeline.model.resize import cropped, resized
from pipeline.records import ImageLimits

PUBLISHED_MEAN = (0.48145466, 0.4578275, 0.40821073)
PUBLISHED_STD = (0.26862954, 0.26130258, 0.27577711)
"""Per channel, of pixels in 0..1: CLIP's constants, in jina-clip-v1's own preprocessor_config.json."""

THUMBNAIL_PX = 224
THUMBNAIL_QUALITY = 85
DRAFT_FACTOR = 2
"""With `jpeg_draft`, a JPEG is decoded at no less than this many times the model's size."""


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One image, ready for the image tower.

    Attributes:
        crop: uint8 (size, size, 3), RGB.
        width_px: of the original, upright.
        height_px: of the original, upright.
        thumbnail: JPEG, longest side at most 224 px, or None where it was not asked for.
    """

    crop: Bytes
    width_px: int
    height_px: int
    thumbnail: bytes | None = None


@dataclass(frozen=True, slots=True)
class PixelRecipe:
    """What turns an image into the tower's pixels; part of a model's identity.

    Attributes:
        size: side of the crop, in pixels.
        mean: subtracted from pixels in 0..1, by channel.
        std: divides them afterwards.
        fit: `crop` scales the short side to `size` and cuts the centre; `squash` scales both sides (SigLIP).
        centre: how half a pixel of offset is resolved: `round` as torchvision does (jina-clip), `floor` as transformers
            does (CLIP).
        resample: Pillow's filter number; 3 is bicubic, 2 bilinear.
        style: see `pipeline.model.images.read_rgb`.
        jpeg_draft: whether JPEG files are decoded at reduced size; faster for large photos, at a small cost in cosine.
    """

    size: int
    mean: tuple[float, float, float] = PUBLISHED_MEAN
    std: tuple[float, float, float] = PUBLISHED_STD
    fit: str = "crop"
    centre: str = "round"
    resample: int = int(Image.Resampling.BICUBIC)
    style: Style = "shop"
    jpeg_draft: bool = False

    def settings(self) -> dict[str, object]:
        """What decides which pixels come out, for the model's identity."""
        return asdict(self)

    def prepare(
        self, source: bytes | Image.Image, *, limits: ImageLimits | None = None, thumbnail: bool = False
    ) -> PreparedImage:
        """Decode, resize and crop one image; safe on threads.

        Raises:
            ImageRejected: see `pipeline.model.images.read_rgb`.
        """
        draft_px = DRAFT_FACTOR * self.size if self.jpeg_draft else None
        rgb = read_rgb(source, limits=limits or ImageLimits(), style=self.style, draft_px=draft_px)
        scaled = self._scaled(rgb.pixels)
        top, left = (self._offset(side) for side in scaled.shape[:2])
        crop = cropped(scaled, left, top, self.size)
        small = _thumbnail(rgb.pixels, scaled if self.fit == "crop" else rgb.pixels) if thumbnail else None
        return PreparedImage(crop, rgb.width_px, rgb.height_px, small)

    def _scaled(self, pixels: Bytes) -> Bytes:
        """The image with its short side, or where it is squashed both, at the model's size."""
        if self.fit == "squash":
            return resized(pixels, (self.size, self.size), self.resample)
        height, width, _ = pixels.shape
        # The long side is cut to an integer, not rounded: torchvision's rule, and bit-exactness hangs on it.
        if width <= height:
            return resized(pixels, (self.size, int(self.size * height / width)), self.resample)
        return resized(pixels, (int(self.size * width / height), self.size), self.resample)

    def _offset(self, side: int) -> int:
        # Python's round goes to the even neighbour at a half, as torchvision's CenterCrop does.
        return (side - self.size) // 2 if self.centre == "floor" else round((side - self.size) / 2)


def _thumbnail(pixels: Bytes, scaled: Bytes) -> bytes:
    """A JPEG for people, from the image or, which is as good and quicker, from what was scaled for the model."""
    height, width, _ = pixels.shape
    scale = THUMBNAIL_PX / max(width, height)
    if scale < 1:
        of = scaled if THUMBNAIL_PX <= max(scaled.shape) < max(width, height) else pixels
        pixels = resized(of, (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC)
    encoded = simplejpeg.encode_jpeg(
        pixels, quality=THUMBNAIL_QUALITY, colorspace="RGBX", colorsubsampling="420", fastdct=False
    )
    return bytes(encoded)


def read_recipe(path: Path, size: int, *, style: Style, jpeg_draft: bool) -> PixelRecipe:
    """Read a jina-clip `preprocessor_config.json`.

    Args:
        path: the file.
        size: the image tower's input size; the file must agree.
        style: `shop` or `published`.
        jpeg_draft: see `PixelRecipe`.

    Raises:
        ModelError: unreadable, or asking for another resize, filter or size.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    for key, supported in (("resize_mode", "shortest"), ("interpolation", "bicubic")):
        if values.get(key, supported) != supported:
            raise ModelError(f"{path}: {key} is {values[key]!r}; this project supports {supported!r} only.")
    stated = values.get("size", size)
    if stated not in (size, [size, size]):
        raise ModelError(f"{path}: size is {stated!r}, but config.json's image_size is {size}.")
    mean, std = (three_numbers(path, values, key, at) for key, at in (("mean", PUBLISHED_MEAN), ("std", PUBLISHED_STD)))
    if min(std) <= 0:
        raise ModelError(f"{path}: std must be positive, not {std}.")
    return PixelRecipe(size=size, mean=mean, std=std, style=style, jpeg_draft=jpeg_draft)


def three_numbers(path: Path, values: dict[str, Any], key: str, default: Sequence[float]) -> tuple[float, float, float]:
    """One value a channel.

    Raises:
        ModelError: not three numbers.
    """
    numbers = values.get(key, default)
    if (
        not isinstance(numbers, list | tuple)
        or len(numbers) != 3
        or not all(isinstance(n, int | float) for n in numbers)
    ):
        raise ModelError(f"{path}: {key} must be three numbers, not {numbers!r}.")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
