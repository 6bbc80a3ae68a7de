"""Local paths and object-store URIs, through one filesystem interface."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs


def is_uri(path: str) -> bool:
    """Whether the path names its filesystem, as `s3://bucket/prefix` does."""
    return "://" in path


def absolute(path: str) -> str:
    """A local path made absolute; a URI or an empty path as it is."""
    return path if not path or is_uri(path) else str(Path(path).expanduser().absolute())


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it (absolute for a local one).

    Raises:
        OSError: the URI's filesystem is unknown or cannot be reached.
    """
    if is_uri(path):
        try:
            filesystem, inside = pafs.FileSystem.from_uri(path)
        except pa.ArrowInvalid as error:
            raise OSError(f"{path}: {error}") from error
        return filesystem, inside
    return pafs.LocalFileSystem(), absolute(path)


def exists(path: str) -> bool:
    """Whether a file, folder or prefix is there."""
    filesystem, inside = resolve(path)
    return bool(filesystem.get_file_info(inside).type != pafs.FileType.NotFound)


def list_names(folder: str) -> list[str]:
    """Names directly in a folder or prefix; empty where it is not there."""
    filesystem, inside = resolve(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inside, allow_not_found=True))
    return [info.base_name for info in infos]
