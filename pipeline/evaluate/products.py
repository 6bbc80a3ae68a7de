"""The products of a release as an evaluation sees them: keys, names, categories, and vectors a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluate.vocabulary import frequencies, phrase_of, qualified, type_of
from pipeline.store.tables import Database

FINE = ("category", "type")
"""How "fine" is defined: the catalog's own `fine_category`, or the type that a product's title or description names."""

_BLOCK_ROWS = 4096
_SLICE = 10_000
_BLOCKS_AHEAD = 1  # Lance's own default reads 16 batches ahead, a gigabyte of vectors
_READ_AHEAD_BYTES = 67_108_864  # and keeps 2 GB of a file's pages


@dataclass(frozen=True)
class Labels:
    """A category of each product.

    Attributes:
        names: of the categories, sorted.
        codes: int32 (N,), place of each product's category in `names`; -1 where it has none.
    """

    names: tuple[str, ...]
    codes: npt.NDArray[np.int32]

    @cached_property
    def code_of(self) -> dict[str, int]:
        """Place of each name."""
        return {name: code for code, name in enumerate(self.names)}

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """int64 (categories,), how many products each has."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names)).astype(np.int64)

    def name(self, place: int) -> str | None:
        """Category of the product at a place."""
        code = int(self.codes[place])
        return self.names[code] if code >= 0 else None


@dataclass(frozen=True)
class Products:
    """All products of one version of the table, in order of product_id; a product's place is its row here.

    Attributes:
        ids: string (N,), sorted.
        phrases: large_string (N,), what each is called, empty where it has no text.
        texts: large_string (N,), title and description, for what else a text holds.
    """

    ids: pa.Array
    phrases: pa.Array
    texts: pa.Array
    levels: dict[str, Labels]
    """`broad` and `fine`. A fine category of several broad ones, as men's and women's jackets, counts as several."""

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, ids: Any) -> npt.NDArray[np.int32]:
        """int32 (n,), place of each id; -1 where there is no such product."""
        found = pc.index_in(pa.array(ids, pa.string()) if isinstance(ids, list) else ids, value_set=self.ids)
        places: npt.NDArray[np.int32] = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int32)
        return places

    def subset(self, kept: npt.NDArray[np.bool_]) -> Products:
        """Only the products at the places that are kept, bool (N,), with the same categories."""
        levels = {level: Labels(labels.names, labels.codes[kept]) for level, labels in self.levels.items()}
        mask = pa.array(kept)
        return Products(self.ids.filter(mask), self.phrases.filter(mask), self.texts.filter(mask), levels)

    def each(self, column: str) -> Iterator[str]:
        """`phrases` or `texts` in order, a slice at a time: as Python's strings all of them may not fit into memory."""
        values = getattr(self, column)
        for at in range(0, len(values), _SLICE):
            yield from values.slice(at, _SLICE).to_pylist()


@dataclass(frozen=True)
class Block:
    """Some rows' vectors.

    Attributes:
        places: int32 (n,).
        vectors: float32 (n, D) by mode, of unit length where present.
        present: bool (n,) by mode.
    """

    places: npt.NDArray[np.int32]
    vectors: dict[str, npt.NDArray[np.float32]]
    present: dict[str, npt.NDArray[np.bool_]]


def read_products(db: Database, version: int, *, fine: str = "category") -> Products:
    """Read everything but the vectors.

    Args:
        db: the database.
        version: of the table `products`.
        fine: one of `FINE`.
    """
    names = ["product_id", "title", "description", "broad_category", "fine_category"]
    table = db.dataset("products", version).to_table(columns=names)
    # Sorting puts a column into one piece, and all descriptions of a large shop are more than 2 GB.
    table = table.cast(pa.schema([(name, pa.large_string()) for name in names])).sort_by("product_id")
    phrases = pa.concat_arrays([pa.array([], pa.large_string()), *_phrases(table)])
    texts = pc.binary_join_element_wise(
        *(pc.fill_null(table[name], "") for name in ("title", "description")), pa.scalar(" ", pa.large_string())
    )
    broad = [value or None for value in table["broad_category"].to_pylist()]
    if fine == "type":
        counts = frequencies(phrase.as_py() for phrase in phrases)
        kinds = [type_of(phrase.as_py(), counts) for phrase in phrases]
    else:
        kinds = _nested(broad, [value or None for value in table["fine_category"].to_pylist()])
    return Products(
        _whole(table["product_id"]).cast(pa.string()),
        phrases,
        _whole(texts),
        {"broad": labels(broad), "fine": labels(kinds)},
    )


def _phrases(table: pa.Table) -> Iterator[pa.Array]:
    """What the products are called, a slice at a time."""
    for batch in table.select(["title", "description"]).to_batches(max_chunksize=_SLICE):
        pairs = zip(batch["title"].to_pylist(), batch["description"].to_pylist(), strict=True)
        yield pa.array([phrase_of(*pair) for pair in pairs], pa.large_string())


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return pa.concat_arrays([pa.array([], column.type), *column.chunks])


def _nested(broad: Sequence[str | None], fine: Sequence[str | None]) -> list[str | None]:
    """Fine categories, with their broad one's name before those names that several broad ones have."""
    above: dict[str, set[str | None]] = {}
    for upper, name in zip(broad, fine, strict=True):
        if name is not None:
            above.setdefault(name, set()).add(upper)
    return [
        qualified(upper, name) if name is not None and len(above[name]) > 1 else name
        for upper, name in zip(broad, fine, strict=True)
    ]


def labels(values: Sequence[str | None]) -> Labels:
    """Categories as codes."""
    names = tuple(sorted({value for value in values if value is not None}))
    code_of = {name: code for code, name in enumerate(names)}
    return Labels(names, np.array([-1 if value is None else code_of[value] for value in values], np.int32))


def read_blocks(db: Database, version: int, products: Products, modes: Sequence[str]) -> Iterator[Block]:
    """The vectors of all products, a block of rows at a time, in the order of the table; memory is bounded.

    Args:
        db: the database.
        version: of the table `products`, the one that `products` was read from.
        products: of any version: rows of products that it does not have are left out.
        modes: whose vectors are read.
    """
    names = [f"{mode}_vector" for mode in modes]
    scanner = db.dataset("products", version).scanner(
        columns=["product_id", *names],
        batch_size=_BLOCK_ROWS,
        batch_readahead=_BLOCKS_AHEAD,
        io_buffer_size=_READ_AHEAD_BYTES,
        scan_in_order=True,
    )
    for batch in scanner.to_batches():
        places = products.places(batch.column("product_id"))
        known = places >= 0
        vectors, present = {}, {}
        for mode, name in zip(modes, names, strict=True):
            column = batch.column(name)
            matrix = column.values.to_numpy(zero_copy_only=False).reshape(-1, column.type.list_size)
            matrix = matrix[column.offset : column.offset + len(column)]
            vectors[mode] = matrix if known.all() else matrix[known]
            present[mode] = column.is_valid().to_numpy(zero_copy_only=False)[known]
        yield Block(places[known], vectors, present)
