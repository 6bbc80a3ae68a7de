"""The folder that an import writes: partitions with a note on each, rejects, a manifest; all of it safe to repeat."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.catalog.import_source import ImportReject
from pipeline.errors import CatalogError, RunError
from pipeline.paths import absolute, is_uri

CATALOG, REJECTS, MANIFEST = "catalog", "_rejects.parquet", "manifest.json"
_STATE = "_state"
_PARQUET = (".parquet", ".pq")
_PARTITION = re.compile(r"part-\d{5,}\.parquet")
_TEMPORARY = ".tmp"
_HELD_REJECTS = 5000
_READ_BYTES = 1 << 20

REJECTS_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("kind", pa.string()),
        pa.field("product_id", pa.string()),
        pa.field("input", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class RejectsFile:
    """Rejects as a Parquet file, written as they come; counted by kind and reason."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, REJECTS_SCHEMA)
        self._held: list[ImportReject] = []
        self.counts: dict[tuple[str, str], int] = {}

    def add(self, rejects: Iterable[ImportReject]) -> None:
        """Count rejects, and write them once there are enough for a row group."""
        for reject in rejects:
            key = reject.kind, str(reject.reason)
            self.counts[key] = self.counts.get(key, 0) + 1
            self._held.append(reject)
        if len(self._held) >= _HELD_REJECTS:
            self._flush()

    def total(self, *kinds: str) -> int:
        """How many there are of some kinds."""
        return sum(count for (kind, _), count in self.counts.items() if kind in kinds)

    def by_reason(self) -> dict[str, int]:
        """How many there are of each reason, the most frequent first."""
        counts: dict[str, int] = {}
        for (_, reason), count in self.counts.items():
            counts[reason] = counts.get(reason, 0) + count
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def close(self) -> None:
        """Write what is held; the file is whole after that."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = zip(*(astuple(reject) for reject in self._held), strict=True) if self._held else ()
        arrays = [
            pa.array(map(_storable, column) if pa.types.is_string(field.type) else column, field.type)
            for field, column in zip(REJECTS_SCHEMA, columns, strict=False)
        ]
        if arrays:
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=REJECTS_SCHEMA))
        self._held = []


@dataclass(frozen=True)
class Note:
    """What is remembered of a finished partition.

    Attributes:
        inputs: digest of everything that it was made of.
        sha256: of the file.
        broad: of each broad category `[products, images]`; `fine` likewise.
        unread: images that were there and could not be read when it was written.
    """

    inputs: str
    sha256: str
    size_bytes: int
    products: int
    images: int
    broad: Mapping[str, list[int]]
    fine: Mapping[str, list[int]]
    unread: int


class ImportFolder:
    """A folder that one import writes at a time.

    A partition is written under another name, renamed, and counts once its note is there, which names its digest: an
    import that dies at any moment leaves partitions that count, and others that are written again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.catalog = path / CATALOG
        self._state = path / _STATE

    @classmethod
    @contextmanager
    def opened(cls, out: str, origin: Mapping[str, str]) -> Iterator[ImportFolder]:
        """The folder, made if it is not there, and held against other imports.

        Args:
            out: a local folder.
            origin: what is imported, by which job; a folder keeps to one.

        Raises:
            CatalogError: the folder cannot be used: a URI, a file, or it holds something else.
            RunError: another import writes to it.
        """
        if is_uri(out):
            raise CatalogError(f"an import writes to a local folder, not to {out}; copy its catalog there afterwards")
        folder = cls(Path(absolute(out)))
        folder._claim(origin)
        with (folder._state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"another import writes to {folder.path}; wait for its end") from error
            for written in (folder.path, folder.catalog, folder._state):
                for left in written.glob(f".*{_TEMPORARY}"):
                    left.unlink()
            yield folder

    def _claim(self, origin: Mapping[str, str]) -> None:
        """Take a folder that is empty, or that the same import has written to."""
        mark = self._state / "origin.json"
        try:
            if not mark.exists():
                if self.path.exists() and any(p.name != _STATE for p in self.path.iterdir()):
                    raise CatalogError(f"{self.path} is not empty and no import's; give a new folder with --out")
                self._state.mkdir(parents=True, exist_ok=True)
                self._put(mark, origin)
            found = json.loads(mark.read_text())
            self.catalog.mkdir(exist_ok=True)
            files = [p for p in self.catalog.rglob("*") if p.suffix in _PARQUET]
            foreign = [p.name for p in files if p.parent != self.catalog or not _PARTITION.fullmatch(p.name)]
        except (OSError, ValueError) as error:
            raise CatalogError(f"{self.path} cannot be used as --out: {error}") from error
        if found != dict(origin):
            raise CatalogError(
                f"{self.path} holds an import of {found.get('source')} by jobs.{found.get('job')}; give a new folder "
                "with --out, or remove that one"
            )
        if foreign:
            raise CatalogError(f"{self.catalog} holds {foreign[0]}, which no import wrote; move it away")

    def kept(self, number: int, inputs: str) -> Note | None:
        """The note of a finished partition, if it was made of these inputs and its file is as it was written.

        One in which images could not be read is not kept: they may be readable now.
        """
        try:
            note = Note(**json.loads(self._note(number).read_text()))
            is_whole = note.inputs == inputs and digest_of(self._partition(number)) == (note.sha256, note.size_bytes)
        except (OSError, ValueError, TypeError):
            return None
        return note if is_whole and not note.unread else None

    @contextmanager
    def partition(self, number: int) -> Iterator[Path]:
        """A path to write a partition to; it takes its place when the block ends well."""
        (self.path / MANIFEST).unlink(missing_ok=True)  # it tells of what is about to change
        self._note(number).unlink(missing_ok=True)
        with _placed(self._partition(number)) as path:
            yield path

    def remember(self, number: int, note: Mapping[str, Any]) -> Note:
        """Make a partition count: note what it was made of, what is in it, and its digest."""
        sha256, size_bytes = digest_of(self._partition(number))
        made = Note(**note, sha256=sha256, size_bytes=size_bytes)
        self._put(self._note(number), made.__dict__)
        return made

    @contextmanager
    def rejects(self) -> Iterator[RejectsFile]:
        """The rejects; their file takes its place when the block ends well."""
        with _placed(self.path / REJECTS) as path:
            file = RejectsFile(path)
            try:
                yield file
            finally:
                file.close()

    def finish(self, partitions: int, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Remove partitions beyond the last one, of an older import of the same source, and write the manifest."""
        for path in sorted(self.catalog.iterdir()):
            if _PARTITION.fullmatch(path.name) and int(path.stem.partition("-")[2]) >= partitions:
                (self._state / f"{path.stem}.json").unlink(missing_ok=True)
                path.unlink()
        sha256, size_bytes = digest_of(self.path / REJECTS)
        whole = {**manifest, "rejects_file": {"name": REJECTS, "sha256": sha256, "bytes": size_bytes}}
        self._put(self.path / MANIFEST, whole)
        return whole

    def _partition(self, number: int) -> Path:
        return self.catalog / f"part-{number:05d}.parquet"

    def _note(self, number: int) -> Path:
        return self._state / f"part-{number:05d}.json"

    def _put(self, path: Path, value: Mapping[str, Any]) -> None:
        with _placed(path) as temporary:
            temporary.write_text(json.dumps(value, indent=1, ensure_ascii=True) + "\n")


def digest_of(path: Path) -> tuple[str, int]:
    """sha256 and size of a file."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return digest.hexdigest(), size_bytes


@contextmanager
def _placed(path: Path) -> Iterator[Path]:
    """A name beside a file, hidden from catalogs, under which it is written before it takes its place."""
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _storable(text: str | None) -> str | None:
    """Text that Arrow takes: bytes that were no UTF-8 are written out."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
