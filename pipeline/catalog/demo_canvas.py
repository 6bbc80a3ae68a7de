"""The sheet a demo garment is drawn on: cloth with a pattern, panels cut from it, seams, folds, light and shadow.

Coordinates are those of the picture whatever its size: x from -0.5 (left) to 0.5, y from 0 (top) to 1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.catalog.demo_taxonomy import COLOURS

if TYPE_CHECKING:
    from PIL.Image import Image

Point = tuple[float, float]
Colour = tuple[int, int, int]

_BACKGROUNDS: tuple[Colour, ...] = ((229, 231, 236), (222, 229, 236), (237, 231, 224), (225, 233, 228), (236, 227, 232))
_LIGHTS: dict[str, tuple[float, float, float]] = {
    "studio": (1.0, 1.0, 1.0),
    "daylight": (0.98, 1.0, 1.03),
    "warm": (1.03, 1.0, 0.95),
    "soft": (0.95, 0.95, 0.955),
}
_COARSE = 8  # light and shadow are soft: they are painted on a sheet this many times smaller


@dataclass(frozen=True, slots=True)
class Photo:
    """How a garment is photographed.

    Attributes:
        scale: size of the garment, 1 being as designed.
        tilt: rotation in radians.
        shift: displacement in picture widths and heights.
        is_mirrored: left and right exchanged.
        background: colour of the wall.
        light: factors on red, green and blue.
        side: where the light comes from, -1 (left) to 1.
    """

    scale: float
    tilt: float
    shift: Point
    is_mirrored: bool
    background: Colour
    light: tuple[float, float, float]
    side: float

    @classmethod
    def random(cls, rng: random.Random) -> Photo:
        """Take a photo as a shop would: nearly straight, nearly in the middle."""
        return cls(
            scale=rng.uniform(0.93, 1.05),
            tilt=rng.uniform(-0.06, 0.06),
            shift=(rng.uniform(-0.025, 0.025), rng.uniform(-0.015, 0.015)),
            is_mirrored=rng.random() < 0.5,
            background=rng.choice(_BACKGROUNDS),
            light=rng.choice(tuple(_LIGHTS.values())),
            side=rng.uniform(-1, 1),
        )


def smooth(points: Sequence[Point], rounds: int = 2) -> list[Point]:
    """Round a closed outline by cutting its corners (Chaikin); a point given twice stays a corner."""
    outline = np.asarray(points, dtype=np.float64)
    for _ in range(rounds):
        after = np.roll(outline, -1, axis=0)
        cut = np.empty((2 * len(outline), 2))
        cut[0::2] = 0.75 * outline + 0.25 * after
        cut[1::2] = 0.25 * outline + 0.75 * after
        outline = cut
    return [(float(x), float(y)) for x, y in outline]


def both_sides(right: Sequence[Point]) -> list[Point]:
    """Close an outline given for the right half only, from top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def tone(colour: Colour, amount: float) -> Colour:
    """Darken (amount below 0) or lighten (above 0) a colour; -1 is black, 1 is white."""
    goal = 255 if amount > 0 else 0
    red, green, blue = (round(part + (goal - part) * abs(amount)) for part in colour)
    return red, green, blue


def luminance(colour: Colour) -> float:
    """Perceived brightness, 0 to 255."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


class Canvas:
    """Panels are cut from cloth and laid on one another; `finish` photographs them."""

    def __init__(self, size_px: int, photo: Photo, colour: Colour, cloth: Image) -> None:
        """Begin an empty sheet.

        Args:
            size_px: side of the sheet; the finished picture has half of it.
            photo: how it will be photographed.
            colour: main colour of the cloth.
            cloth: RGB picture, size_px squared, that panels are cut from.
        """
        from PIL import Image, ImageDraw

        self.size_px = size_px
        self.colour = colour
        self.ink = tone(colour, 0.30) if luminance(colour) < 70 else tone(colour, -0.42)
        self.is_dark = luminance(colour) < 125
        self.wall = photo.background
        self._photo = photo
        self._cloth = cloth
        self._garment = Image.new("RGB", (size_px, size_px))
        self._mask = Image.new("L", (size_px, size_px))
        self._draw = ImageDraw.Draw(self._garment)
        self._mask_draw = ImageDraw.Draw(self._mask)
        mirror = -1.0 if photo.is_mirrored else 1.0
        along, across = math.cos(photo.tilt) * photo.scale, math.sin(photo.tilt) * photo.scale
        self._matrix = (along * mirror, -across, across * mirror, along)

    def panel(
        self, outline: Sequence[Point], *, colour: Colour | None = None, shade: float = 0.0, edge: bool = True
    ) -> None:
        """Lay down a panel, cut from the patterned cloth or, with `colour`, from a plain one.

        Args:
            outline: closed outline.
            colour: a plain colour in place of the cloth.
            shade: -1 to 1, darker or lighter than the cloth.
            edge: draw the outline as a seam.
        """
        points = self._pixels(outline)
        if colour is not None:
            self._draw.polygon(points, fill=tone(colour, shade) if shade else colour)
        else:
            self._cut(points, shade)
        self._mask_draw.polygon(points, fill=255)
        if edge:
            self.line([*outline, outline[0]], 0.006)

    def line(self, points: Sequence[Point], width: float, colour: Colour | None = None) -> None:
        """Draw a seam along `points`; `width` is in picture widths."""
        pixels = max(1, round(width * self.size_px))
        self._draw.line(self._pixels(points), fill=colour or self.ink, width=pixels, joint="curve")

    def dot(self, centre: Point, radius: float, colour: Colour | None = None) -> None:
        """Draw a button or a knot."""
        ((x, y),) = self._pixels([centre])
        r = max(1.0, radius * self.size_px)
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=colour or self.ink)

    def finish(self, rng: random.Random) -> Image:
        """Add folds, light, wall and shadow; return the picture, RGB, half the sheet's size squared."""
        from PIL import Image, ImageChops

        small = self.size_px // _COARSE
        mask = np.asarray(self._mask.resize((small, small), Image.Resampling.BOX), dtype=np.float32) / 255.0
        full = (self.size_px, self.size_px)
        shading = Image.fromarray(_shading(mask, rng, self._photo.side)).resize(full, Image.Resampling.BILINEAR)
        garment = ImageChops.multiply(self._garment, Image.merge("RGB", (shading,) * 3))
        picture = _wall(mask, self._photo).resize(full, Image.Resampling.BILINEAR)
        picture.paste(garment, mask=self._mask)
        table = [min(255, round(value * factor)) for factor in self._photo.light for value in range(256)]
        return picture.reduce(2).point(table)

    def _cut(self, points: list[Point], shade: float) -> None:
        """Copy the cloth inside the outline, only where the outline is."""
        from PIL import Image, ImageDraw

        left, top = (max(0, math.floor(min(axis))) for axis in zip(*points, strict=True))
        right, bottom = (min(self.size_px, math.ceil(max(axis)) + 1) for axis in zip(*points, strict=True))
        if right <= left or bottom <= top:
            return
        piece = self._cloth.crop((left, top, right, bottom))
        if shade:
            goal = 255 if shade > 0 else 0
            piece = Image.blend(piece, Image.new("RGB", piece.size, (goal,) * 3), abs(shade))
        mask = Image.new("L", piece.size)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in points], fill=255)
        self._garment.paste(piece, (left, top), mask)

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        a, b, c, d = self._matrix
        dx, dy = self._photo.shift
        size = self.size_px
        return [
            ((0.5 + dx + a * x + b * (y - 0.5)) * size, (0.5 + dy + c * x + d * (y - 0.5)) * size) for x, y in points
        ]


def _shading(mask: np.ndarray, rng: random.Random, side: float) -> np.ndarray:
    """Paint folds, the roundness of the edges and the side of the light; uint8 (S, S), 255 is unchanged."""
    from PIL import Image, ImageFilter

    size = mask.shape[0]
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    blurred = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 26))
    roundness = np.clip(np.asarray(blurred, dtype=np.float32) / 255.0 * 2 - 0.9, 0, 1)
    waves = rng.uniform(3, 5)
    folds = np.sin(2 * np.pi * (waves * x + 0.35 * np.sin(3 * y + rng.uniform(0, 6)) + rng.random()))
    light = 0.88 + 0.12 * roundness + 0.022 * folds * y + 0.07 * side * (x - 0.5)
    shading: np.ndarray = np.clip(light * 255, 0, 255).astype(np.uint8)
    return shading


def _wall(mask: np.ndarray, photo: Photo) -> Image:
    """Paint the wall, brighter at the top, with the garment's soft shadow on it; RGB, small."""
    from PIL import Image, ImageFilter

    size = mask.shape[0]
    step = max(1, size // 40)
    shadow = np.roll(mask, (step, round(-step * np.sign(photo.side))), axis=(0, 1))
    soft = Image.fromarray((shadow * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 32))
    depth = np.asarray(soft, dtype=np.float32)[..., None] / 255.0
    slope = np.linspace(1.03, 0.965, size, dtype=np.float32)[:, None, None]
    wall = np.asarray(photo.background, dtype=np.float32) * slope * (1 - 0.20 * depth)
    return Image.fromarray(np.clip(wall, 0, 255).astype(np.uint8))


def shade_of(name: str, rng: random.Random) -> Colour:
    """Give the colour of that name as one dyer would: each product a little different."""
    red, green, blue = COLOURS[name]
    brighter = rng.uniform(-9, 6)
    parts = (max(0, min(255, round(part + brighter + rng.uniform(-6, 6)))) for part in (red, green, blue))
    red, green, blue = parts
    return red, green, blue
