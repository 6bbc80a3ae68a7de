"""The cloth of demo garments: plain, striped, dotted, checked, floral and two-tone, drawn from a seed."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

from pipeline.catalog.demo_canvas import Colour, luminance, tone

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw


def weave(size_px: int, pattern: str, main: Colour, second: Colour, split: float, rng: random.Random) -> Image:
    """Draw a square of cloth, RGB, `size_px` on each side; two-tone cloth changes colour at height `split`.

    The main colour always covers most of it: a red dress with white dots is a red dress.
    """
    from PIL import Image, ImageDraw

    cloth = Image.new("RGB", (size_px, size_px), main)
    draw = ImageDraw.Draw(cloth)
    if pattern == "striped":
        _stripes(draw, size_px, second, rng)
    elif pattern == "dotted":
        _dots(draw, size_px, second, rng)
    elif pattern == "checked":
        return _checks(cloth, second, rng)
    elif pattern == "floral":
        _flowers(draw, size_px, second, rng)
    elif pattern == "two-tone":
        draw.rectangle((0, round(size_px * split), size_px, size_px), fill=second)
    return cloth


def _stripes(draw: ImageDraw, size_px: int, second: Colour, rng: random.Random) -> None:
    step = size_px * rng.uniform(0.058, 0.085)
    width = max(1, round(step * rng.uniform(0.28, 0.40)))
    slant = rng.choice((0.0, 0.0, size_px))  # across, or upright
    place = rng.random() * step
    while place < size_px:
        ends = ((place, 0), (place, size_px)) if slant else ((0, place), (size_px, place))
        draw.line(ends, fill=second, width=width)
        place += step


def _dots(draw: ImageDraw, size_px: int, second: Colour, rng: random.Random) -> None:
    step = size_px * rng.uniform(0.062, 0.085)
    radius = step * rng.uniform(0.22, 0.28)
    offset = rng.random() * step
    for row in range(math.ceil(size_px / step) + 1):
        for column in range(math.ceil(size_px / step) + 1):
            x = (column + 0.5 * (row % 2)) * step + offset - step
            y = row * step + offset - step
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=second)


def _checks(cloth: Image, second: Colour, rng: random.Random) -> Image:
    """Cross two sets of half-covering bands, so that the crossings are darkest, as in gingham."""
    from PIL import Image, ImageDraw

    size_px = cloth.width
    step = size_px * rng.uniform(0.075, 0.105)
    width = max(1, round(step * 0.42))
    offset = rng.random() * step
    for is_upright in (False, True):
        bands = Image.new("L", cloth.size)
        draw = ImageDraw.Draw(bands)
        place = offset
        while place < size_px:
            ends = ((place, 0), (place, size_px)) if is_upright else ((0, place), (size_px, place))
            draw.line(ends, fill=118, width=width)
            place += step
        cloth.paste(second, mask=bands)
    return cloth


def _flowers(draw: ImageDraw, size_px: int, second: Colour, rng: random.Random) -> None:
    """Scatter flowers of five petals on a shaken grid, so that none lies on another."""
    step = size_px * rng.uniform(0.125, 0.155)
    heart = (232, 176, 48) if luminance(second) > 150 or luminance(second) < 60 else tone(second, 0.6)
    leaf = (70, 132, 78)
    for row in range(math.ceil(size_px / step) + 1):
        for column in range(math.ceil(size_px / step) + 1):
            x = (column + 0.5 * (row % 2) + rng.uniform(-0.16, 0.16)) * step
            y = (row + rng.uniform(-0.16, 0.16)) * step
            petal = step * rng.uniform(0.13, 0.165)
            turn = rng.uniform(0, math.tau)
            stem = (x + 2.6 * petal * math.cos(turn), y + 2.6 * petal * math.sin(turn))
            draw.line(((x, y), stem), fill=leaf, width=max(1, round(petal * 0.45)))
            for number in range(5):
                angle = turn + math.tau * number / 5
                px, py = x + petal * 1.05 * math.cos(angle), y + petal * 1.05 * math.sin(angle)
                draw.ellipse((px - petal, py - petal, px + petal, py + petal), fill=second)
            core = petal * 0.7
            draw.ellipse((x - core, y - core, x + core, y + core), fill=heart)
