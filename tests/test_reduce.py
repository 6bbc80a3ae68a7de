from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.run.reduce import Reduction, reduce_products
from pipeline.run.shuffle import bucket_of
from pipeline.run.staging import staged_schema
from pipeline.store.content import content_digest

DIM = 5


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _row(kind: str, product_id: str, row: int, ordinal: int | None = None, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "product_id": product_id, "row": row, "ordinal": ordinal, **more}


def _staged(rows: list[dict[str, Any]]) -> pa.Table:
    table = pa.Table.from_pylist(rows, schema=staged_schema(DIM, []))
    return table.append_column("partition", pa.array(["part"] * len(rows)))


PRODUCTS = st.lists(
    st.tuples(st.booleans(), st.booleans(), st.lists(st.sampled_from(["good", "bad"]), max_size=4)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(PRODUCTS, st.floats(0, 1), st.integers(0, 2**32 - 1), st.booleans())
def test_averages_equal_plain_numpy(products: list[Any], weight: float, seed: int, has_ordinals: bool) -> None:
    """Against the definition, product by product, for any mixture of good and bad inputs in any order."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    truth: dict[str, tuple[np.ndarray | None, list[np.ndarray], list[str]]] = {}
    empty = set()
    for number, (has_text, is_text_good, images) in enumerate(products):
        product_id = f"p{number}"
        rows.append(_row("row", product_id, number, title=f"t{number}"))
        text = _unit(rng.normal(size=DIM)).astype(np.float32) if has_text and is_text_good else None
        if has_text:
            bad = {} if is_text_good else {"reason": "text_empty", "detail": "d"}
            rows.append(_row("text", product_id, number, None, sha256=f"{number:064x}", vector=text, **bad))
        found: list[tuple[str, np.ndarray]] = []
        for ordinal, kind in enumerate(images):
            sha256 = f"{rng.integers(0, 2**62):064x}"
            vector = _unit(rng.normal(size=DIM)).astype(np.float32)
            row = number if has_ordinals else 1000 * number + ordinal
            place = ordinal if has_ordinals else None
            if kind == "good":
                found.append((sha256, vector))
                rows.append(_row("image", product_id, row, place, sha256=sha256, vector=vector))
            else:
                rows.append(_row("image", product_id, row, place, sha256=sha256, reason="image_corrupt", detail="d"))
        if not has_ordinals:
            found.sort(key=lambda pair: pair[0])
        truth[product_id] = (text, [v for _, v in found], [s for s, _ in found])
        if not has_text and not images:
            empty.add(product_id)
    rng.shuffle(rows)  # type: ignore[arg-type]
    reduced = reduce_products(_staged(rows), Reduction(DIM, (), weight, has_ordinals))
    kept = {row["product_id"]: row for row in reduced.products.to_pylist()}
    assert set(kept) == {i for i, (text, images, _) in truth.items() if text is not None or images}
    assert set(reduced.ids.to_pylist()) == set(truth)
    assert {product_id for product_id, _, _ in reduced.empty} == empty
    assert reduced.products.column("product_id").to_pylist() == sorted(kept)
    for product_id, row in kept.items():
        text, images, hashes = truth[product_id]
        image = _unit(np.mean([v.astype(np.float64) for v in images], axis=0)) if images else None
        average = image if text is None else text if image is None else _unit(weight * text + (1 - weight) * image)
        for name, expected in (("text_vector", text), ("image_vector", image), ("avg_vector", average)):
            if expected is None:
                assert row[name] is None
            else:
                np.testing.assert_allclose(row[name], expected, atol=1e-6)
        assert (row["n_images"], row["has_text"]) == (len(images), text is not None)
        assert row["images_sha256"] == hashes
        assert row["title"] == f"t{product_id[1:]}"


def test_places_by_hash_count_rejected_images_and_put_nulls_last() -> None:
    vector = np.ones(DIM, dtype=np.float32) / np.sqrt(DIM)
    rows = [
        _row("row", "a", 0),
        _row("image", "a", 0, sha256="cc", vector=vector),
        _row("image", "a", 1, sha256=None, reason="image_not_found", detail="d"),
        _row("image", "a", 2, sha256="aa", vector=vector),
        _row("image", "a", 3, sha256="bb", reason="image_corrupt", detail="d"),
    ]
    reduced = reduce_products(_staged(rows), Reduction(DIM, (), 0.5, False))
    assert reduced.ordinals is not None
    places = dict(zip(*(reduced.ordinals.column(name).to_pylist() for name in ("row", "ordinal")), strict=True))
    assert places == {2: 0, 3: 1, 0: 2, 1: 3}
    assert reduced.products.column("images_sha256").to_pylist() == [["aa", "cc"]]


def test_opposite_images_have_no_mean_and_the_product_stays() -> None:
    vector = np.zeros(DIM, dtype=np.float32)
    vector[0] = 1
    rows = [
        _row("row", "a", 0),
        *[_row("image", "a", 0, i, sha256="x", vector=vector * s) for i, s in enumerate((1, -1))],
    ]
    (row,) = reduce_products(_staged(rows), Reduction(DIM, (), 0.5, True)).products.to_pylist()
    assert (row["image_vector"], row["avg_vector"], row["n_images"]) == (None, None, 2)


@given(st.lists(st.text(min_size=1), unique=True, min_size=1), st.integers(1, 7))
def test_a_product_is_in_one_bucket_wherever_it_is_read(ids: list[str], buckets: int) -> None:
    first = bucket_of(pa.chunked_array([ids]), buckets)
    again = [int(bucket_of(pa.chunked_array([[i]]), buckets)[0]) for i in ids]
    assert first.tolist() == again
    assert all(0 <= bucket < buckets for bucket in again)


def test_content_digest_is_of_rows_not_of_their_order() -> None:
    table = pa.table({"product_id": ["a", "b"], "title": ["x", "y"], "partition": ["1", "2"]})
    swapped = table.take([1, 0])
    assert content_digest(table) == content_digest(swapped)
    edited = table.set_column(1, "title", pa.array(["x", "z"]))
    assert content_digest(table) != content_digest(edited)
    moved = table.set_column(2, "partition", pa.array(["3", "4"]))
    assert content_digest(table) == content_digest(moved)
