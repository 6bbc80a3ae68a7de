"""The shapes of demo jackets and tops, and the sleeves, collars and necklines that they share with dresses."""

from __future__ import annotations

import math

from pipeline.catalog.demo_canvas import Canvas, Point, both_sides, smooth
from pipeline.catalog.demo_products import DemoProduct


def sleeves(
    c: Canvas,
    shoulder: Point,
    armpit: Point,
    length: float,
    end: float,
    *,
    angle: float = 0.26,
    cuff: float = 0.0,
    puff: float = 0.0,
    tubes: int = 0,
) -> None:
    """Lay down a pair of sleeves; the body's panel comes over their upper ends.

    Args:
        c: the canvas.
        shoulder: where the right sleeve's upper edge begins.
        armpit: where its lower edge begins.
        length: from shoulder to cuff.
        end: width at the cuff.
        angle: how far it hangs from upright, in radians.
        cuff: depth of a darker cuff; 0 for none.
        puff: how much it widens on its way.
        tubes: quilted tubes across it.
    """
    along = (math.sin(angle), math.cos(angle))
    across = (math.cos(angle), -math.sin(angle))
    root = ((shoulder[0] + armpit[0]) / 2, (shoulder[1] + armpit[1]) / 2)
    start = math.dist(shoulder, armpit)

    def edge(part: float, side: float) -> Point:
        width = start + (end - start) * part + puff * math.sin(math.pi * min(1.0, part * 1.05))
        reach = length * part
        return (
            root[0] + along[0] * reach + side * across[0] * width / 2,
            root[1] + along[1] * reach + side * across[1] * width / 2,
        )

    outer = [edge(part, 1) for part in (0.3, 0.6, 0.85, 1.0, 1.0)]
    inner = [edge(part, -1) for part in (1.0, 1.0, 0.85, 0.6, 0.3)]
    for sign in (1, -1):

        def side(points: list[Point], sign: int = sign) -> list[Point]:
            return [(sign * x, y) for x, y in points]

        c.panel(smooth(side([shoulder, shoulder, *outer, *inner, armpit, armpit]), 1), shade=-0.07)
        for number in range(1, tubes):
            part = number / tubes
            c.line(side([edge(part, 1), edge(part + 0.03, 0), edge(part, -1)]), 0.011)
        if cuff:
            share = 1 - cuff / length
            c.panel(side([edge(share, 1), edge(1.01, 1), edge(1.01, -1), edge(share, -1)]), shade=-0.3)


def neckline(c: Canvas, kind: str, top: float, half: float, depth: float) -> None:
    """Cut the neck out of a body: inside, the back of the garment is seen in its own shadow."""
    if kind == "high":
        c.panel(
            [(-half, top - 0.05), (half, top - 0.05), (half * 1.12, top + 0.02), (-half * 1.12, top + 0.02)],
            shade=-0.15,
        )
        c.line([(-half * 1.05, top - 0.012), (half * 1.05, top - 0.012)], 0.005)
        return
    if kind == "v":
        hole: list[Point] = [(-half, top - 0.004), (half, top - 0.004), (0.0, top + depth * 1.9)]
    elif kind == "square":
        hole = [
            (-half * 1.1, top - 0.004),
            (half * 1.1, top - 0.004),
            (half * 1.0, top + depth * 1.15),
            (-half * 1.0, top + depth * 1.15),
        ]
    else:
        hole = [(half * math.cos(t), top - 0.004 + depth * math.sin(t)) for t in (math.pi * n / 12 for n in range(13))]
    c.panel(hole, shade=-0.5)
    c.line([*hole, hole[0]], 0.011)


def collar(c: Canvas, top: float, half: float, depth: float) -> None:
    """Lay down a shirt collar: two points over a small dark neck."""
    c.panel([(-half, top - 0.02), (half, top - 0.02), (0.0, top + depth * 0.8)], shade=-0.5)
    for x in (-1, 1):
        c.panel(
            [
                (x * half * 0.95, top - 0.03),
                (x * half * 1.25, top + 0.012),
                (x * half * 0.62, top + depth * 1.12),
                (0.0, top + depth * 0.72),
            ],
            shade=0.16,
        )


def _torso(
    c: Canvas, top: float, bottom: float, shoulder: float, chest: float, waist: float, hem: float, neck: float = 0.068
) -> None:
    outline = [
        (neck, top - 0.012),
        (neck, top - 0.012),
        (shoulder, top + 0.035),
        (shoulder, top + 0.035),
        (chest, top + 0.19),
        (waist, (top + bottom) / 2 + 0.05),
        (hem, bottom),
        (hem, bottom),
        (hem * 0.5, bottom + 0.004),
    ]
    c.panel(smooth(both_sides(outline)))


def _lapels(c: Canvas, top: float, low: float, half: float, reach: float) -> None:
    """Open a jacket's front to a V with turned lapels; the shirt's shadow shows between them."""
    c.panel([(-half, top - 0.02), (half, top - 0.02), (0.0, low)], shade=-0.62)
    for x in (-1, 1):
        c.panel(
            [
                (x * half * 0.9, top - 0.028),
                (x * half * 1.25, top + 0.01),
                (x * reach, top + 0.105),
                (x * reach * 0.78, top + 0.115),
                (x * reach * 1.05, top + 0.15),
                (0.0, low),
                (x * half * 0.55, top + 0.10),
            ],
            shade=0.14,
        )


def _rib(c: Canvas, y: float, depth: float, half: float, shade: float = -0.3) -> None:
    c.panel([(-half, y), (half, y), (half * 0.97, y + depth), (-half * 0.97, y + depth)], shade=shade)
    for number in range(-7, 8):
        c.line([(number * half / 7.6, y + 0.004), (number * half / 7.8, y + depth - 0.002)], 0.003)


def t_shirt(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a t-shirt: short wide sleeves, straight body."""
    sleeves(c, (0.195 * wide, top + 0.035), (0.172 * wide, top + 0.185), 0.15, 0.135, angle=0.62)
    _torso(c, top, bottom, 0.195 * wide, 0.172 * wide, 0.168 * wide, 0.174 * wide)
    neckline(c, item.neckline, top - 0.008, 0.072, 0.062)
    c.line([(-0.172 * wide, bottom - 0.022), (0.172 * wide, bottom - 0.022)], 0.004)


def tank_top(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a tank top: two straps, deep armholes."""
    outline = [
        (0.066, top - 0.02),
        (0.066, top - 0.02),
        (0.108, top - 0.02),
        (0.108, top - 0.02),
        (0.100, top + 0.09),
        (0.150 * wide, top + 0.185),
        (0.152 * wide, top + 0.185),
        (0.142 * wide, (top + bottom) / 2 + 0.06),
        (0.158 * wide, bottom),
        (0.158 * wide, bottom),
    ]
    c.panel(smooth(both_sides(outline)))
    hole: list[Point] = [(0.072, top - 0.03), (0.064, top + 0.10), (0.035, top + 0.135)]
    if item.neckline == "square":
        hole = [(0.072, top - 0.03), (0.068, top + 0.115), (0.068, top + 0.118)]
    back = [(-0.068, top + 0.045), (0.0, top + 0.07), (0.068, top + 0.045)]
    c.panel(both_sides(hole), colour=c.wall, edge=False)
    c.panel([*back, *[(x, y) for x, y in hole[1:]], *[(-x, y) for x, y in reversed(hole[1:])]], shade=-0.5, edge=False)
    c.line([hole[0], *hole[1:], *[(-x, y) for x, y in reversed(hole)]], 0.011)
    c.line([(-0.157 * wide, bottom - 0.02), (0.157 * wide, bottom - 0.02)], 0.004)


def blouse(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a blouse: collar, buttons, full sleeves gathered at the cuff, a curved hem."""
    length, end = (0.20, 0.115) if item.sleeve == "short" else (0.44, 0.062)
    sleeves(c, (0.165 * wide, top + 0.03), (0.155 * wide, top + 0.17), length, end, angle=0.36, cuff=0.03, puff=0.055)
    outline = [
        (0.06, top - 0.012),
        (0.06, top - 0.012),
        (0.165 * wide, top + 0.03),
        (0.165 * wide, top + 0.03),
        (0.155 * wide, top + 0.18),
        (0.138 * wide, (top + bottom) / 2 + 0.03),
        (0.175 * wide, bottom - 0.07),
        (0.160 * wide, bottom - 0.055),
        (0.09, bottom + 0.01),
        (0.0, bottom + 0.01),
    ]
    c.panel(smooth(both_sides(outline)))
    c.panel([(-0.018, top + 0.05), (0.018, top + 0.05), (0.018, bottom + 0.005), (-0.018, bottom + 0.005)], shade=0.12)
    for number in range(6):
        c.dot((0.0, top + 0.10 + number * 0.072), 0.009)
    collar(c, top, 0.068, 0.085)


def sweater(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a sweater: long sleeves, ribbed hem, cuffs and neck, knitted rows."""
    sleeves(c, (0.19 * wide, top + 0.035), (0.17 * wide, top + 0.20), 0.46, 0.085, angle=0.24, cuff=0.05)
    _torso(c, top, bottom - 0.05, 0.19 * wide, 0.172 * wide, 0.170 * wide, 0.172 * wide)
    for x in (-0.08, -0.027, 0.027, 0.08):
        for number in range(7):
            y = top + 0.15 + number * 0.052
            if y < bottom - 0.09:
                c.line([(x - 0.011, y), (x, y + 0.018), (x + 0.011, y)], 0.005)
    _rib(c, bottom - 0.058, 0.058, 0.168 * wide)
    neckline(c, item.neckline, top - 0.008, 0.070, 0.058)


def hoodie(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a hoodie: the hood behind the neck, cords, a pouch pocket, ribbed hem."""
    hood = [(0.0, top - 0.085), (0.075, top - 0.075), (0.125, top - 0.01), (0.118, top + 0.07), (0.0, top + 0.10)]
    c.panel(smooth(both_sides(hood)), shade=-0.12)
    sleeves(c, (0.195 * wide, top + 0.045), (0.175 * wide, top + 0.21), 0.46, 0.095, angle=0.25, cuff=0.05)
    _torso(c, top + 0.01, bottom - 0.045, 0.195 * wide, 0.178 * wide, 0.178 * wide, 0.178 * wide, neck=0.10)
    hole = [(0.0, top - 0.045), (0.06, top - 0.03), (0.075, top + 0.03), (0.0, top + 0.085)]
    c.panel(smooth(both_sides(hole)), shade=-0.55)
    low = bottom - 0.06
    pouch = [(0.065, low - 0.15), (0.065, low - 0.15), (0.125, low - 0.055), (0.125, low), (0.125, low)]
    c.panel(both_sides(pouch), shade=-0.10)
    cord = (240, 240, 238) if c.is_dark else c.ink
    for x in (-1, 1):
        c.line([(x * 0.042, top + 0.06), (x * 0.046, top + 0.19)], 0.010, cord)
    _rib(c, bottom - 0.052, 0.052, 0.174 * wide)


def blazer(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a blazer: lapels, two buttons, flap pockets, a cutaway hem."""
    sleeves(c, (0.178 * wide, top + 0.03), (0.158 * wide, top + 0.18), 0.45, 0.075, angle=0.2)
    _torso(c, top, bottom, 0.178 * wide, 0.158 * wide, 0.140 * wide, 0.172 * wide)
    c.panel([(-0.028, bottom + 0.012), (0.028, bottom + 0.012), (0.0, bottom - 0.085)], colour=c.wall, edge=False)
    c.line([(-0.03, bottom), (0.0, bottom - 0.085), (0.03, bottom)], 0.006)
    _lapels(c, top, top + 0.30, 0.066, 0.108)
    c.line([(0.0, top + 0.30), (0.0, bottom - 0.08)], 0.007)
    for number in range(2):
        c.dot((0.013, top + 0.335 + number * 0.075), 0.012)
    for x in (-1, 1):
        c.panel(
            [
                (x * 0.055, bottom - 0.17),
                (x * 0.130 * wide, bottom - 0.178),
                (x * 0.130 * wide, bottom - 0.142),
                (x * 0.055, bottom - 0.134),
            ],
            shade=-0.26,
        )
    c.panel([(0.062, top + 0.17), (0.115, top + 0.163), (0.115, top + 0.183), (0.062, top + 0.19)], shade=0.35)


def bomber(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a bomber jacket: smooth round body, ribbed collar, cuffs and hem, one bright zip."""
    sleeves(c, (0.185 * wide, top + 0.035), (0.165 * wide, top + 0.20), 0.43, 0.085, angle=0.27, cuff=0.055, puff=0.035)
    outline = [
        (0.07, top - 0.01),
        (0.07, top - 0.01),
        (0.185 * wide, top + 0.035),
        (0.180 * wide, top + 0.16),
        (0.190 * wide, top + 0.32),
        (0.188 * wide, bottom - 0.07),
        (0.145 * wide, bottom - 0.03),
    ]
    c.panel(smooth(both_sides(outline)))
    _rib(c, bottom - 0.058, 0.062, 0.150 * wide, shade=-0.45)
    neck = [(-0.085, top + 0.022), (-0.062, top - 0.035), (0.062, top - 0.035), (0.085, top + 0.022), (0.0, top + 0.05)]
    c.panel(smooth(neck, 1), shade=-0.45)
    c.line([(0.0, top + 0.04), (0.0, bottom)], 0.020, (60, 60, 64))
    c.line([(0.0, top + 0.04), (0.0, bottom)], 0.010, (214, 214, 218))
    for x in (-1, 1):
        c.line([(x * 0.085, bottom - 0.11), (x * 0.125, bottom - 0.20)], 0.014)


def puffer(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a puffer jacket: stacked bulging tubes from collar to hem, each lit from above."""
    sleeves(c, (0.155 * wide, top + 0.02), (0.165 * wide, top + 0.23), 0.44, 0.11, angle=0.24, puff=0.05, tubes=6)
    count = 7
    start, step = top + 0.005, (bottom - top - 0.005) / count
    for number in range(count):
        y = start + number * step
        half = (0.162 if number == 0 else 0.192) * wide
        tube = [
            (half * 0.93, y),
            (half * 1.03, y + step * 0.3),
            (half * 1.03, y + step * 0.72),
            (half * 0.93, y + step),
        ]
        c.panel(smooth(both_sides([tube[0], *tube, tube[-1]]), 1), shade=-0.02)
        c.panel(both_sides([(half * 0.9, y + step * 0.10), (half * 0.96, y + step * 0.34)]), shade=0.30, edge=False)
        c.panel(both_sides([(half * 0.98, y + step * 0.76), (half * 0.93, y + step * 0.98)]), shade=-0.36, edge=False)
    for number, half in enumerate((0.078, 0.088)):
        y = top - 0.065 + number * 0.036
        c.panel(smooth(both_sides([(half, y), (half * 1.1, y + 0.02), (half, y + 0.04)]), 1), shade=-0.16)
    c.line([(0.0, top - 0.06), (0.0, bottom)], 0.012)


def denim_jacket(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a denim jacket: chest pockets with flaps, contrast stitching, metal buttons, a waistband."""
    stitch = (208, 150, 72)
    sleeves(c, (0.18 * wide, top + 0.035), (0.16 * wide, top + 0.18), 0.43, 0.085, angle=0.25, cuff=0.045)
    _torso(c, top, bottom - 0.03, 0.18 * wide, 0.165 * wide, 0.158 * wide, 0.155 * wide)
    c.line([(-0.165 * wide, top + 0.135), (0.165 * wide, top + 0.135)], 0.007, stitch)
    for x in (-1, 1):
        c.panel(
            [(x * 0.045, top + 0.14), (x * 0.12, top + 0.14), (x * 0.116, top + 0.245), (x * 0.049, top + 0.245)],
            shade=-0.12,
        )
        c.panel(
            [
                (x * 0.042, top + 0.132),
                (x * 0.123, top + 0.132),
                (x * 0.123, top + 0.165),
                (x * 0.082, top + 0.185),
                (x * 0.042, top + 0.165),
            ],
            shade=-0.32,
        )
        for near, far in ((0.052, 0.062), (0.11, 0.098)):
            c.line([(x * near, top + 0.25), (x * far, bottom - 0.05)], 0.006, stitch)
        c.dot((x * 0.082, top + 0.168), 0.009, (222, 214, 196))
    c.panel(
        [
            (-0.157 * wide, bottom - 0.05),
            (0.157 * wide, bottom - 0.05),
            (0.155 * wide, bottom),
            (-0.155 * wide, bottom),
        ],
        shade=-0.22,
    )
    c.panel([(-0.02, top + 0.05), (0.02, top + 0.05), (0.02, bottom), (-0.02, bottom)], shade=0.08)
    for number in range(6):
        c.dot((0.0, top + 0.085 + number * (bottom - top - 0.11) / 5), 0.011, (222, 214, 196))
    collar(c, top, 0.075, 0.085)


def trench(c: Canvas, item: DemoProduct, top: float, bottom: float, wide: float) -> None:
    """Draw a trench coat: long, belted, two rows of buttons, wide lapels, shoulder flaps."""
    sleeves(c, (0.135 * wide, top + 0.028), (0.122 * wide, top + 0.14), 0.37, 0.068, angle=0.22, cuff=0.035)
    outline = [
        (0.05, top - 0.01),
        (0.05, top - 0.01),
        (0.135 * wide, top + 0.028),
        (0.135 * wide, top + 0.028),
        (0.122 * wide, top + 0.15),
        (0.102 * wide, top + 0.315),
        (0.102 * wide, top + 0.33),
        (0.150 * wide, top + 0.50),
        (0.185 * wide, bottom),
        (0.185 * wide, bottom),
        (0.09, bottom + 0.008),
    ]
    c.panel(smooth(both_sides(outline)))
    c.line([(0.035, top + 0.20), (0.035, bottom)], 0.006)
    _lapels(c, top, top + 0.20, 0.052, 0.098)
    for number in range(3):
        for x in (-0.038, 0.062):
            c.dot((x, top + 0.235 + number * 0.115 + (0.06 if number else 0)), 0.010)
    waist = top + 0.322
    half = 0.108 * wide
    c.panel([(-half, waist - 0.02), (half, waist - 0.02), (half, waist + 0.022), (-half, waist + 0.022)], shade=-0.42)
    c.panel(
        [(-0.026, waist - 0.028), (0.026, waist - 0.028), (0.026, waist + 0.03), (-0.026, waist + 0.03)],
        colour=(196, 168, 116),
    )
    for x in (-1, 1):
        c.line([(x * 0.075, waist + 0.08), (x * 0.105, waist + 0.17)], 0.012)
