"""Touched products of a scanned partition as a staged file: what was scanned, with the vectors that its hashes have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.catalog.products import RowPlan, Rows
from pipeline.errors import InputRejected
from pipeline.paths import resolve
from pipeline.records import Product, Reason, Rejected
from pipeline.run.changes import is_member
from pipeline.run.partition import PartitionResult, StagedFile
from pipeline.run.progress import Progress
from pipeline.run.scan import METADATA, TEXT_EMPTY, read_scanned
from pipeline.run.staging import EmbeddedInput, StagedWriter, read_staged, staged_schema
from pipeline.run.wanted import WantedFile, read_wanted
from pipeline.store.releases import Release
from pipeline.store.tables import Database, vectors_by_sha256

Key = tuple[str, str]
"""Kind and sha256 of an input."""

BAD_REASONS = frozenset(
    reason
    for reason in Reason
    if reason.startswith("image_") and reason not in (Reason.IMAGE_NULL, Reason.IMAGE_NOT_FOUND)
) | {Reason.VECTOR_NOT_FINITE}
"""Reasons that lie in the bytes: an equal input has the same fault."""

_LOOKUP = 1000  # hashes in one question to a table
_VECTOR_COLUMNS = ("kind", "row", "sha256", "vector", "width_px", "height_px", "thumbnail", "reason", "detail")
_SOURCES = (
    ("text", "products", "text_sha256", ("text_vector",)),
    ("image", "images", "sha256", ("vector", "width_px", "height_px", "thumbnail")),
)
_NO_ROWS: Rows = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Vector:
    """What an input's content gives: a unit vector float32 (D,), or the reason why not."""

    vector: np.ndarray | None = None
    width_px: int = 0
    height_px: int = 0
    thumbnail: bytes | None = None
    rejection: tuple[str, str] | None = None


@dataclass(frozen=True)
class FillWork:
    """One partition to be filled.

    Attributes:
        partition: its name.
        scanned_path: of its scanned file.
        touched: its rows of touched products, ascending.
        plan: what those rows are.
        embedded: what an actor staged of its wanted inputs; None where nothing was wanted.
        shared_path: inputs that actors staged for several partitions; empty where there are none.
        release: whose vectors can be taken, None where there is none of this fingerprint.
        bad: hashes known to be bad, with reason and sentence.
        staged_path: of the file to write.
    """

    partition: str
    scanned_path: str
    touched: Rows
    plan: RowPlan
    embedded: PartitionResult | None
    shared_path: str
    release: Release | None
    bad: Mapping[str, tuple[str, str]]
    staged_path: str


@dataclass
class _Filling:
    """What is known of inputs while a partition is filled, and what was counted."""

    own: dict[Key, Vector]
    shared: dict[Key, Vector]
    lost: dict[int, tuple[str, str]]  # rows that an actor could not take, with reason and sentence
    released: dict[Key, Vector] = field(default_factory=dict)
    told: set[Key] = field(default_factory=set)  # own inputs that were counted as embedded
    progress: Progress = field(default_factory=Progress)


def known_bad(db: Database, base: Release | None) -> dict[str, tuple[str, str]]:
    """Hashes that a release has rejected for what they are, with reason and sentence."""
    if base is None:
        return {}
    rejects = db.dataset("rejects", base.versions["rejects"]).to_table(columns=["sha256", "reason", "detail"])
    wanted = pc.and_(pc.is_valid(rejects["sha256"]), pc.is_in(rejects["reason"], pa.array([*map(str, BAD_REASONS)])))
    return {row["sha256"]: (row["reason"], row["detail"]) for row in rejects.filter(wanted).to_pylist()}


def fill_partitions(
    db: Database, works: Sequence[FillWork], dim: int, carried: Sequence[pa.Field]
) -> list[PartitionResult]:
    """Fill partitions one after another."""
    return [fill_partition(db, work, dim, carried) for work in works]


def fill_partition(db: Database, work: FillWork, dim: int, carried: Sequence[pa.Field]) -> PartitionResult:
    """Write the staged file of a partition's touched products; every input has a vector in it, or a reject.

    Args:
        db: the database.
        work: the partition, and where its vectors are.
        dim: of the vectors.
        carried: the catalog's further columns.
    """
    filling = _begin(work)
    with StagedWriter(work.staged_path, staged_schema(dim, carried), carried) as writer:
        for table in read_scanned(work.scanned_path):
            is_ours = is_member(table.column("row").to_numpy(), work.touched)
            is_nameless = np.asarray(pc.is_null(table.column("product_id")))
            rows = table.filter(pa.array(is_ours | is_nameless)).to_pylist()
            _look_up(db, work, rows, filling)
            products: list[Product] = []
            inputs: list[EmbeddedInput] = []
            rejects: list[Rejected] = []
            for row in rows:
                _fill(row, work, carried, filling, products, inputs, rejects)
            writer.write(products, inputs, rejects)
            filling.progress.products += len(products)
            filling.progress.rows += len(rows)
    attempt = max((file.attempt for file in work.embedded.files), default=1) if work.embedded else 1
    file = StagedFile(work.staged_path, writer.sha256, attempt)
    actor = work.embedded
    filling.progress.truncated_texts = actor.counts["truncated_texts"] if actor else 0
    return PartitionResult(
        work.partition,
        (file,),
        filling.progress.counts(),
        actor.seconds if actor else {},
        actor.wall_s if actor else 0.0,
    )


def gather_shared(works: Sequence[tuple[WantedFile, PartitionResult]], path: str, dim: int) -> None:
    """Write the inputs that several partitions use to one file, from the staged files of those that embedded them."""
    schema = staged_schema(dim, ())
    filesystem, inside = resolve(path)
    with filesystem.open_output_stream(inside) as sink, pq.ParquetWriter(sink, schema) as writer:
        for wanted, result in works:
            table = read_wanted(wanted.path)
            shared = table.filter(table.column("is_shared")).column("sha256").combine_chunks()
            for file in result.files:
                for batch in read_staged(file.path, schema.names):
                    rows = batch.filter(pc.is_in(batch.column("sha256"), shared))
                    if rows.num_rows:
                        writer.write_batch(rows)


def _begin(work: FillWork) -> _Filling:
    own: dict[Key, Vector] = {}
    lost: dict[int, tuple[str, str]] = {}
    for file in work.embedded.files if work.embedded else ():
        for batch in read_staged(file.path, _VECTOR_COLUMNS):
            for row in _vectors(batch):
                if row["kind"] == "row":
                    lost[row["row"]] = (row["reason"], row["detail"])
                elif row["sha256"] is not None:
                    own[row["kind"], row["sha256"]] = _vector(row)
    shared: dict[Key, Vector] = {}
    if work.shared_path:
        needed = _hashes(work)
        for batch in read_staged(work.shared_path, _VECTOR_COLUMNS):
            for row in _vectors(batch.filter(pc.is_in(batch.column("sha256"), needed))):
                shared[row["kind"], row["sha256"]] = _vector(row)
    return _Filling(own, shared, lost)


def _hashes(work: FillWork) -> pa.Array:
    """Hashes of all inputs of a scanned file."""
    found = []
    for table in read_scanned(work.scanned_path, ["text_sha256", "images"]):
        found.append(table.column("text_sha256").combine_chunks())
        found.append(table.column("images").combine_chunks().flatten().field("sha256"))
    return pa.concat_arrays(found).drop_null().unique() if found else pa.array([], pa.string())


def _vectors(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows with their vectors as float32 (D,), None where there is none."""
    column = batch.column("vector")
    width = column.type.list_size
    flat = np.asarray(column.fill_null(np.zeros(width, np.float32).tolist()).flatten(), np.float32).reshape(-1, width)
    rest = batch.drop_columns(["vector"]).to_pylist()
    for i, (row, is_there) in enumerate(zip(rest, column.is_valid().to_pylist(), strict=True)):
        yield row | {"vector": flat[i] if is_there else None}


def _vector(row: Mapping[str, Any]) -> Vector:
    rejection = (row["reason"], row["detail"]) if row["reason"] is not None else None
    return Vector(row["vector"], row["width_px"] or 0, row["height_px"] or 0, row["thumbnail"], rejection)


def _look_up(db: Database, work: FillWork, rows: Sequence[Mapping[str, Any]], filling: _Filling) -> None:
    """Take the vectors of the batch's inputs from the release, where no actor has embedded them."""
    filling.released = {}
    if work.release is None:
        return
    wanted: dict[str, dict[str, None]] = {"text": {}, "image": {}}
    for row in rows:
        for kind, sha256 in _inputs(row, work):
            if sha256 not in work.bad and not {(kind, sha256)} & (filling.own.keys() | filling.shared.keys()):
                wanted[kind][sha256] = None
    for kind, table, column, fields in _SOURCES:
        hashes = list(wanted[kind])
        for at in range(0, len(hashes), _LOOKUP):
            version = work.release.versions[table]
            found = vectors_by_sha256(db, table, version, column, hashes[at : at + _LOOKUP], list(fields))
            if not found.num_rows:
                continue
            matrix = found.column(fields[0]).combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)
            for i, row in enumerate(found.drop_columns([fields[0]]).to_pylist()):
                sha256 = row.pop(column)
                filling.released[kind, sha256] = Vector(matrix[i], **row)


def _inputs(row: Mapping[str, Any], work: FillWork) -> Iterator[Key]:
    if row["row"] in work.plan.rejected:
        return
    if row["text_sha256"] is not None and not row["is_blank"]:
        yield "text", row["text_sha256"]
    for image in row["images"] or ():
        if image["sha256"] is not None:
            yield "image", image["sha256"]


def _fill(
    row: Mapping[str, Any],
    work: FillWork,
    carried: Sequence[pa.Field],
    filling: _Filling,
    products: list[Product],
    inputs: list[EmbeddedInput],
    rejects: list[Rejected],
) -> None:
    """One catalog row: its metadata, its inputs with vectors, and what is wrong with it."""
    number, product_id, progress = row["row"], row["product_id"], filling.progress
    why = (row["reason"], row["detail"]) if row["reason"] is not None else None
    why = why or work.plan.rejected.get(number) or filling.lost.get(number)
    if why is not None:
        rejects.append(Rejected(product_id, number, "row", Reason(why[0]), why[1]))
        progress.rejected_rows += 1
        return
    is_first = not is_member(np.array([number]), work.plan.followers)[0]
    if is_first:
        metadata = {name: row[name] for name in METADATA} | {f.name: row[f"carried.{f.name}"] for f in carried}
        products.append(Product(product_id, number, True, None, (), metadata))
    told: list[tuple[str, int | None, str | None, tuple[str, str] | None]] = []
    if is_first and row["text_sha256"] is not None:
        blank = (str(Reason.TEXT_EMPTY), TEXT_EMPTY) if row["is_blank"] else None
        told.append(("text", None, row["text_sha256"], blank))
    for image in row["images"] or ():
        refused = (image["reason"], image["detail"]) if image["sha256"] is None else None
        told.append(("image", image["ordinal"], image["sha256"], refused))
    for kind, ordinal, sha256, refused in told:
        progress.texts += kind == "text"
        progress.images += kind == "image"
        found = Vector(rejection=refused) if refused else _find((kind, sha256 or ""), work, filling)
        if found.rejection is not None:
            reason, detail = found.rejection
            rejects.append(Rejected(product_id, number, kind, Reason(reason), detail, ordinal, sha256))
            progress.rejected += 1
            continue
        assert found.vector is not None
        key = (kind, sha256 or "")
        is_new = key in filling.own and key not in filling.told
        filling.told.add(key)
        inputs.append(
            EmbeddedInput(
                product_id, number, kind, ordinal, sha256 or "", found.vector, found.width_px, found.height_px,
                found.thumbnail, not is_new,
            )
        )  # fmt: skip
        progress.embedded += is_new
        progress.reused += not is_new


def _find(key: Key, work: FillWork, filling: _Filling) -> Vector:
    """An input's vector from this run, the release, or what is known to be wrong with it."""
    if key[1] in work.bad and key not in filling.own:
        return Vector(rejection=work.bad[key[1]])
    found = filling.own.get(key) or filling.shared.get(key) or filling.released.get(key)
    if found is not None:
        return found
    if filling.lost or work.shared_path:
        detail = "an equal input is in a row over which workers died, so it was not embedded"
        return Vector(rejection=(str(Reason.WORKER_CRASHED), detail))
    rejection = InputRejected(Reason.FETCH_FAILED, "it was another one when the run read it for the second time")
    return Vector(rejection=(str(rejection.reason), rejection.detail))
