"""The shapes of dresses, skirts and pants, and the picture of any garment of the demo catalog."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.catalog import demo_cloth
from pipeline.catalog.demo_canvas import Canvas, Photo, Point, both_sides, shade_of, smooth
from pipeline.catalog.demo_products import DemoProduct, stream
from pipeline.catalog.demo_upper import (
    blazer,
    blouse,
    bomber,
    collar,
    denim_jacket,
    hoodie,
    neckline,
    puffer,
    sleeves,
    sweater,
    t_shirt,
    tank_top,
    trench,
)

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTHS = {"slim": 0.92, "regular": 1.0, "relaxed": 1.09}
_HEMS = {"short": -0.025, "regular": 0.0, "long": 0.025}
_SUPERSAMPLING = 2


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a fine category is drawn.

    Attributes:
        draw: takes canvas, product, y of the top, y of the hem, and the factor of its width.
        height: from top to hem, in picture heights.
        zoom: enlargement, so that small garments fill their photo too.
    """

    draw: Callable[[Canvas, DemoProduct, float, float, float], None]
    height: float
    zoom: float = 1.0


def draw_photo(item: DemoProduct, seed: int, ordinal: int, size_px: int) -> Image:
    """Draw photo `ordinal` of a product: an RGB picture, `size_px` on each side.

    The garment depends on the product alone; where it hangs, its light and its wall on the photo's number too.
    """
    shape = _SHAPES[item.fine]
    garment = stream(0, item.look, "look")
    shot = stream(seed, item.index, f"photo/{ordinal}")
    photo = Photo.random(shot)
    photo = replace(photo, scale=photo.scale * shape.zoom)
    height = shape.height + _HEMS[item.length] * shape.height
    top, bottom = 0.5 - height / 2, 0.5 + height / 2
    sheet_px = size_px * _SUPERSAMPLING
    colour = shade_of(item.colour, garment)
    split = 0.5 + photo.shift[1] + photo.scale * (top + height * garment.uniform(0.60, 0.68) - 0.5)
    cloth = demo_cloth.weave(sheet_px, item.pattern, colour, shade_of(item.second, garment), split, garment)
    canvas = Canvas(sheet_px, photo, colour, cloth)
    shape.draw(canvas, item, top, bottom, _WIDTHS[item.fit])
    return canvas.finish(shot)


def _dress_body(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float, hem: float) -> None:
    bare = item.sleeve == "none"
    shoulder = 0.088 if bare else 0.108
    if not bare:
        length = 0.105 if item.sleeve == "short" else 0.30
        sleeves(c, (shoulder, top + 0.012), (0.098 * wide, top + 0.105), length, 0.072, angle=0.34)
    body = [
        (0.042, top),
        (shoulder, top + 0.008),
        (shoulder, top + 0.012),
        (0.090 * wide, top + 0.07),
        (0.100 * wide, top + 0.115),
        (0.074 * wide, top + 0.235),
        (0.074 * wide, top + 0.240),
        (0.112 * wide, top + 0.33),
        (hem * wide, bottom - 0.012),
        (hem * wide, bottom - 0.012),
        (hem * wide * 0.5, bottom + 0.004),
    ]
    c.panel(smooth(both_sides(body)))
    c.line([(-0.074 * wide, top + 0.238), (0.0, top + 0.244), (0.074 * wide, top + 0.238)], 0.007)
    for x in (-0.45, 0.0, 0.45):
        c.line([(x * 0.09, top + 0.27), (x * hem * 1.25, bottom - 0.02)], 0.003)


def _dress(hem: float) -> Callable[[Canvas, DemoProduct, float, float, float], None]:
    def draw(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
        _dress_body(c, item, top, bottom, wide, hem)
        neckline(c, item.neckline, top, 0.052, 0.055)

    return draw


def _shirt_dress(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _dress_body(c, item, top, bottom, wide, 0.145)
    collar(c, top, 0.05, 0.075)
    c.panel([(-0.013, top + 0.06), (0.013, top + 0.06), (0.013, bottom), (-0.013, bottom)], shade=0.10)
    c.panel(
        [
            (-0.078 * wide, top + 0.222),
            (0.078 * wide, top + 0.222),
            (0.078 * wide, top + 0.25),
            (-0.078 * wide, top + 0.25),
        ],
        shade=-0.3,
    )
    y = top + 0.10
    while y < bottom - 0.03:
        c.dot((0.0, y), 0.0075)
        y += 0.065


def _wrap_dress(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _dress_body(c, item, top, bottom, wide, 0.18)
    c.panel([(-0.05, top - 0.002), (0.05, top - 0.002), (0.006, top + 0.15)], shade=-0.55)
    waist = top + 0.235
    c.line([(-0.05, top), (0.012, top + 0.155), (0.07 * wide, waist)], 0.013)
    c.line([(0.05, top), (0.006, top + 0.15)], 0.010)
    c.line([(0.055 * wide, waist), (0.02, bottom - 0.10), (-0.07, bottom)], 0.012)
    belt = [
        (-0.08 * wide, waist - 0.014),
        (0.08 * wide, waist - 0.014),
        (0.08 * wide, waist + 0.016),
        (-0.08 * wide, waist + 0.016),
    ]
    c.panel(belt, shade=-0.32)
    knot = (0.055 * wide, waist)
    for dx, dy in ((0.035, 0.13), (-0.005, 0.15)):
        end = (knot[0] + dx, waist + dy)
        c.panel(
            [(knot[0] - 0.012, waist), (knot[0] + 0.012, waist), (end[0] + 0.014, end[1]), (end[0] - 0.010, end[1])],
            shade=-0.32,
        )
    c.dot(knot, 0.018)


def _waistband(c: Canvas, top: float, half: float, depth: float = 0.032, shade: float = -0.25) -> None:
    c.panel([(-half, top), (half, top), (half * 1.02, top + depth), (-half * 1.02, top + depth)], shade=shade)


def _skirt(
    c: Canvas, top: float, bottom: float, hip: float, hem: float, *, waist: float = 0.105, sag: float = 0.012
) -> None:
    outline = [
        (waist, top),
        (waist, top),
        (hip, top + 0.13),
        (hem, bottom - sag),
        (hem, bottom - sag),
        (hem * 0.5, bottom + sag / 2),
    ]
    c.panel(smooth(both_sides(outline)))


def _mini_skirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _skirt(c, top, bottom, 0.155 * wide, 0.205 * wide, waist=0.118)
    for x in (-0.6, 0.6):
        c.line([(x * 0.12, top + 0.04), (x * 0.22 * wide, bottom - 0.012)], 0.004)
    _waistband(c, top, 0.12)


def _maxi_skirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _skirt(c, top, bottom, 0.145 * wide, 0.265 * wide, waist=0.092)
    for x in (-0.62, -0.2, 0.2, 0.62):
        c.line([(x * 0.10, top + 0.05), (x * 0.17, (top + bottom) / 2), (x * 0.27 * wide, bottom - 0.012)], 0.004)
    _waistband(c, top, 0.094)


def _pencil_skirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _skirt(c, top, bottom, 0.135 * wide, 0.095 * wide, waist=0.092, sag=0.004)
    c.line([(0.0, bottom - 0.13), (0.0, bottom)], 0.010)
    for x in (-1, 1):
        c.line([(x * 0.045, top + 0.035), (x * 0.05, top + 0.11)], 0.005)
    _waistband(c, top, 0.094, depth=0.026)


def _pleated_skirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    waist, hem, count = 0.098, 0.22 * wide, 10
    for number in range(count):
        left, right = (-1 + 2 * (number + part) / count for part in (0.0, 1.0))
        pleat: list[Point] = [
            (left * waist, top),
            (right * waist, top),
            (right * hem, bottom),
            (left * hem, bottom - 0.028),
        ]
        c.panel(pleat, shade=0.10 if number % 2 else -0.20)
    _waistband(c, top, 0.10)


def _tulle_skirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Three tiers of net, each paler, with a scalloped edge: a cloud, not a cone."""
    tiers = ((1.0, 0.275, 0.42), (0.72, 0.245, 0.24), (0.42, 0.19, 0.06))
    for depth, half, pale in tiers:
        y = top + (bottom - top) * depth
        scallops = [
            (
                half * wide * math.cos(angle) * (1.0 if number % 2 else 0.95),
                y + (0.035 if number % 2 else -0.012) * math.sin(angle) - 0.02,
            )
            for number, angle in ((n, math.pi * n / 18) for n in range(19))
        ]
        c.panel(
            smooth(
                [
                    (-0.095, top),
                    (-0.095, top),
                    (0.095, top),
                    (0.095, top),
                    (half * 0.86 * wide, top + (y - top) * 0.45),
                    *scallops,
                    (-half * 0.86 * wide, top + (y - top) * 0.45),
                ],
                1,
            ),
            shade=pale,
        )
        for x in range(-5, 6):
            c.line([(x * 0.016, top + 0.03), (x * half * wide / 5.6, y - 0.035)], 0.002)
    _waistband(c, top, 0.10, depth=0.036, shade=-0.4)


def _legs(
    c: Canvas,
    top: float,
    bottom: float,
    hip: float,
    knee: float,
    hem: float,
    gap: float,
    *,
    waist: float = 0.105,
    rise: float = 0.20,
) -> None:
    """Cut two legs; `knee` and `hem` are widths of a leg, `gap` the space between them at the hem."""
    crotch = top + rise
    middle = (crotch + bottom) / 2
    inner = gap / 2
    outline = [
        (waist, top),
        (waist, top),
        (hip, crotch - 0.05),
        (inner * 0.6 + knee, middle),
        (inner + hem, bottom),
        (inner + hem, bottom),
        (inner, bottom),
        (inner, bottom),
        (inner * 0.5, middle),
        (0.002, crotch),
        (0.0, crotch),
    ]
    c.panel(smooth(both_sides(outline)))
    c.line([(0.0, top + 0.03), (0.004, top + rise * 0.72), (0.0, crotch)], 0.006)


def _jeans(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    stitch = (208, 150, 72)
    _legs(c, top, bottom, 0.135, 0.098 * wide, 0.088 * wide, 0.035)
    for x in (-1, 1):
        c.line([(x * 0.055, top + 0.035), (x * 0.075, top + 0.075), (x * 0.122, top + 0.088)], 0.007, stitch)
        c.line([(x * 0.118, top + 0.10), (x * (0.115 + 0.01 * wide), bottom - 0.03)], 0.004, stitch)
        c.line([(x * 0.022, bottom - 0.018), (x * (0.012 + 0.095 * wide), bottom - 0.018)], 0.006, stitch)
    c.line([(0.0, top + 0.03), (0.026, top + 0.10), (0.0, top + 0.135)], 0.006, stitch)
    _waistband(c, top, 0.107, depth=0.034)
    for loop in (-0.075, 0.075):
        left, right = loop - 0.006, loop + 0.006
        c.panel(
            [(left, top - 0.004), (right, top - 0.004), (right, top + 0.038), (left, top + 0.038)],
            shade=-0.1,
        )
    c.dot((0.0, top + 0.017), 0.011, stitch)


def _leggings(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _legs(c, top, bottom, 0.108, 0.062, 0.040, 0.055, waist=0.085, rise=0.19)
    _waistband(c, top, 0.087, depth=0.06, shade=-0.18)


def _wide_leg(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _legs(c, top, bottom, 0.138, 0.150 * wide, 0.205 * wide, 0.02, waist=0.095, rise=0.22)
    for x in (-1, 1):
        c.line([(x * 0.055, top + 0.04), (x * 0.075, top + 0.3), (x * 0.125 * wide, bottom - 0.004)], 0.006)
    _waistband(c, top, 0.097, depth=0.04)


def _cargo(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _legs(c, top, bottom, 0.145, 0.122 * wide, 0.085 * wide, 0.045)
    knee = (top + 0.20 + bottom) / 2 - 0.03
    for x in (-1, 1):
        near, far = x * 0.055, x * (0.165 * wide)
        pocket = [(near, knee - 0.07), (far, knee - 0.07), (far, knee + 0.075), (near, knee + 0.075)]
        c.panel(pocket, shade=-0.14)
        c.panel(
            [
                (near - x * 0.004, knee - 0.075),
                (far + x * 0.006, knee - 0.075),
                (far + x * 0.006, knee - 0.035),
                (near - x * 0.004, knee - 0.035),
            ],
            shade=-0.34,
        )
        c.line([(x * 0.06, top + 0.035), (x * 0.12, top + 0.11)], 0.007)
        c.panel(
            [
                (x * 0.018, bottom - 0.03),
                (x * (0.028 + 0.09 * wide), bottom - 0.03),
                (x * (0.026 + 0.088 * wide), bottom + 0.004),
                (x * 0.020, bottom + 0.004),
            ],
            shade=-0.28,
        )
    _waistband(c, top, 0.107)


def _shorts(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    _legs(c, top, bottom, 0.158, 0.155 * wide, 0.162 * wide, 0.03, waist=0.125, rise=0.20)
    for x in (-1, 1):
        c.line([(x * 0.075, top + 0.035), (x * 0.135, top + 0.11)], 0.007)
        c.line([(x * 0.02, bottom - 0.025), (x * (0.012 + 0.165 * wide), bottom - 0.025)], 0.005)
    _waistband(c, top, 0.127)
    for end in (-0.014, 0.018):
        c.line([(0.0, top + 0.02), (end, top + 0.10)], 0.006)


_SHAPES: dict[str, _Shape] = {
    "mini dress": _Shape(_dress(0.150), 0.48, 1.28),
    "midi dress": _Shape(_dress(0.185), 0.69, 1.06),
    "maxi dress": _Shape(_dress(0.225), 0.90, 0.97),
    "shirt dress": _Shape(_shirt_dress, 0.58, 1.2),
    "wrap dress": _Shape(_wrap_dress, 0.63, 1.15),
    "blazer": _Shape(blazer, 0.62, 1.12),
    "bomber jacket": _Shape(bomber, 0.54, 1.18),
    "puffer jacket": _Shape(puffer, 0.60, 1.10),
    "denim jacket": _Shape(denim_jacket, 0.52, 1.2),
    "trench coat": _Shape(trench, 0.82, 1.03),
    "jeans": _Shape(_jeans, 0.80, 1.05),
    "leggings": _Shape(_leggings, 0.82, 1.03),
    "wide-leg pants": _Shape(_wide_leg, 0.82, 1.02),
    "cargo pants": _Shape(_cargo, 0.80, 1.05),
    "shorts": _Shape(_shorts, 0.38, 1.55),
    "mini skirt": _Shape(_mini_skirt, 0.34, 1.6),
    "maxi skirt": _Shape(_maxi_skirt, 0.80, 1.05),
    "pencil skirt": _Shape(_pencil_skirt, 0.60, 1.25),
    "pleated skirt": _Shape(_pleated_skirt, 0.52, 1.35),
    "tulle skirt": _Shape(_tulle_skirt, 0.50, 1.4),
    "t-shirt": _Shape(t_shirt, 0.56, 1.12),
    "tank top": _Shape(tank_top, 0.56, 1.2),
    "blouse": _Shape(blouse, 0.58, 1.12),
    "sweater": _Shape(sweater, 0.56, 1.1),
    "hoodie": _Shape(hoodie, 0.58, 1.08),
}
