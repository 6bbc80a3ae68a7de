"""A model folder under an object-store prefix: fetched once per node, into a folder that is named by its content."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs

from pipeline.errors import ModelError, first_line
from pipeline.model.identity import FILES, WEIGHTS
from pipeline.model.weights import cache_folder, file_digest
from pipeline.paths import open_file, reach, resolve

_BLOCK_BYTES = 8_000_000
_SMALL = (".json", ".txt")  # settings and vocabularies; weights in other formats stay where they are
_DIGESTS = ".fetched"


def fetch_folder(uri: str) -> Path:
    """The folder of this node that holds the model files of a prefix as they are there now.

    The folder's name is made of the prefix and of what its listing says of each file, so a model that is replaced is
    another folder. Processes of a node wait for the one that fetches. Each file's sha256 is taken while it is fetched,
    and compared whenever the folder is found again.

    Raises:
        ModelError: there is no such prefix, a file is missing or cannot be read, or the disk is full.
    """
    try:
        filesystem, files = _listed(uri)
        facts = [[info.base_name, info.size, info.mtime_ns] for info in files]
        name = hashlib.sha256(json.dumps([uri.rstrip("/"), facts]).encode()).hexdigest()[:32]
        folder = cache_folder() / "models" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not _is_whole(folder):
                _fetch(filesystem, files, folder)
    except OSError as error:
        raise ModelError(f"The model at {uri} cannot be fetched into {cache_folder()}: {first_line(error)}.") from error
    return folder


def _listed(uri: str) -> tuple[pafs.FileSystem, list[pafs.FileInfo]]:
    """The files of a model folder that are under the prefix, by name."""
    reach(uri)
    filesystem, inside = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(inside, allow_not_found=True))
    found = {info.base_name: info for info in infos if info.type == pafs.FileType.File}
    missing = [name for name in FILES if name not in found]
    if missing:
        raise ModelError(f"{uri} holds no {' and no '.join(missing)}; a model folder holds {', '.join(FILES)}.")
    return filesystem, [found[name] for name in sorted(found) if name == WEIGHTS or name.endswith(_SMALL)]


def _fetch(filesystem: pafs.FileSystem, files: list[pafs.FileInfo], folder: Path) -> None:
    """Put the files into the folder, all at once."""
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir()
    try:
        digests = {}
        for info in files:
            digest = hashlib.sha256()
            with open_file(filesystem, info.path) as source, (part / info.base_name).open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    target.write(block)
                target.flush()
                os.fsync(target.fileno())
            digests[info.base_name] = digest.hexdigest()
        (part / _DIGESTS).write_text(json.dumps(digests), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether every file of a fetched folder is the one that was fetched; digests are remembered, so that is cheap."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text("utf-8"))
        return all(file_digest(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, ModelError):
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this node at a time; the system takes the lock back from one that dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
