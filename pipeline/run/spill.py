"""Tables too large for memory: spread over buckets on the local disk by the hash of a key, and read back by bucket."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

BUCKET_ROWS = 500_000
"""What a bucket should hold: about 100 MB of rows and what is made of them."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, of no pattern: the golden ratio's bits
_MOST_BUCKETS = 512

Keys = npt.NDArray[np.uint64]


def bucket_count(rows: int) -> int:
    """How many buckets keep each under about `BUCKET_ROWS` rows."""
    return int(min(max(1, -(-rows // BUCKET_ROWS)), _MOST_BUCKETS))


class Spill:
    """Rows of one schema in buckets, each a file of Arrow batches; the files end with the block.

    Args:
        schema: of the rows.
        buckets: how many.
    """

    def __init__(self, schema: pa.Schema, buckets: int) -> None:
        self.schema = schema
        self.buckets = buckets
        self._folder = tempfile.TemporaryDirectory(prefix="twotower-plan-")
        self._writers: dict[int, Any] = {}

    def add(self, rows: pa.Table, keys: Keys) -> None:
        """Append rows to the buckets that their keys name.

        Args:
            rows: of the spill's schema.
            keys: uint64 (rows,), from `key_hashes`; equal keys share a bucket.
        """
        rows = rows.select(self.schema.names).cast(self.schema)
        if not rows.num_rows:
            return
        if self.buckets == 1:
            self._write(0, rows)
            return
        bucket = (keys % np.uint64(self.buckets)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        ordered = rows.take(pa.array(order))
        used, starts = np.unique(bucket[order], return_index=True)
        for number, start, stop in zip(used, starts, [*starts[1:], len(order)], strict=True):
            self._write(int(number), ordered.slice(start, stop - start))

    def read(self, bucket: int) -> pa.Table:
        """All rows of a bucket; nothing can be added to it afterwards."""
        if bucket not in self._writers:
            return self.schema.empty_table()
        self._writers[bucket].close()
        with pa.memory_map(str(self._path(bucket))) as source:
            return pa.ipc.open_stream(source).read_all()

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers.values():
            writer.close()
        self._folder.cleanup()

    def _write(self, bucket: int, rows: pa.Table) -> None:
        if bucket not in self._writers:
            self._writers[bucket] = pa.ipc.new_stream(str(self._path(bucket)), self.schema)
        self._writers[bucket].write_table(rows)

    def _path(self, bucket: int) -> Path:
        return Path(self._folder.name) / f"{bucket}.arrow"


def key_hashes(values: pa.ChunkedArray | pa.Array) -> Keys:
    """uint64 (N,): a hash of each string, 0 for null; the same in every process, and good for spreading only.

    A polynomial of the bytes, computed for all strings at once: a tenth of the time of a digest for each.
    """
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    array = array.cast(pa.large_string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not len(array):
        return np.zeros(0, np.uint64)
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    lengths = np.diff(offsets)
    result = np.zeros(len(array), np.uint64)
    filled = np.flatnonzero(lengths)
    if len(filled):
        data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
        starts = offsets[filled] - offsets[0]
        places = np.arange(len(data)) - np.repeat(starts, lengths[filled])
        terms = (data.astype(np.uint64) + np.uint64(1)) * _powers(int(lengths.max()))[places]
        result[filled] = np.add.reduceat(terms, starts)
    # The low bits of a sum of odd powers are its bytes' own: mix, so that a remainder is spread evenly.
    result ^= result >> np.uint64(32)
    result *= _MULTIPLIER
    result ^= result >> np.uint64(29)
    if array.null_count:
        result[np.asarray(array.is_null())] = 0
    return result


def _powers(count: int) -> Keys:
    with np.errstate(over="ignore"):
        return np.asarray(np.cumprod(np.full(count, _MULTIPLIER, np.uint64)), np.uint64)
