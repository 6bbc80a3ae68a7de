"""What demo products are called: titles, descriptions and queries, and which facts each wording states."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipeline.catalog.demo_products import DemoProduct, stream
from pipeline.catalog.demo_taxonomy import FINE

FACTS = ("broad", "fine", "colour", "pattern", "sleeve", "neckline")
"""The facts of a product that a text can state and a picture can show."""

_COLOUR_WORDS = {
    "black": ("jet black", "ebony"),
    "white": ("ivory white", "snow white"),
    "grey": ("gray", "charcoal grey"),
    "beige": ("sand", "camel"),
    "brown": ("chocolate", "chestnut"),
    "red": ("crimson", "scarlet"),
    "pink": ("rose pink", "blush"),
    "orange": ("tangerine", "burnt orange"),
    "yellow": ("lemon", "mustard yellow"),
    "green": ("emerald", "forest green"),
    "teal": ("petrol", "turquoise"),
    "blue": ("cobalt", "royal blue"),
    "navy": ("navy blue", "midnight"),
    "purple": ("violet", "plum"),
}
_BROAD_WORDS = {
    "dresses": ("dress", "dresses"),
    "jackets": ("jacket", "jackets", "outerwear"),
    "pants": ("pants", "trousers"),
    "skirts": ("skirt", "skirts"),
    "tops": ("top", "tops"),
}
_PATTERN_WORDS = {
    "plain": ("plain", "solid", "solid-colour"),
    "striped": ("striped", "stripe"),
    "dotted": ("dotted", "polka dot", "spotted"),
    "checked": ("checked", "plaid", "gingham"),
    "floral": ("floral", "flower print"),
    "two-tone": ("two-tone", "colour-block"),
}
_PATTERN_PHRASES = {
    "plain": ("in one colour", "without any print"),
    "striped": ("with {second} stripes", "with an even stripe"),
    "dotted": ("with {second} dots", "covered in polka dots"),
    "checked": ("in a {second} check", "in a woven check"),
    "floral": ("with a {second} flower print", "scattered with flowers"),
    "two-tone": ("with a {second} lower part", "in two tones"),
}
_SLEEVES = {"none": ("sleeveless",), "short": ("short sleeves",), "long": ("long sleeves",)}
_NECKS = {
    "round": ("a round neck", "a crew neck"),
    "v": ("a v-neck", "a deep v neckline"),
    "square": ("a square neckline",),
    "high": ("a roll neck", "a high neck"),
}
_UNSEEN = (
    "Machine wash at 30 degrees, do not tumble dry.",
    "Made of soft organic cotton.",
    "A blend of recycled polyester and viscose.",
    "Fully lined.",
    "Our model is 178 cm tall and wears size {size}.",
    "Fits true to size.",
    "Take one size up for a looser fit.",
    "Perfect for the office or a weekend in town.",
    "Ideal for summer evenings.",
    "A wardrobe favourite for every season.",
    "Dry clean only.",
    "Made in Portugal.",
    "Free returns within 30 days.",
    "Part of the spring collection.",
    "Easy to dress up or down.",
    "Size {size}.",
    "Wash inside out with similar colours.",
    "Cool iron if needed.",
)
_OPENINGS = ("New in:", "The", "Our", "Classic", "Everyday", "Essential", "Limited edition")
_SYLLABLES = (
    "ma",
    "lo",
    "ven",
    "na",
    "ri",
    "ka",
    "sol",
    "del",
    "bre",
    "tu",
    "qui",
    "fo",
    "xa",
    "jen",
    "wy",
    "hup",
    "zor",
)


@dataclass(frozen=True, slots=True)
class Wording:
    """A text about a product.

    Attributes:
        text: the words.
        states: the names of the facts it states; of everything else it is silent.
    """

    text: str
    states: frozenset[str]


@dataclass(frozen=True, slots=True)
class Listing:
    """How a shop lists a product: its title and description, and the two assembled as the catalog reader does."""

    title: str
    description: str | None
    states: frozenset[str]

    @property
    def wording(self) -> Wording:
        """Title and description as one text."""
        text = self.title if self.description is None else f"{self.title}. {self.description}"
        return Wording(text, self.states)


class _Writer:
    """Words for one product, noting the facts that they state."""

    def __init__(self, item: DemoProduct, rng: random.Random) -> None:
        self._item, self._rng = item, rng
        self.states: set[str] = set()

    def colour(self) -> str:
        self.states.add("colour")
        return self._often(self._item.colour, _COLOUR_WORDS[self._item.colour])

    def fine(self) -> str:
        self.states |= {"fine", "broad"}
        return self._often(self._item.fine, FINE[self._item.fine].synonyms)

    def broad(self) -> str:
        self.states.add("broad")
        return self._rng.choice(_BROAD_WORDS[self._item.broad])

    def pattern(self) -> str:
        self.states.add("pattern")
        return self._rng.choice(_PATTERN_WORDS[self._item.pattern])

    def pattern_phrase(self) -> str:
        self.states.add("pattern")
        return self._rng.choice(_PATTERN_PHRASES[self._item.pattern]).format(second=self._item.second)

    def cut(self) -> str | None:
        """Say sleeves and neckline, where they are worth saying."""
        parts: list[str] = []
        if self._item.broad in ("dresses", "tops"):
            self.states.add("sleeve")
            parts.append(self._rng.choice(_SLEEVES[self._item.sleeve]))
        if self._item.neckline in _NECKS:
            self.states.add("neckline")
            parts.append(self._rng.choice(_NECKS[self._item.neckline]))
        return " and ".join(parts) if parts else None

    def _often(self, usual: str, others: tuple[str, ...]) -> str:
        return usual if self._rng.random() < 0.8 else self._rng.choice(others)


def listing(item: DemoProduct, rng: random.Random) -> Listing:
    """Write a title and a description; most state colour and category, many leave out the rest."""
    words = _Writer(item, rng)
    title = _title(words, rng)
    description = None if rng.random() < 0.06 else _description(words, item, rng)
    return Listing(title, description, frozenset(words.states))


def catalog_listing(seed: int, item: DemoProduct) -> Listing:
    """The listing under which the catalog of `seed` has the product."""
    return listing(item, stream(seed, item.index, "listing"))


def short_wording(item: DemoProduct, rng: random.Random) -> Wording:
    """Write what a person would type to find the product."""
    words = _Writer(item, rng)
    choice = rng.random()
    if choice < 0.34:
        text = f"{words.colour()} {words.fine()}"
    elif choice < 0.48:
        text = f"{words.colour()} {words.broad()}"
    elif choice < 0.60:
        text = f"{words.colour()} {words.pattern()} {words.fine()}"
    elif choice < 0.68:
        text = f"{words.pattern()} {words.fine()}"
    elif choice < 0.76:
        text = f"{words.fine()} in {words.colour()}"
    elif choice < 0.84:
        text = f"{words.colour()} {words.fine()} {words.pattern_phrase()}"
    elif choice < 0.92:
        text = words.fine()
    elif choice < 0.96:
        text = words.broad()
    else:
        text = words.colour()
    return Wording(text, frozenset(words.states))


def training_wordings(item: DemoProduct, rng: random.Random) -> tuple[Wording, Wording]:
    """Write two wordings of one product: its listing, and a query or a second listing; in either order."""
    first = listing(item, rng).wording
    second = short_wording(item, rng) if rng.random() < 0.75 else listing(item, rng).wording
    return (first, second) if rng.random() < 0.5 else (second, first)


def _title(words: _Writer, rng: random.Random) -> str:
    choice = rng.random()
    if choice < 0.36:
        title = f"{words.colour()} {words.fine()}"
    elif choice < 0.52:
        title = f"{words.fine()} in {words.colour()}"
    elif choice < 0.66:
        title = f"{words.pattern()} {words.fine()} in {words.colour()}"
    elif choice < 0.80:
        title = f"{words.colour()} {words.pattern()} {words.fine()}"
    elif choice < 0.90:
        title = f"{words.pattern()} {words.fine()}"
    else:
        title = words.fine()
    if rng.random() < 0.25:
        title = f"{''.join(rng.choices(_SYLLABLES, k=rng.randint(2, 3)))} {title}"
    return title[0].upper() + title[1:]


def _description(words: _Writer, item: DemoProduct, rng: random.Random) -> str:
    sentences: list[str] = []
    if "colour" not in words.states and rng.random() < 0.75:
        sentences.append(f"{rng.choice(_OPENINGS)} {words.fine()} in {words.colour()}.")
    elif rng.random() < 0.35:
        opening = rng.choice(_OPENINGS)
        sentences.append(f"{opening} {words.broad()} {words.pattern_phrase()}.")
    if rng.random() < 0.40:
        cut = words.cut()
        if cut:
            sentences.append(f"{cut[0].upper()}{cut[1:]}.")
    unseen = rng.sample(_UNSEEN, k=rng.choice((1, 1, 2, 3)))
    sentences += [line.format(size=item.size) for line in unseen]
    if rng.random() < 0.3:
        rng.shuffle(sentences)
    return " ".join(sentences)
