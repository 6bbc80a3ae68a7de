"""One entry per staged partition, written after the staged file: what a resumed run may take as done."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from pipeline.paths import is_uri, open_file, resolve
from pipeline.run.partition import PartitionResult, StagedFile
from pipeline.run.staging import file_sha256, write_atomically

_VERIFYING_THREADS = 8
_SCRATCH = "plan-"
_KEPT_S = 7 * 86_400.0  # the rejects of a refused run are looked at by people


@contextmanager
def scratch(folder: str, run_id: str) -> Iterator[str]:
    """A folder of a run's own in the staging folder, gone with all that is in it when the block ends."""
    path = f"{folder.rstrip('/')}/{_SCRATCH}{run_id}"
    if not is_uri(path):
        made = [parent for parent in (Path(path), *Path(path).parents) if not parent.exists()]
        Path(path).mkdir(parents=True)
    try:
        yield path
    finally:
        filesystem, inside = resolve(path)
        with suppress(OSError):
            filesystem.delete_dir(inside)
        for parent in [] if is_uri(path) else made:
            with suppress(OSError):  # others may have written there meanwhile
                parent.rmdir()


@dataclass(frozen=True)
class Ledger:
    """The entries in a staging folder or prefix.

    An entry's file name is the hash of the partition's name; it holds the key of the work, so that a changed file,
    model or setting makes it pending again, and a digest of itself, so that a damaged one is no entry.
    """

    folder: str

    def staged_path(self, name: str) -> str:
        """A new name for a staged file of the partition: no two attempts, and no two runs, write the same one."""
        return f"{self._path(name)}.{uuid.uuid4().hex[:12]}.parquet"

    def record(self, result: PartitionResult, key: str, facts: Mapping[str, Any]) -> None:
        """Make a staged partition count. Call it after its files are durable, never before.

        Args:
            result: the partition, whole.
            key: from `work_key`.
            facts: what the key was made of, and times, for people.
        """
        entry = {"key": key, **facts, **asdict(result)}
        write_atomically(
            f"{self._path(result.name)}.json", json.dumps({"entry": entry, "sha256": _digest(entry)}).encode()
        )

    def find(self, keys: Mapping[str, str]) -> dict[str, PartitionResult]:
        """Results of the partitions that were staged for the same key and whose files have the recorded digests.

        Args:
            keys: partition names to keys.
        """
        with ThreadPoolExecutor(_VERIFYING_THREADS) as threads:
            found = threads.map(self._find, keys, keys.values())
        return {result.name: result for result in found if result is not None}

    def entries(self) -> list[dict[str, Any]]:
        """All entries, for people who ask how far a run has come."""
        return [entry for path in self._files() if path.endswith(".json") and (entry := self._read(path)) is not None]

    def forget(self, names: Iterable[str]) -> None:
        """Remove entries and staged files after their release, with what broken attempts at them left behind.

        The entries go first: one without its files would only be found wanting, but files alone are never looked at.
        """
        self._remove({_digest(name) for name in names})

    def tidy(self, names: Iterable[str]) -> None:
        """Remove what a run that ends without its release has left of partitions that are not staged."""
        recorded = {_digest(entry["name"]) for entry in self.entries()}
        self._remove({_digest(name) for name in names} - recorded)

    def sweep(self) -> None:
        """Remove files that dead runs left and no entry names, once they are old enough to be nobody's."""
        filesystem, path = resolve(self.folder)
        named = {file["path"].rpartition("/")[2] for entry in self.entries() for file in entry["files"]}
        for info in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            is_named = info.base_name in named or info.path.endswith(".json")
            if info.type == pafs.FileType.File and not is_named and _is_old([info]):
                filesystem.delete_file(info.path)

    def sweep_scratch(self, run_id: str, db: str) -> None:
        """Remove dead runs' scratch folders; a living one, embedding beside the lease's holder, has younger files.

        What was dealt out goes at once, large as it is: only the holder of the database's lease deals for it.

        Args:
            run_id: of this run, which holds the lease.
            db: the database's address.
        """
        filesystem, path = resolve(self.folder)
        for folder in filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True)):
            is_scratch = folder.type == pafs.FileType.Directory and folder.base_name.startswith(_SCRATCH)
            if not is_scratch or folder.base_name == f"{_SCRATCH}{run_id}":
                continue
            files = filesystem.get_file_info(pafs.FileSelector(folder.path, allow_not_found=True, recursive=True))
            with suppress(OSError):
                if _is_old([folder, *files]):
                    filesystem.delete_dir(folder.path)
                    continue
                for file in files:
                    if file.path.endswith(dealt_ending(db)):
                        filesystem.delete_file(file.path)

    def _remove(self, digests: Set[str]) -> None:
        """Remove all files of partitions, the entries first; what is already gone is fine."""
        filesystem, _ = resolve(self.folder)
        files = [path for path in self._files() if path.rpartition("/")[2].partition(".")[0] in digests]
        for path in sorted(files, key=lambda path: not path.endswith(".json")):
            with suppress(FileNotFoundError):
                filesystem.delete_file(path)

    def _find(self, name: str, key: str) -> PartitionResult | None:
        filesystem, path = resolve(f"{self._path(name)}.json")
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            return None
        entry = self._read(path)
        if entry is None or entry["key"] != key:
            return None
        files = tuple(StagedFile(**file) for file in entry["files"])
        result = PartitionResult(
            entry["name"], files, entry["counts"], entry["seconds"], entry["wall_s"], entry.get("waits", {})
        )
        try:
            is_whole = all(file_sha256(file.path) == file.sha256 for file in files)
        except OSError:
            return None
        return result if is_whole else None

    def _files(self) -> list[str]:
        filesystem, path = resolve(self.folder)
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return [info.path for info in infos if info.type == pafs.FileType.File]

    def _read(self, path: str) -> dict[str, Any] | None:
        """An entry as it was recorded; None for what is damaged, or not ours: the partition is embedded again."""
        filesystem, _ = resolve(self.folder)
        with open_file(filesystem, path) as source:
            try:
                told = json.loads(source.read())
                entry = told["entry"]
                return entry if told["sha256"] == _digest(entry) else None
            except (ValueError, TypeError, KeyError):
                return None

    def _path(self, name: str) -> str:
        return f"{self.folder.rstrip('/')}/{_digest(name)}"


def dealt_ending(db: str) -> str:
    """How names of a database's dealt files end (`shuffle`): several databases may share a staging folder."""
    return f".{_digest(db)[:12]}.dealt.arrow"


def _is_old(infos: Iterable[pafs.FileInfo]) -> bool:
    """Whether nothing was written to any of them lately; a store's folders have no time."""
    written = [info.mtime.timestamp() for info in infos if info.mtime is not None]
    return bool(written) and time.time() - max(written) > _KEPT_S


def work_key(facts: Mapping[str, Any]) -> str:
    """Digest of everything that decides what a partition's staged files hold."""
    return _digest(dict(facts))


def _digest(value: object) -> str:
    """Of a name, or of anything that JSON can hold, in an order of its own."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
