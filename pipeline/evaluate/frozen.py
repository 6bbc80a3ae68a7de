"""The queries by which a release is measured, frozen beside it: `<db>/_evaluation/release-N.parquet`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import GateConfig
from pipeline.errors import QueryError
from pipeline.evaluate.products import read_products
from pipeline.evaluate.queries import Query, draw_queries
from pipeline.paths import exists, open_file, resolve
from pipeline.query.encoder import Encoder
from pipeline.run.staging import write_atomically
from pipeline.store.releases import Release
from pipeline.store.tables import Database

_TEXTS = ("query_id", "text", "recipe", "broad", "fine", "source")


@dataclass(frozen=True)
class Frozen:
    """Queries of a release, and their vectors by its model.

    Attributes:
        queries: in order.
        vectors: float32 (Q, D), unit vectors.
        model_id: of the model that made them.
    """

    queries: Sequence[Query]
    vectors: npt.NDArray[np.float32]
    model_id: str


def frozen_path(db: Database, release: Release) -> str:
    """Where a release's queries lie."""
    return f"{db.uri.rstrip('/')}/_evaluation/release-{release.release}.parquet"


def frozen_queries(db: Database, release: Release, settings: GateConfig, *, encoder: Encoder | None = None) -> Frozen:
    """The queries of a release: as they were frozen, or drawn from its own products and frozen now.

    A release never changes, so it gives the same queries whenever they are drawn. They are kept all the same, because
    the recipe may change, and because its model may not be at hand any more when the next one comes.

    Args:
        db: the database.
        release: whose products the queries are drawn from.
        settings: recipe, number and seed of queries that are not frozen yet.
        encoder: of the release's model; None: one is made of the name that the release has.

    Raises:
        QueryError: the catalog has no categories, or the release's model is not at hand.
    """
    path = frozen_path(db, release)
    if exists(path):
        return _thaw(path, release)
    products = read_products(db, release.versions["products"])
    queries = draw_queries(products, settings.recipe, count=settings.queries, seed=settings.seed)
    encoder = encoder or encoder_of(release, db)
    vectors = np.stack(encoder.encode([query.text for query in queries]))
    write_atomically(path, _frozen(queries, vectors, encoder.model_id))
    return Frozen(queries, vectors, encoder.model_id)


def encoder_of(release: Release, db: Database, *, device: str = "cpu") -> Encoder:
    """What embeds queries for a release, by the name of its model."""
    schema = db.dataset("products", release.versions["products"]).schema
    dim = schema.field("avg_vector").type.list_size
    return Encoder(release.model, release.model_id, dim, settings=release.model_settings, device=device)


def _frozen(queries: Sequence[Query], vectors: npt.NDArray[np.float32], model_id: str) -> bytes:
    """The file's bytes."""
    columns = {name: pa.array([getattr(query, name) for query in queries], pa.string()) for name in _TEXTS}
    columns["judged"] = pa.array([None if q.judged is None else json.dumps(q.judged) for q in queries], pa.string())
    columns["is_own_text_only"] = pa.array([query.is_own_text_only for query in queries])
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata({"model_id": model_id}), sink)
    return bytes(sink.getvalue())


def _thaw(path: str, release: Release) -> Frozen:
    try:
        filesystem, inside = resolve(path)
        with open_file(filesystem, inside) as file:
            table = pq.read_table(file)
        vectors = np.stack(table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1))
        rows = table.select([*_TEXTS, "judged", "is_own_text_only"]).to_pylist()
        model_id = (table.schema.metadata or {})[b"model_id"].decode()
    except (OSError, KeyError, ValueError) as error:
        raise QueryError(
            f"the frozen queries of release {release.release} in {path} cannot be read ({error}); remove the file, and "
            "they are drawn anew"
        ) from error
    queries = [Query(**{**row, "judged": row["judged"] and json.loads(row["judged"])}) for row in rows]
    return Frozen(queries, vectors, model_id)
