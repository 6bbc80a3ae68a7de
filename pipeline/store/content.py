"""One streamed look at the rows of `products` and `images`: what is in them, and what may not be."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.store.tables import READ_AHEAD_BYTES

UNIT_TOLERANCE = 1e-3
_BATCH_ROWS = 4096
_EXAMPLES = 3

Hashes = npt.NDArray[np.int64]


def content_digest(products: pa.Table) -> int:
    """A number that is the same for the same products in any order: the sum of their rows' hashes, vectors left out.

    Vectors follow from the hashes, the fingerprint and the average weight, which a release records apart.
    """
    left_out = ("text_vector", "image_vector", "avg_vector", "partition")
    names = [name for name in products.schema.names if name not in left_out]
    total = 0
    for batch in products.select(names).to_batches(max_chunksize=8192):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            total += int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=16).digest(), "little")
    return total % (1 << 128)


@dataclass
class Faults:
    """What is wrong with rows: how many of each kind, and the first of them by name."""

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, names: pa.Array, is_wrong: npt.NDArray[np.bool_]) -> None:
        """Note the rows where the mask is true."""
        wrong = np.flatnonzero(is_wrong)
        if len(wrong):
            self.counts[kind] += len(wrong)
            missing = _EXAMPLES - len(self.examples[kind])
            self.examples[kind] += [str(name) for name in names.take(pa.array(wrong[:missing])).to_pylist()]

    def sentences(self) -> list[str]:
        """`3 rows of products: no avg_vector (p1, p2, p3)`, one for each kind."""
        return [f"{count:,} rows of {kind} ({', '.join(self.examples[kind])})" for kind, count in self.counts.items()]


@dataclass(frozen=True)
class Products:
    """The products' keys and counts, one value a row.

    Attributes:
        ids: hashes of the product ids.
        n_images: as each row says.
        texts: rows with text.
        vectors: how many vectors each vector column holds.
        content: `content_digest` of the rows.
    """

    ids: Hashes
    n_images: npt.NDArray[np.int64]
    texts: int
    vectors: dict[str, int]
    content: int


def scan_products(dataset: Any, faults: Faults, before: Any = None, content: int = 0) -> Products:
    """Read all products but their partitions, a few thousand rows at a time.

    Args:
        dataset: the table's version.
        faults: told of what is wrong.
        before: a version that was verified: of rows that were in it only keys and counts are read again.
        content: `content_digest` of that version.
    """
    ids: list[Hashes] = [np.zeros(0, np.int64)]
    n_images: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    texts = 0
    for batch in _batches(dataset, ["product_id", "n_images", "has_text"]):
        ids.append(hashes(batch["product_id"]))
        n_images.append(_ints(batch["n_images"]))
        texts += int(_bools(batch["has_text"]).sum())
    counts = np.concatenate(n_images)
    vectors = {"text_vector": texts, "image_vector": int((counts > 0).sum()), "avg_vector": len(counts)}
    for batch in _batches(
        dataset, [n for n in dataset.schema.names if n != "partition"], _new_fragments(dataset, before)
    ):
        names = batch["product_id"]
        images, has_text = _ints(batch["n_images"]), _bools(batch["has_text"])
        content += content_digest(pa.Table.from_batches([batch]))
        present = {name: _bools(pc.is_valid(batch[name])) for name in vectors}
        for name in present:
            check_vectors(batch[name], names, faults, f"products: {name} is not a unit vector")
        faults.add("products: no avg_vector", names, ~present["avg_vector"])
        faults.add("products: has_text and text_vector disagree", names, has_text != present["text_vector"])
        faults.add("products: n_images and image_vector disagree", names, (images > 0) != present["image_vector"])
        hashed = _ints(pc.list_value_length(batch["images_sha256"]))
        faults.add("products: n_images and images_sha256 disagree", names, images != hashed)
        hashed_text = _bools(pc.is_valid(batch["text_sha256"]))
        faults.add("products: has_text and text_sha256 disagree", names, has_text != hashed_text)
    for rows in _left(dataset, before):
        content -= content_digest(rows)
    return Products(np.concatenate(ids), counts, texts, vectors, content % (1 << 128))


def scan_images(dataset: Any, faults: Faults, before: Any = None) -> tuple[Hashes, Hashes]:
    """Read all images but their thumbnails: hashes of image_id and of product_id, one a row.

    Args:
        dataset: the table's version.
        faults: told of what is wrong.
        before: a version that was verified: of rows that were in it only the keys are read again.
    """
    ids: list[Hashes] = [np.zeros(0, np.int64)]
    owners: list[Hashes] = [np.zeros(0, np.int64)]
    for batch in _batches(dataset, ["image_id", "product_id"]):
        ids.append(hashes(batch["image_id"]))
        owners.append(hashes(batch["product_id"]))
    columns = ["image_id", "product_id", "ordinal", "sha256", "vector"]
    for batch in _batches(dataset, columns, _new_fragments(dataset, before)):
        names = batch["image_id"]
        faults.add("images: no vector", names, ~_bools(pc.is_valid(batch["vector"])))
        check_vectors(batch["vector"], names, faults, "images: vector is not a unit vector")
        wanted = pc.binary_join_element_wise(batch["product_id"], batch["ordinal"].cast(pa.string()), "/")
        faults.add("images: image_id is not product_id/ordinal", names, ~_bools(pc.equal(names, wanted)))
    return np.concatenate(ids), np.concatenate(owners)


def _files(fragment: Any) -> tuple[str, ...]:
    """What makes a fragment the same one in two versions: a whole table written anew counts its fragments from 0."""
    return (str(fragment.fragment_id), *(file.path for file in fragment.metadata.files))


def _new_fragments(dataset: Any, before: Any) -> list[Any] | None:
    """Fragments that `before` does not have; None: all of them."""
    if before is None:
        return None
    known = {_files(fragment) for fragment in before.get_fragments()}
    return [fragment for fragment in dataset.get_fragments() if _files(fragment) not in known]


def _left(dataset: Any, before: Any) -> Iterator[pa.Table]:
    """Rows of `before` that are not in the version any more, without vectors."""
    if before is None:
        return
    columns = [name for name in before.schema.names if not name.endswith("_vector")]
    now = {_files(fragment): fragment for fragment in dataset.get_fragments()}
    for fragment in before.get_fragments():
        after = now.get(_files(fragment))
        if after is not None and after.num_deletions == fragment.num_deletions:
            continue
        rows = fragment.to_table(columns=columns, with_row_address=True)
        if after is not None:
            stays = after.to_table(columns=[], with_row_address=True)["_rowaddr"]
            rows = rows.filter(pc.invert(pc.is_in(rows["_rowaddr"], stays.combine_chunks())))
        yield rows.drop_columns(["_rowaddr"])


def check_vectors(column: pa.Array, names: pa.Array, faults: Faults, kind: str) -> None:
    """Every vector that is there is finite and has unit L2 norm, within `UNIT_TOLERANCE`."""
    present = np.flatnonzero(_bools(pc.is_valid(column)))
    flat = column.drop_null().flatten().to_numpy(zero_copy_only=False)
    if len(present):
        matrix = flat.reshape(len(present), -1)
        squares = np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)  # NaN where a value is none
        is_wrong = np.zeros(len(column), bool)
        is_wrong[present] = ~(np.abs(np.sqrt(squares) - 1) <= UNIT_TOLERANCE)
        faults.add(kind, names, is_wrong)


def names_of(dataset: Any, column: str, wanted: Hashes) -> list[str]:
    """The first values of a key column that have one of the hashes, for a sentence."""
    found: list[str] = []
    for batch in _batches(dataset, [column]):
        names = batch[column].take(pa.array(np.flatnonzero(np.isin(hashes(batch[column]), wanted)))).to_pylist()
        found += [str(name) for name in dict.fromkeys(names) if str(name) not in found]
        if len(found) >= _EXAMPLES:
            break
    return found[:_EXAMPLES]


def hashes(values: pa.Array) -> Hashes:
    """64 bits for each string, the same within this process: as good as the string, and a tenth of its size."""
    return np.fromiter(map(hash, values.to_pylist()), np.int64, len(values))


def _batches(dataset: Any, columns: Sequence[str], fragments: Sequence[Any] | None = None) -> Iterator[Any]:
    for part in [dataset] if fragments is None else fragments:
        yield from part.to_batches(columns=list(columns), batch_size=_BATCH_ROWS, io_buffer_size=READ_AHEAD_BYTES)


def _bools(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(column, fill_value=False).to_numpy(zero_copy_only=False), dtype=bool)


def _ints(column: pa.Array) -> npt.NDArray[np.int64]:
    return np.asarray(pc.fill_null(column, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
