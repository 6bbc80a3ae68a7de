"""The words of a catalog: what products are called, and the nouns by which shoppers ask for a category."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.evaluate.colours import without_colours

PHRASE_WORDS = 12
"""A title is short; of a description that stands for one, so many words are taken."""

TYPE_WORDS = 3
"""So many words name a type: `knit midi dress`."""

TYPE_PRODUCTS = 5
"""A word that fewer products share is a brand or a model's name, and no part of a type."""

_WITHIN = " › "
_WORD = re.compile(r"[^\W\d_]+(?:[-'’&][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.!?;:\n•|]\s|[\n•|]")
_STOP_WORDS = frozenset(
    word
    for line in (
        "a an and are as at be but by for from has have in into is it its new of off on or our over plus s she size",
        "that the their this to too under up we with without you your women women's women’s",
        "womens men men's men’s mens",
    )
    for word in line.split()
)


def words_of(text: str) -> list[str]:
    """Lowercase words of a text, in order; what is joined by a hyphen or an apostrophe is one."""
    return _WORD.findall(text.lower())


def phrase_of(title: str | None, description: str | None) -> str:
    """What a product is called: its title, or else the beginning of its description; empty where it has neither."""
    if title and title.strip():
        return " ".join(title.split())
    first = _SENTENCE_END.split((description or "").strip(), maxsplit=1)[0]
    return " ".join(first.split()[:PHRASE_WORDS])


def frequencies(phrases: Iterable[str]) -> Counter[str]:
    """In how many phrases each word is."""
    counts: Counter[str] = Counter()
    for phrase in phrases:
        counts.update(set(words_of(phrase)))
    return counts


def attributes_of(phrase: str, counts: Counter[str], nouns: frozenset[str]) -> list[str]:
    """Words of a phrase that say what kind of thing it is, in order: no nouns, no function words, no names.

    Args:
        phrase: of a product.
        counts: `frequencies` of the catalog; a word that no second product has is taken for a name.
        nouns: words by which categories are asked for.
    """
    words = dict.fromkeys(words_of(phrase))
    return [word for word in words if word not in nouns and word not in _STOP_WORDS and counts[word] > 1]


def type_of(phrase: str, counts: Counter[str]) -> str | None:
    """The type that a phrase names: its last `TYPE_WORDS` words without colours, names and function words.

    `black knit midi dress` is a `knit midi dress`. None where nothing is left.
    """
    words = [
        word for word in words_of(without_colours(phrase)) if word not in _STOP_WORDS and counts[word] >= TYPE_PRODUCTS
    ]
    return " ".join(words[-TYPE_WORDS:]) or None


def qualified(broad: str | None, fine: str) -> str:
    """The name of a fine category that several broad ones have: `Women Tops › Jackets`."""
    return f"{broad}{_WITHIN}{fine}"


def spoken(category: str) -> str:
    """A category's name as words: `dresses/casual_and_day_dresses` is `casual and day dresses`."""
    names = [name.rsplit("/", 1)[-1] for name in category.split(_WITHIN)]
    return " ".join(" ".join(names).replace("_", " ").split()).lower()


def noun_of(category: str, phrases: Sequence[str]) -> str:
    """The words by which a shopper asks for one thing of a category: `dress` for `dresses`.

    Of the name's last word, singular and plural, the form is taken that more of the category's products are called by.
    """
    *before, last = spoken(category).split() or [category]
    counts = frequencies(phrases)
    forms = _forms(last)
    return " ".join([*before, max(forms, key=lambda form: (counts[form], -forms.index(form)))])


def _forms(word: str) -> list[str]:
    """A word, and what may be its singular."""
    forms = [word]
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    if word.endswith("es"):
        forms.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        forms.append(word[:-1])
    return forms
