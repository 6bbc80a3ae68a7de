"""Queries of a catalog, drawn from a seed by a stated recipe: what shoppers might ask, and what would answer it."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from pipeline.errors import QueryError
from pipeline.evaluate.products import Products
from pipeline.evaluate.vocabulary import attributes_of, frequencies, noun_of, spoken, words_of

RECIPES: Mapping[str, str] = {
    "article": "one to three attributes of a random product and the noun of its broad category, as in `red dress` and "
    "`multicolor henley t-shirt dress`; fine is the product's own",
    "attribute": "one attribute of a random product and the name of its fine category",
    "broad": "every broad category's name",
    "fine": "every fine category's name",
    "description": "the description of a random product, or its title where it has none",
}
"""The recipes, and what they draw.

`article` is our reading of the published experiment, which does not print its recipe. It gives the queries `red dress`
and `multicolor henley t-shirt dress`: attributes in the order of Fashion200k's descriptions, then a category's noun.
Its fine precision is 0.23 at a broad precision of 0.90, a quarter of the hits within the right broad category. On the
4,810 products of real label text at hand whose path is known, a product drawn at random within the right broad
category is of the right sub-category 0.18 of the time. So the queries say little about the sub-category that they are
scored by, which attributes and a noun do not, and whole descriptions or the names of sub-categories would. Hence: fine
is the sub-category of the product that the query was drawn from, and the query need not name it.
"""

_MOST_ATTRIBUTES = 3
_DESCRIPTION_WORDS = 40
_TURNS = 8  # so often each product may be drawn from until there are enough different queries


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and what is relevant to it.

    Attributes:
        query_id: `q0001`, or the user's own.
        text: what is searched for.
        recipe: how it came to be: one of `RECIPES`, or `file`.
        broad: the broad category that is relevant; None: not asked for.
        fine: the fine category.
        source: the product that it was drawn from, which is left out of its results.
        judged: grades from 0 by product_id, where somebody judged; None: nobody did.
        is_own_text_only: whether only the source's own text holds all its words.
    """

    query_id: str
    text: str
    recipe: str
    broad: str | None = None
    fine: str | None = None
    source: str | None = None
    judged: Mapping[str, int] | None = None
    is_own_text_only: bool = False

    @property
    def asked(self) -> str:
        """The categories that are relevant, for people."""
        return " › ".join(dict.fromkeys(spoken(name) for name in (self.broad, self.fine) if name))


def draw_queries(products: Products, recipe: str, *, count: int, seed: int) -> list[Query]:
    """Draw different queries; the same catalog, recipe, count and seed always give the same ones.

    Args:
        products: with broad categories, and fine ones where the recipe needs them.
        recipe: one of `RECIPES`.
        count: how many; fewer come where the catalog does not have as many different ones.
        seed: of the draw.

    Raises:
        QueryError: the catalog has no categories, or none of its products a text that the recipe could use.
    """
    if recipe not in RECIPES:
        raise QueryError(f"There is no recipe {recipe!r} for queries; there are {', '.join(RECIPES)}.")
    if not products.levels["broad"].names:
        raise QueryError(
            "No product has a broad_category, so nothing says which hits are relevant: map the catalog's column with "
            "columns.broad_category, or bring judgements with --queries and --qrels."
        )
    if recipe in ("broad", "fine"):
        drawn = _named(products, recipe)
    else:
        drawn = _from_products(products, recipe, count, random.Random(f"{recipe} {seed}"))
    queries = [dataclasses.replace(query, query_id=f"q{i:05d}") for i, query in enumerate(drawn[:count])]
    if not queries:
        raise QueryError(
            f"No query could be drawn by the recipe {recipe!r}: no product has both a category and a text."
        )
    return with_own_text(queries, products)


def _named(products: Products, level: str) -> list[Query]:
    """The names of the categories of a level; a fine one is asked for with its commonest broad one."""
    broad, labels = products.levels["broad"], products.levels[level]
    if level == "broad":
        return [Query("", spoken(name), "broad", broad=name) for name in labels.names]
    above: dict[int, Counter[int]] = {}
    for upper, code in zip(broad.codes.tolist(), labels.codes.tolist(), strict=True):
        if code >= 0 and upper >= 0:
            above.setdefault(code, Counter())[upper] += 1
    return [
        Query("", spoken(labels.names[code]), "fine", broad=broad.names[min(over, key=lambda c: (-over[c], c))],
              fine=labels.names[code])
        for code, over in sorted(above.items())
    ]  # fmt: skip


def _from_products(products: Products, recipe: str, count: int, rng: random.Random) -> list[Query]:
    """Queries of products drawn at random, none of them twice."""
    counts = frequencies(products.each("phrases"))
    nouns = _nouns(products)
    common = frozenset(word for noun in nouns for word in noun.split())
    common |= {word for name in products.levels["broad"].names for word in words_of(spoken(name))}
    drawn: dict[str, Query] = {}
    for place in _shuffled(products, rng):
        if len(drawn) >= count:
            break
        broad, fine = (products.levels[level].name(place) for level in ("broad", "fine"))
        if broad is None:
            continue
        if recipe == "description":
            words = products.texts[place].as_py().split()[:_DESCRIPTION_WORDS]
        else:
            words = attributes_of(products.phrases[place].as_py(), counts, common)
            most = _MOST_ATTRIBUTES if recipe == "article" else 1
            chosen = sorted(rng.sample(range(len(words)), min(len(words), rng.randint(1, most))))
            name = nouns[int(products.levels["broad"].codes[place])] if recipe == "article" else spoken(fine or broad)
            words = [*(word for word in (words[i] for i in chosen) if word not in name.split()), name] if chosen else []
        text = " ".join(words)
        if text and text not in drawn:
            drawn[text] = Query("", text, recipe, broad, fine, products.ids[place].as_py())
    return list(drawn.values())


def _shuffled(products: Products, rng: random.Random) -> Iterator[int]:
    """Places of products in random order, and again in another one, some times."""
    for _ in range(_TURNS):
        order = list(range(len(products)))
        rng.shuffle(order)
        yield from order


def _nouns(products: Products) -> list[str]:
    """How shoppers ask for one thing of each broad category."""
    broad = products.levels["broad"]
    phrases: list[list[str]] = [[] for _ in broad.names]
    for code, phrase in zip(broad.codes.tolist(), products.each("phrases"), strict=True):
        if code >= 0:
            phrases[code].append(phrase)
    return [noun_of(name, called) for name, called in zip(broad.names, phrases, strict=True)]


def with_own_text(queries: Sequence[Query], products: Products) -> list[Query]:
    """The queries, with those marked whose words only their own source's text holds."""
    needed = [frozenset(words_of(query.text)) if query.source is not None else frozenset() for query in queries]
    holders: dict[str, array[int]] = {word: array("i") for words in needed for word in words}
    for place, text in enumerate(products.each("texts")):
        for word in set(words_of(text)) & holders.keys():
            holders[word].append(place)

    def is_alone(words: frozenset[str]) -> bool:
        rarest, *others = sorted((np.array(holders[word]) for word in words), key=len)
        return len(reduce(lambda found, more: np.intersect1d(found, more, assume_unique=True), others, rarest)) <= 1

    return [
        dataclasses.replace(query, is_own_text_only=bool(words) and is_alone(words))
        for query, words in zip(queries, needed, strict=True)
    ]
