"""The demo catalog's ground truth: what each product is, as a pure function of a seed and an index."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from pipeline.catalog.demo_taxonomy import COLOURS, FINE, FINE_TO_BROAD, Garment

TRAIN_SEED = 101
VALIDATION_SEED = 202
TEST_SEED = 303
CATALOG_SEED = 0  # the seed of the catalog that `jobs.demo` draws

MAX_IMAGES = 4
_NEAR_DUPLICATE_SHARE = 0.05
_NEAR_DUPLICATE_REACH = 40  # a near duplicate copies one of this many products before it
_SIZES = ("XS", "S", "M", "L", "XL")
_PATTERN_WEIGHTS = {"plain": 0.46, "striped": 0.12, "dotted": 0.11, "checked": 0.11, "floral": 0.10, "two-tone": 0.10}
_BRIGHT_SECONDS = ("white", "beige", "yellow", "pink")
_DARK_SECONDS = ("black", "navy", "white", "brown")


@dataclass(frozen=True, slots=True)
class DemoProduct:
    """What a product is, whether or not its text says so.

    Attributes:
        index: its place in the endless catalog of its seed.
        product_id: its key, unique within a seed.
        broad: one of five broad categories.
        fine: one of 25 fine categories.
        colour: the name of its main colour.
        second: the name of the colour of its pattern; unused when plain.
        pattern: plain, striped, dotted, checked, floral or two-tone.
        sleeve: none, short or long.
        neckline: round, v, square or high.
        fit: slim, regular or relaxed: its width.
        length: short, regular or long: its hem, within its fine category.
        size: the size it is sold in.
        price: in the shop's currency.
        n_images: photos of it, 1 to 4.
        look: seed of what varies between garments of equal words (shade of the colour, place of the flowers).
        original: the index of the product whose garment this is; `index` unless this is a near duplicate.
    """

    index: int
    product_id: str
    broad: str
    fine: str
    colour: str
    second: str
    pattern: str
    sleeve: str
    neckline: str
    fit: str
    length: str
    size: str
    price: float
    n_images: int
    look: int
    original: int

    @property
    def is_near_duplicate(self) -> bool:
        """True where the garment is that of an earlier product, in another size or on other photos."""
        return self.original != self.index


def stream(seed: int, index: int, purpose: str) -> random.Random:
    """Give the random numbers of one product for one purpose; independent of every other product's."""
    return random.Random(f"{seed}/{index}/{purpose}")


def product(seed: int, index: int) -> DemoProduct:
    """Describe product `index` of the catalog of `seed`."""
    original = _original(seed, index)
    garment = _garment(seed, original)
    if original == index:
        return garment
    rng = stream(seed, index, "copy")
    return replace(
        garment,
        index=index,
        product_id=_product_id(seed, index),
        size=rng.choice([size for size in _SIZES if size != garment.size]),
        n_images=rng.randint(1, 2),
    )


def held_out_pair(colour: str, fine: str) -> bool:
    """True where no garment of this colour and fine category is ever trained on."""
    return random.Random(f"pair/{colour}/{fine}").random() < 0.05


def is_held_out(item: DemoProduct) -> bool:
    """True where the product's combination of colour, fine category and pattern is kept out of training."""
    if held_out_pair(item.colour, item.fine):
        return True
    return random.Random(f"triple/{item.colour}/{item.fine}/{item.pattern}").random() < 0.06


def _original(seed: int, index: int) -> int:
    """Follow near duplicates back to the product that was first."""
    while index > 0:
        rng = stream(seed, index, "duplicate")
        if rng.random() >= _NEAR_DUPLICATE_SHARE:
            break
        index -= rng.randint(1, min(index, _NEAR_DUPLICATE_REACH))
    return index


def _garment(seed: int, index: int) -> DemoProduct:
    rng = stream(seed, index, "garment")
    fine = rng.choice(tuple(FINE))
    garment = FINE[fine]
    colour = rng.choice(tuple(COLOURS))
    return DemoProduct(
        index=index,
        product_id=_product_id(seed, index),
        broad=FINE_TO_BROAD[fine],
        fine=fine,
        colour=colour,
        second=_second(rng, colour),
        pattern=_pattern(rng, garment),
        sleeve=rng.choice(garment.sleeves),
        neckline=rng.choice(garment.necklines),
        fit=rng.choice(("slim", "regular", "regular", "relaxed")),
        length=rng.choice(("short", "regular", "regular", "long")),
        size=rng.choice(_SIZES),
        price=round(garment.price * rng.uniform(0.6, 1.7)) - 0.05,
        n_images=rng.choice((1, 2, 2, 3, 3, 4)),
        look=rng.randrange(1 << 30),
        original=index,
    )


def _product_id(seed: int, index: int) -> str:
    return f"D{seed:02d}-{index:07d}"


def _pattern(rng: random.Random, garment: Garment) -> str:
    names = [name for name in _PATTERN_WEIGHTS if name not in garment.never]
    return rng.choices(names, [_PATTERN_WEIGHTS[name] for name in names])[0]


def _second(rng: random.Random, colour: str) -> str:
    """Choose a pattern colour that shows on the main one: light on dark, dark on light."""
    red, green, blue = COLOURS[colour]
    is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 125
    return rng.choice([name for name in (_DARK_SECONDS if is_light else _BRIGHT_SECONDS) if name != colour])
