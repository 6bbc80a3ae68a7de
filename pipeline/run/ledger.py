"""One entry per staged partition, written after the staged file: what a resumed run may take as done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.fs as pafs

from pipeline.paths import resolve
from pipeline.run.partition import PartitionResult
from pipeline.run.staging import file_sha256, remove_leftovers, write_atomically


@dataclass(frozen=True)
class Ledger:
    """The entries in a staging folder or prefix.

    An entry's file name is the hash of the partition's name; it holds the key of the work, so that a changed file,
    model or setting makes it pending again.
    """

    folder: str

    def staged_path(self, name: str) -> str:
        """Where a partition's staged file belongs."""
        return f"{self.folder.rstrip('/')}/{_digest(name)}.parquet"

    def record(self, result: PartitionResult, key: str) -> None:
        """Make a staged partition count. Call it after its file is durable, never before."""
        entry = {"key": key, **asdict(result)}
        write_atomically(self._entry_path(result.name), json.dumps(entry).encode())

    def find(self, name: str, key: str) -> PartitionResult | None:
        """The partition's result, if it was staged for the same key and its file still has the recorded digest."""
        entry = self._read(self._entry_path(name))
        if entry is None or entry.pop("key", None) != key:
            return None
        result = PartitionResult(**entry)
        try:
            is_whole = file_sha256(result.path) == result.sha256
        except OSError:
            return None
        return result if is_whole else None

    def entries(self) -> list[dict[str, Any]]:
        """All entries, for people who ask how far a run has come."""
        filesystem, path = resolve(self.folder)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return [e for info in infos if info.path.endswith(".json") and (e := self._read_on(filesystem, info.path))]

    def forget(self, results: Mapping[str, PartitionResult]) -> None:
        """Remove entries and staged files after their release; what is already gone is fine."""
        for result in results.values():
            for path in (self._entry_path(result.name), result.path):
                filesystem, inside = resolve(path)
                if filesystem.get_file_info(inside).type == pafs.FileType.File:
                    filesystem.delete_file(inside)
                remove_leftovers(path)

    def _entry_path(self, name: str) -> str:
        return f"{self.folder.rstrip('/')}/{_digest(name)}.json"

    def _read(self, path: str) -> dict[str, Any] | None:
        filesystem, inside = resolve(path)
        if filesystem.get_file_info(inside).type != pafs.FileType.File:
            return None
        return self._read_on(filesystem, inside)

    @staticmethod
    def _read_on(filesystem: pafs.FileSystem, path: str) -> dict[str, Any] | None:
        with filesystem.open_input_stream(path) as source:
            try:
                entry = json.loads(source.read())
            except ValueError:
                return None  # not written by us, or damaged: the partition is embedded again
        return entry if isinstance(entry, dict) else None


def work_key(*parts: object) -> str:
    """Digest of everything that decides what a partition's staged file holds."""
    return hashlib.sha256("\0".join(repr(part) for part in parts).encode()).hexdigest()


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]
