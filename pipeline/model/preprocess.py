"""Images as the square uint8 crop that the image tower takes. Pillow and numpy; torch only as it resizes."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.errors import ModelError
from pipeline.model.images import Style, read_rgb
from pipeline.records import ImageLimits

Resize = Literal["exact", "fast"]

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

    crop: np.ndarray[Any, np.dtype[np.uint8]]
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
        resize: `exact` is Pillow's own, bit for bit; `fast` is `pipeline.model.resize`, a level off here and there.
    """

    size: int
    mean: tuple[float, float, float] = PUBLISHED_MEAN
    std: tuple[float, float, float] = PUBLISHED_STD
    fit: str = "crop"
    centre: str = "round"
    resample: int = int(Image.Resampling.BICUBIC)
    style: Style = "shop"
    jpeg_draft: bool = False
    resize: Resize = "exact"

    def settings(self) -> dict[str, object]:
        """What decides which pixels come out, for the model's identity; the one of before `fast` stays as it was."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("resize", "exact")}

    def prepare(
        self, source: bytes | Image.Image, *, limits: ImageLimits | None = None, thumbnail: bool = False
    ) -> PreparedImage:
        """Decode, resize and crop one image; safe on threads.

        Raises:
            ImageRejected: see `pipeline.model.images.read_rgb`.
        """
        draft_px = DRAFT_FACTOR * self.size if self.jpeg_draft else None
        rgb = read_rgb(source, limits=limits or ImageLimits(), style=self.style, draft_px=draft_px)
        scaled = self._scaled(rgb.image)
        crop = np.array(self._centre(scaled), dtype=np.uint8)  # (size, size, 3)
        small = _thumbnail(rgb.image, scaled if self.fit == "crop" else rgb.image) if thumbnail else None
        return PreparedImage(crop, rgb.width_px, rgb.height_px, small)

    def _scaled(self, image: Image.Image) -> Image.Image:
        """The image with its short side, or where it is squashed both, at the model's size."""
        if self.fit == "squash":
            return self._resized(image, (self.size, self.size))
        width, height = image.size
        # The long side is cut to an integer, not rounded: torchvision's rule, and bit-exactness hangs on it.
        if width <= height:
            scaled = (self.size, int(self.size * height / width))
        else:
            scaled = (int(self.size * width / height), self.size)
        return image if scaled == image.size else self._resized(image, scaled)

    def _resized(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if self.resize == "exact":
            return image.resize(size, Image.Resampling(self.resample))
        from pipeline.model.resize import resized

        return resized(image, size, self.resample)

    def _centre(self, scaled: Image.Image) -> Image.Image:
        left, top = (self._offset(side) for side in scaled.size)
        return scaled.crop((left, top, left + self.size, top + self.size))

    def _offset(self, side: int) -> int:
        # Python's round goes to the even neighbour at a half, as torchvision's CenterCrop does.
        return (side - self.size) // 2 if self.centre == "floor" else round((side - self.size) / 2)


def _thumbnail(image: Image.Image, scaled: Image.Image) -> bytes:
    """A JPEG for people, from the image or, which is as good and quicker, from what was scaled for the model."""
    scale = THUMBNAIL_PX / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if THUMBNAIL_PX <= max(scaled.size) < max(image.size):
            image = scaled
        if image.size != size:
            from pipeline.model.resize import resized

            factor = max(image.size) // (2 * THUMBNAIL_PX)  # first by whole pixels: cheap, and little memory
            image = resized(image.reduce(factor) if factor > 1 else image, size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=THUMBNAIL_QUALITY)
    return out.getvalue()


def read_recipe(path: Path, size: int, *, style: Style, jpeg_draft: bool, resize: Resize = "exact") -> PixelRecipe:
    """Read a jina-clip `preprocessor_config.json`.

    Args:
        path: the file.
        size: the image tower's input size; the file must agree.
        style: `shop` or `published`.
        jpeg_draft: see `PixelRecipe`.
        resize: see `PixelRecipe`.

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
    return PixelRecipe(size=size, mean=mean, std=std, style=style, jpeg_draft=jpeg_draft, resize=resize)


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
