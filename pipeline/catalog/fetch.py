"""References in the images column to the bytes they name: under the root, or over http(s) where that is switched on."""

from __future__ import annotations

import errno
import os
import posixpath
import random
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pyarrow.fs as pafs

from pipeline.catalog.fetch_http import HttpReader
from pipeline.catalog.fetch_url import shortened
from pipeline.catalog.fetch_wire import (
    Connector,
    Resolver,
    read_capped,
    system_connector,
    system_resolver,
    too_large,
)
from pipeline.config import FetchConfig
from pipeline.errors import ImageRejected
from pipeline.paths import is_uri, resolve
from pipeline.records import ImageLimits, Reason

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HTTP = re.compile(r"https?://", re.IGNORECASE)
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a fifo without a writer must not hold us
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_ODD = (errno.ELOOP, errno.ENXIO)
_OBJECT_READ_BYTES = 8_000_000


class Fetcher:
    """Reads referenced images. Safe for threads.

    Args:
        root: folder or prefix that references are relative to and must stay within, URLs apart.
        limits: `max_bytes` holds for what is announced and for what is read.
        config: whether and where URLs may lead; times and attempts, for object stores too.
        resolver: finds a host's addresses.
        connector: opens sockets to them.
    """

    def __init__(
        self,
        root: str,
        limits: ImageLimits,
        config: FetchConfig = FetchConfig(),  # noqa: B008 -- frozen
        *,
        resolver: Resolver = system_resolver,
        connector: Connector = system_connector,
    ) -> None:
        self._filesystem, path = resolve(root)
        self._is_local = isinstance(self._filesystem, pafs.LocalFileSystem)
        self._root = os.path.realpath(path) if self._is_local else path.rstrip("/")
        self._prefixes: tuple[str, ...] = ()
        if is_uri(root) and not self._is_local:
            written = root.partition("?")[0].rstrip("/")
            self._prefixes = (f"{written}/", f"{root.partition('://')[0]}://{self._root.lstrip('/')}/")
        self._max_bytes = limits.max_bytes
        self._config = config
        self._http = HttpReader(config, limits.max_bytes, resolver, connector) if config.http else None

    def fetch(self, reference: str) -> bytes:
        """The bytes behind a reference; what may pass is tried again, after a pause.

        Raises:
            ImageRejected: `fetch_refused` for a reference that leads out of the root, or to a URL that is not allowed;
                `image_not_found`; `image_too_large_bytes`; `fetch_failed` where reading fails.
        """
        read = self._reader(reference)
        attempt = 0
        while True:
            attempt += 1
            try:
                return read()
            except OSError as error:
                asked_s = getattr(error, "retry_after_s", 0.0)
                if attempt == self._config.max_attempts or asked_s > self._config.timeout_s:
                    raise ImageRejected(
                        Reason.FETCH_FAILED,
                        f"{shortened(reference.partition('?')[0])} cannot be read, attempt {attempt}: {error}",
                    ) from error
            pause_s = self._config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            time.sleep(max(min(pause_s, self._config.timeout_s), asked_s))

    def stat(self, reference: str) -> os.stat_result:
        """Size and times of a file under a local root, which is opened and not read.

        Raises:
            ImageRejected: as of `fetch`; URLs and stores are refused.
        """
        if not reference.strip():
            raise ImageRejected(Reason.IMAGE_EMPTY, "the reference is blank")
        inside, told = self._inside(reference), shortened(reference)
        if not self._is_local:
            raise ImageRejected(Reason.FETCH_REFUSED, f"{told} is not a local file")
        with self._file(inside, told) as (_, found):
            return found

    def _reader(self, reference: str) -> Callable[[], bytes]:
        """What reads the reference once; raises OSError where another attempt may help."""
        if not reference.strip():
            raise ImageRejected(Reason.IMAGE_EMPTY, "the reference is blank")
        if _HTTP.match(reference):
            if self._http is None:
                raise ImageRejected(
                    Reason.FETCH_REFUSED,
                    f"{shortened(reference.partition('?')[0])} is a URL, and those are not read: set fetch.http=true "
                    "and name its host in fetch.allow_hosts",
                )
            return partial(self._http.read, reference)
        inside = self._inside(reference)
        return partial(self._read_file if self._is_local else self._read_object, inside, shortened(reference))

    def _inside(self, reference: str) -> str:
        """The reference as a path relative to the root, by its letters alone."""
        inside = next((reference[len(p) :] for p in self._prefixes if reference.startswith(p)), reference)
        if _SCHEME.match(inside) or any(part in inside for part in ("://", "\\", "\0")):
            raise ImageRejected(
                Reason.FETCH_REFUSED, f"{shortened(reference)} is not a path relative to the images' root"
            )
        if inside.startswith(("/", "~")) or ".." in inside.split("/"):
            raise ImageRejected(
                Reason.FETCH_REFUSED, f"{shortened(reference)} is absolute or climbs out of the images' root"
            )
        return inside

    def _read_object(self, inside: str, told: str) -> bytes:
        deadline = time.monotonic() + self._config.timeout_s
        try:
            with self._filesystem.open_input_file(posixpath.join(self._root, inside)) as file:
                if file.size() > self._max_bytes:
                    raise too_large(told, f"{file.size():,}", self._max_bytes)
                return read_capped(file.read, self._max_bytes, deadline, told, _OBJECT_READ_BYTES)
        except FileNotFoundError as error:
            raise _not_found(told) from error
        except (ImageRejected, OSError):
            raise
        except Exception as error:  # stores of fsspec raise what they like, and one image must not end the run
            raise OSError(f"{type(error).__name__} {error}") from error

    def _read_file(self, inside: str, told: str) -> bytes:
        """A local file. A failing disk is not asked again."""
        with self._file(inside, told) as (file, _):
            deadline = time.monotonic() + self._config.timeout_s
            return read_capped(partial(os.read, file), self._max_bytes, deadline, told)

    @contextmanager
    def _file(self, inside: str, told: str) -> Iterator[tuple[int, os.stat_result]]:
        """A local file's descriptor, and what it is: a regular file that is not too large."""
        try:
            file = self._opened(inside, told)
            try:
                kind = os.fstat(file)
                if stat.S_ISDIR(kind.st_mode):
                    raise _not_found(told)
                if not stat.S_ISREG(kind.st_mode):
                    raise ImageRejected(Reason.FETCH_REFUSED, f"{told} is a device or pipe, no file")
                if kind.st_size > self._max_bytes:
                    raise too_large(told, f"{kind.st_size:,}", self._max_bytes)
                yield file, kind
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            if number in _ABSENT:
                raise _not_found(told) from error
            reason = Reason.FETCH_REFUSED if number in _ODD else Reason.FETCH_FAILED
            raise ImageRejected(reason, f"{told} cannot be read: {error}") from error

    def _opened(self, inside: str, told: str) -> int:
        """A descriptor of a file under the root.

        Links are resolved first, and what they lead to is then opened part by part without following any: a link that
        is put there in between is not followed either.
        """
        path = os.path.realpath(f"{self._root}/{inside}")
        if os.path.commonpath([self._root, path]) != self._root:
            raise ImageRejected(Reason.FETCH_REFUSED, f"{told} leads out of the images' root through a link")
        *folders, name = path[len(self._root) :].strip("/").split("/")
        folder = os.open(self._root, _FOLDER)
        try:
            for part in folders:
                outer, folder = folder, os.open(part, _FOLDER, dir_fd=folder)
                os.close(outer)
            return os.open(name or ".", _FILE, dir_fd=folder)
        finally:
            os.close(folder)


def _not_found(told: str) -> ImageRejected:
    return ImageRejected(Reason.IMAGE_NOT_FOUND, f"there is no file {told} under the images' root")
