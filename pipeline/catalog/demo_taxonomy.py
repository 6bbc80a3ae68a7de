"""The demo catalog's vocabulary of things: broad and fine categories, colours, and what each garment may have."""

from __future__ import annotations

from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (36, 36, 40),
    "white": (246, 245, 242),
    "grey": (140, 143, 149),
    "beige": (215, 191, 152),
    "brown": (113, 70, 42),
    "red": (202, 34, 44),
    "pink": (241, 152, 184),
    "orange": (238, 124, 34),
    "yellow": (247, 210, 62),
    "green": (48, 142, 74),
    "teal": (24, 146, 150),
    "blue": (56, 114, 216),
    "navy": (30, 44, 104),
    "purple": (124, 64, 164),
}
PATTERNS = ("plain", "striped", "dotted", "checked", "floral", "two-tone")


@dataclass(frozen=True, slots=True)
class Garment:
    """What garments of a fine category may have.

    Attributes:
        broad: the broad category.
        price: the middle of their prices.
        sleeves: sleeve lengths they come in.
        necklines: necklines they come in.
        never: patterns they never have.
        synonyms: other names shops give them.
    """

    broad: str
    price: float
    sleeves: tuple[str, ...] = ("none",)
    necklines: tuple[str, ...] = ("none",)
    never: tuple[str, ...] = ()
    synonyms: tuple[str, ...] = ()


_ANY_SLEEVE = ("none", "short", "long")
_ANY_NECK = ("round", "v", "square")
_LONG = ("long",)

FINE: dict[str, Garment] = {
    "mini dress": Garment("dresses", 59, _ANY_SLEEVE, _ANY_NECK, synonyms=("short dress",)),
    "midi dress": Garment("dresses", 79, _ANY_SLEEVE, _ANY_NECK, synonyms=("knee-length dress",)),
    "maxi dress": Garment("dresses", 99, _ANY_SLEEVE, _ANY_NECK, synonyms=("full-length dress",)),
    "shirt dress": Garment("dresses", 85, ("short", "long"), synonyms=("button-through dress",)),
    "wrap dress": Garment("dresses", 89, ("short", "long"), synonyms=("tie-waist dress",)),
    "blazer": Garment("jackets", 129, _LONG, never=("floral",), synonyms=("tailored jacket", "suit jacket")),
    "bomber jacket": Garment("jackets", 109, _LONG, never=("checked",), synonyms=("bomber", "flight jacket")),
    "puffer jacket": Garment("jackets", 149, _LONG, never=("striped", "checked"), synonyms=("padded jacket", "puffer")),
    "denim jacket": Garment("jackets", 95, _LONG, never=("checked", "striped"), synonyms=("jean jacket",)),
    "trench coat": Garment("jackets", 179, _LONG, never=("floral",), synonyms=("trench", "belted coat")),
    "jeans": Garment("pants", 79, never=("checked",), synonyms=("denim pants", "five-pocket jeans")),
    "leggings": Garment("pants", 39, synonyms=("stretch tights",)),
    "wide-leg pants": Garment("pants", 75, synonyms=("palazzo pants", "wide-leg trousers")),
    "cargo pants": Garment("pants", 69, synonyms=("utility pants", "cargo trousers")),
    "shorts": Garment("pants", 45, synonyms=("short pants",)),
    "mini skirt": Garment("skirts", 45, synonyms=("short skirt",)),
    "maxi skirt": Garment("skirts", 69, synonyms=("long skirt",)),
    "pencil skirt": Garment("skirts", 59, synonyms=("fitted skirt",)),
    "pleated skirt": Garment("skirts", 65, never=("checked",), synonyms=("knife-pleat skirt",)),
    "tulle skirt": Garment("skirts", 75, never=("checked", "striped"), synonyms=("layered net skirt",)),
    "t-shirt": Garment("tops", 25, ("short",), ("round", "v"), synonyms=("tee", "crew tee")),
    "tank top": Garment("tops", 22, ("none",), ("round", "square"), synonyms=("vest top", "sleeveless top")),
    "blouse": Garment("tops", 55, ("short", "long"), synonyms=("button-up shirt",)),
    "sweater": Garment("tops", 69, _LONG, ("round", "v", "high"), synonyms=("jumper", "pullover")),
    "hoodie": Garment("tops", 65, _LONG, synonyms=("hooded sweatshirt",)),
}
FINE_TO_BROAD = {fine: garment.broad for fine, garment in FINE.items()}
BROAD = tuple(dict.fromkeys(FINE_TO_BROAD.values()))
