"""Colour words of fashion, and the colour that each names."""

from __future__ import annotations

import re

COLOURS: dict[str, tuple[str, ...]] = {
    "black": ("black", "jet black", "ebony", "onyx"),
    "white": ("white", "off white", "ivory", "ivory white", "snow white", "ecru"),
    "grey": ("grey", "gray", "charcoal", "charcoal grey", "charcoal gray", "slate", "heather grey", "heather gray"),
    "beige": ("beige", "sand", "camel", "taupe", "nude", "cream", "tan", "khaki", "natural"),
    "brown": ("brown", "chocolate", "chestnut", "cognac", "mocha"),
    "red": ("red", "crimson", "scarlet", "burgundy", "maroon", "wine", "bordeaux", "dark red"),
    "pink": ("pink", "rose", "rose pink", "blush", "fuchsia", "magenta", "hot pink", "light pink"),
    "orange": ("orange", "tangerine", "burnt orange", "coral", "rust", "peach"),
    "yellow": ("yellow", "lemon", "mustard", "mustard yellow"),
    "green": ("green", "emerald", "olive", "forest green", "dark green", "light green", "lime", "sage", "mint"),
    "teal": ("teal", "petrol", "turquoise", "aqua"),
    "blue": ("blue", "cobalt", "royal blue", "light blue", "dark blue", "sky blue", "indigo"),
    "navy": ("navy", "navy blue", "midnight", "midnight blue"),
    "purple": ("purple", "violet", "plum", "lilac", "lavender", "mauve", "aubergine"),
    "gold": ("gold", "golden", "rose gold"),
    "silver": ("silver", "metallic"),
    "multicolour": ("multicolour", "multicolor", "multi colour", "multi color", "multicoloured", "multicolored"),
}
"""By colour the words for it. Shades count as the colour that a shopper would file them under.

Words of a phrase may be joined by a hyphen too. A hyphen on the outside makes another word: `red-hot` is no colour.
"""

_COLOUR_OF = {word: colour for colour, words in COLOURS.items() for word in words}
_ANY = re.compile(
    r"(?<![\w-])(?ai:"  # ASCII only: otherwise a dotless i is an i here, but not in the table
    + "|".join(sorted(_COLOUR_OF, key=len, reverse=True)).replace(" ", r"(?:[\s\xa0]+|-)")
    + r")(?![\w-])"
)  # the longest first, so that navy blue is not blue


def colours_of(text: str) -> set[str]:
    """The colours that a text names, as whole words."""
    return {_COLOUR_OF[" ".join(found.lower().replace("-", " ").split())] for found in _ANY.findall(text)}


def without_colours(text: str) -> str:
    """The text without its colour words."""
    while (less := " ".join(_ANY.sub(" ", text).split())) != text:  # `royal red blue` leaves `royal blue`
        text = less
    return text
