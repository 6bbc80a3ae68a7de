"""The staged file of a partition: one row per input, kept until its release."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipeline.errors import RunError, first_line
from pipeline.paths import is_uri, open_file, resolve
from pipeline.records import Product, Rejected
from pipeline.run.scan import METADATA


@dataclass(frozen=True, slots=True)
class SeenRow:
    """A catalog row with an id, and what it says (`row_digest`); no digest where it was not read to its end."""

    product_id: str | None
    row: int
    digest: bytes | None


@dataclass(frozen=True, slots=True)
class EmbeddedInput:
    """One input with its vector.

    Attributes:
        kind: `text` or `image`.
        vector: float32 (D,), unit L2 norm.
        width_px: of the upright image; 0 for a text, like `height_px`.
        thumbnail: JPEG, longest side 224 pixels; None for a text.
        is_reused: whether the vector was there before, from an equal input or an older release.
    """

    product_id: str
    row: int
    kind: str
    ordinal: int | None
    sha256: str
    vector: np.ndarray
    width_px: int = 0
    height_px: int = 0
    thumbnail: bytes | None = None
    is_reused: bool = False


def staged_schema(dim: int, carried: Sequence[pa.Field]) -> pa.Schema:
    """Rows of four kinds: `row` (a product's metadata), `text`, `image`, `seen`; a row with a `reason` is a reject."""
    return pa.schema(
        [
            pa.field("kind", pa.string(), nullable=False),
            pa.field("product_id", pa.string()),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("ordinal", pa.int32()),
            pa.field("sha256", pa.string()),
            pa.field("vector", pa.list_(pa.float32(), dim)),
            pa.field("width_px", pa.int32()),
            pa.field("height_px", pa.int32()),
            pa.field("thumbnail", pa.binary()),
            pa.field("is_reused", pa.bool_()),
            pa.field("reason", pa.string()),
            pa.field("detail", pa.string()),
            pa.field("digest", pa.binary(16)),
            *[pa.field(name, pa.string()) for name in METADATA],
            *[pa.field(f"carried.{field.name}", field.type) for field in carried],
        ]
    )


class StagedWriter:
    """Writes a staged file so that it is there whole or not at all: a temporary name, fsync, rename; a put on a store.

    Attributes:
        sha256: digest of the file, once closed.
    """

    def __init__(self, path: str, schema: pa.Schema, carried: Sequence[pa.Field]) -> None:
        self._filesystem, self._path = resolve(path)
        self._is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._schema = schema
        self._carried = [field.name for field in carried]
        self._target = temporary_name(self._path) if self._is_local else self._path
        if self._is_local:
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        self._sink = _HashingSink(self._filesystem.open_output_stream(self._target))
        # Vectors do not compress, thumbnails are JPEGs: compression would only cost time.
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"), schema, compression="none", write_page_checksum=True
        )
        self.sha256 = ""

    def write(
        self,
        products: Iterable[Product],
        inputs: Iterable[EmbeddedInput],
        rejects: Iterable[Rejected],
        seen: Iterable[SeenRow] = (),
    ) -> None:
        """Append one batch."""
        rows = [self._metadata_row(product) for product in products if product.is_first]
        rows += [_input_row(item) for item in inputs]
        rows += [_reject_row(reject) for reject in rejects]
        rows += [{"kind": "seen", "product_id": s.product_id, "row": s.row, "digest": s.digest} for s in seen]
        if rows:
            columns = {name: [row.get(name) for row in rows] for name in self._schema.names if name != "vector"}
            arrays = [
                _vectors([row.get("vector") for row in rows], field.type)
                if field.name == "vector"
                else pa.array(columns[field.name], field.type)
                for field in self._schema
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def __enter__(self) -> StagedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._writer.close()
            self._sink.inner.close()
            self.sha256 = self._sink.sha256.hexdigest()
            if self._is_local:
                _fsync(self._target)
                Path(self._target).replace(self._path)
                _fsync(str(Path(self._path).parent))
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        """Leave nothing behind; what failed is told by the error on its way.

        pyarrow cannot break off an upload: it is ended, and what it made deleted. No entry of the ledger names it, and
        where the deletion fails too, `Ledger.tidy` and `sweep` come by. A process that is killed leaves an upload that
        never ended, which no listing shows.
        """
        with contextlib.suppress(OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._sink.inner.close()
        with contextlib.suppress(OSError):
            self._filesystem.delete_file(self._target)

    def _metadata_row(self, product: Product) -> dict[str, Any]:
        row: dict[str, Any] = {"kind": "row", "product_id": product.product_id, "row": product.row}
        row |= {name: product.metadata[name] for name in METADATA}
        return row | {f"carried.{name}": product.metadata[name] for name in self._carried}


def temporary_name(path: str) -> str:
    """A name beside the path that no other process writes, on whatever machine."""
    return f"{path}.{uuid.uuid4().hex[:12]}.tmp"


def write_atomically(path: str, data: bytes) -> None:
    """Write a small file whole or not at all."""
    filesystem, inside = resolve(path)
    target = inside
    if not is_uri(path):
        Path(inside).parent.mkdir(parents=True, exist_ok=True)
        target = temporary_name(inside)
    with filesystem.open_output_stream(target) as sink:
        sink.write(data)
    if not is_uri(path):
        _fsync(target)
        Path(target).replace(inside)


def read_staged(path: str, columns: Sequence[str], *, batch_rows: int = 4096) -> Iterator[pa.RecordBatch]:
    """Stream some columns of a staged file, each page compared with its checksum.

    Raises:
        RunError: the file is gone or damaged.
    """
    filesystem, inside = resolve(path)
    try:
        with open_file(filesystem, inside) as source:
            file = pq.ParquetFile(source, page_checksum_verification=True)
            # Whoever reads has one core: threads beside it would only hold memory.
            yield from file.iter_batches(batch_size=batch_rows, columns=list(columns), use_threads=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(
            f"the staged file {path} cannot be read as it was written ({first_line(error)}); nothing was "
            "released: run the same command again, and its partition is embedded again"
        ) from error


def file_sha256(path: str) -> str:
    """Digest of a file's bytes."""
    filesystem, inside = resolve(path)
    digest = hashlib.sha256()
    with open_file(filesystem, inside) as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _HashingSink:
    """A writable file that keeps the digest of what passed through it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.sha256 = hashlib.sha256()
        self.closed = False

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return int(self.inner.write(data) or len(data))

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def readable(self) -> bool:
        return False

    def flush(self) -> None:
        self.inner.flush()

    def close(self) -> None:
        self.closed = True


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _input_row(item: EmbeddedInput) -> dict[str, Any]:
    return {name: getattr(item, name) for name in EmbeddedInput.__slots__}


def _reject_row(reject: Rejected) -> dict[str, Any]:
    return {name: getattr(reject, name) for name in Rejected.__slots__} | {"reason": str(reject.reason)}


def _vectors(rows: Sequence[np.ndarray | None], type_: pa.FixedSizeListType) -> pa.Array:
    """Vectors and nulls as a fixed-size list, without one Python object per number."""
    dim = type_.list_size
    flat = np.zeros((len(rows), dim), dtype=np.float32)
    is_null = np.fromiter((row is None for row in rows), dtype=bool, count=len(rows))
    for i, row in enumerate(rows):
        if row is not None:
            flat[i] = row
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), dim, mask=pa.array(is_null))
