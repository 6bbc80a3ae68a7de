"""References in the images column to the bytes they name, inside the catalog's root and nowhere else."""

from __future__ import annotations

import os
import posixpath

import pyarrow.fs as pafs

from pipeline.errors import ImageRejected
from pipeline.paths import resolve
from pipeline.records import ImageLimits, Reason


class Fetcher:
    """Reads referenced images. Safe for threads.

    Args:
        root: folder or prefix that every reference is relative to and must stay within.
        limits: `max_bytes` is checked before the file is read.
    """

    def __init__(self, root: str, limits: ImageLimits) -> None:
        self._filesystem, path = resolve(root)
        self._is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._root = os.path.realpath(path) if self._is_local else path.rstrip("/")
        self._limits = limits

    def fetch(self, reference: str) -> bytes:
        """The bytes behind a reference.

        Raises:
            ImageRejected: `fetch_refused` for a reference that is absolute, a URL, or leads out of the root;
                `image_not_found`; `image_too_large_bytes`; `fetch_failed` where reading fails.
        """
        path = self._inside(reference)
        try:
            info = self._filesystem.get_file_info(path)
            if info.type != pafs.FileType.File:
                raise ImageRejected(Reason.IMAGE_NOT_FOUND, f"there is no file {reference!r} under the images' root")
            if info.size > self._limits.max_bytes:
                raise ImageRejected(
                    Reason.IMAGE_TOO_LARGE_BYTES,
                    f"{reference!r} has {info.size:,} bytes; images.max_bytes is {self._limits.max_bytes:,}",
                )
            with self._filesystem.open_input_file(path) as file:
                return bytes(file.read())
        except OSError as error:
            raise ImageRejected(Reason.FETCH_FAILED, f"{reference!r} cannot be read: {error}") from error

    def _inside(self, reference: str) -> str:
        """The reference's path under the root."""
        if not reference.strip():
            raise ImageRejected(Reason.IMAGE_EMPTY, "the reference is blank")
        if "://" in reference or "\\" in reference or "\0" in reference:
            raise ImageRejected(Reason.FETCH_REFUSED, f"{reference!r} is not a path relative to the images' root")
        if reference.startswith(("/", "~")) or ".." in reference.split("/"):
            raise ImageRejected(Reason.FETCH_REFUSED, f"{reference!r} is absolute or climbs out of the images' root")
        path = posixpath.join(self._root, reference)
        if self._is_local and os.path.commonpath([self._root, os.path.realpath(path)]) != self._root:
            raise ImageRejected(Reason.FETCH_REFUSED, f"{reference!r} leads out of the images' root through a link")
        return path
