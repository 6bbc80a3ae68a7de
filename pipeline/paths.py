"""Local paths and object-store URIs, through one filesystem interface and one set of settings."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

_S3 = ("s3", "s3a")
_ATTEMPTS = 6  # of a request to S3, with pauses of seconds at the end
_CONNECT_TIMEOUT_S = 10.0  # the SDK's own is 1
_SILENCE_TIMEOUT_S = 60.0  # a store may be slow; the SDK would take 3 seconds without a byte for a dead connection
_READ_ATTEMPTS = 4
_READ_PAUSE_S = 0.25


def is_uri(path: str) -> bool:
    """Whether the path names its filesystem, as `s3://bucket/prefix` does."""
    return "://" in path


def absolute(path: str) -> str:
    """A local path made absolute, without `..`, so that it has one name; a URI or an empty path as it is."""
    if not path or is_uri(path):
        return path
    whole = Path(path).expanduser().absolute()
    return str(whole.resolve() if ".." in whole.parts else whole)  # other links stay: they may point elsewhere tomorrow


def resolve(path: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a path or URI, and the path on it (absolute for a local one).

    Raises:
        OSError: the URI's filesystem is unknown or cannot be reached.
    """
    if not is_uri(path):
        return pafs.LocalFileSystem(), absolute(path)
    share_settings()
    parts = urlsplit(path, allow_fragments=False)
    try:
        # Settings in the URI itself are for pyarrow alone: Lance does not read them.
        if parts.scheme in _S3 and parts.netloc and not parts.query and "@" not in parts.netloc:
            return _s3(parts.netloc, *_s3_settings()), unquote(f"{parts.netloc}{parts.path}").rstrip("/")
        filesystem, inside = pafs.FileSystem.from_uri(path)
    except pa.ArrowInvalid as error:
        raise OSError(f"{path}: {error}") from error
    return filesystem, inside


def share_settings() -> None:
    """Have Lance read of an S3 endpoint what pyarrow reads; the environment is what both of them and Ray's workers see.

    Both know AWS_ENDPOINT_URL, the region and the credentials by themselves. Lance also has to be told that http is
    meant, and that three attempts are few for a store that throttles.
    """
    endpoint = _s3_endpoint()
    if endpoint.startswith("http://"):
        os.environ.setdefault("AWS_ALLOW_HTTP", "true")
    os.environ.setdefault("OBJECT_STORE_CLIENT_MAX_RETRIES", "10")


def reach(uri: str) -> None:
    """See within seconds that the store of a URI answers, and that its bucket is there; local paths pass.

    Raises:
        OSError: a few words that say why not.
    """
    if not is_uri(uri):
        return
    share_settings()
    parts = urlsplit(uri, allow_fragments=False)
    if parts.scheme not in _S3 or parts.query or "@" in parts.netloc:
        exists(uri)
        return
    try:
        info = _s3(parts.netloc, *_s3_settings(), attempts=2).get_file_info(parts.netloc)
    except OSError as error:
        raise OSError(_told(error, parts.netloc)) from error
    if info.type == pafs.FileType.NotFound:
        raise OSError(f"there is no bucket {parts.netloc} at {_s3_endpoint() or 'AWS'}")


def exists(path: str) -> bool:
    """Whether a file, folder or prefix is there."""
    filesystem, inside = resolve(path)
    return bool(filesystem.get_file_info(inside).type != pafs.FileType.NotFound)


def list_names(folder: str) -> list[str]:
    """Names directly in a folder or prefix; empty where it is not there."""
    filesystem, inside = resolve(folder)
    infos = filesystem.get_file_info(pafs.FileSelector(inside, allow_not_found=True))
    return [info.base_name for info in infos]


def open_file(filesystem: pafs.FileSystem, inside: str) -> pa.NativeFile:
    """A file for reading at any place; on a store, a read that fails is made again.

    pyarrow's S3 does that by itself, except where an error's own text is longer than what was asked for, as happens
    with Parquet columns of a few bytes.

    Raises:
        OSError: it cannot be opened.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.open_input_file(inside)
    return pa.PythonFile(_Persistent(filesystem.open_input_file(inside)), mode="r")


class _Persistent:
    """A readable file that tries again what failed."""

    def __init__(self, inner: pa.NativeFile) -> None:
        self._inner = inner
        self._size = int(inner.size())
        self._at = 0
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        wanted = self._size - self._at if size is None or size < 0 else min(size, self._size - self._at)
        if wanted <= 0:
            return b""
        attempt = 1
        while True:
            try:
                data: bytes = self._inner.read_at(wanted, self._at)
                break
            except FileNotFoundError:
                raise
            except OSError:
                if attempt == _READ_ATTEMPTS:
                    raise
                time.sleep(_READ_PAUSE_S * 2**attempt)
                attempt += 1
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True
        self._inner.close()


def _s3_endpoint() -> str:
    """What takes the place of AWS's own S3, if anything."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), "")


def _s3_settings() -> tuple[str, str, bool, bool]:
    """Endpoint, region, and whether buckets are host names and requests are unsigned, as the environment says."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""
    flags = (os.environ.get(name, "").lower() for name in ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_SKIP_SIGNATURE"))
    is_virtual, is_unsigned = (flag in ("true", "1", "yes") for flag in flags)
    return _s3_endpoint(), region, is_virtual, is_unsigned


@lru_cache(maxsize=64)
def _s3(
    bucket: str, endpoint: str, region: str, is_virtual: bool, is_unsigned: bool, *, attempts: int = _ATTEMPTS
) -> pafs.FileSystem:
    """The filesystem of a bucket, kept for the life of the process."""
    options: dict[str, Any] = {"endpoint_override": endpoint, "region": region or "us-east-1"} if endpoint else {}
    if not endpoint:
        options["region"] = region or pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        anonymous=is_unsigned,
        force_virtual_addressing=is_virtual,
        connect_timeout=_CONNECT_TIMEOUT_S,
        request_timeout=_SILENCE_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # a small file is one request
        **options,
    )


def _told(error: OSError, bucket: str) -> str:
    """What an SDK's error means for whoever set the environment."""
    said = str(error)
    place = _s3_endpoint() or "AWS"
    if "NETWORK_CONNECTION" in said:
        return f"the store at {place} cannot be reached ({said.rpartition('Details: ')[2]}); check AWS_ENDPOINT_URL"
    if "ACCESS_DENIED" in said or "HTTP status 403" in said or "INVALID_ACCESS_KEY" in said or "SIGNATURE" in said:
        return (
            f"the store at {place} does not let us into the bucket {bucket}: check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_REGION, and what they may do"
        )
    return said
