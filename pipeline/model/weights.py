"""Weights from a safetensors file, strictly: never pickle, equal keys and shapes, mapped instead of read.

The header of the file is parsed here, so that a damaged or foreign file is named as such before torch is asked to map
it, and so that a run can be refused without building a tower.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.errors import ModelError
from pipeline.model.image_tower import ImageConfig, rope_table

Tower = TypeVar("Tower", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]

TEXT_PREFIX = "text_model.transformer."
IMAGE_PREFIX = "vision_model."

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""

_ROPE_TOLERANCE = 1e-4
"""Between a stored rotary table and the computed one; another `pt_hw_seq_len` moves entries by over 0.1."""

_SETTLED_S = 2.0
"""A file touched within this many seconds may change again under the same mtime, so its digest is not remembered."""


class _NoDraws(TorchFunctionMode):
    """Leaves normal draws out: for a tensor without storage torch would import its compiler first, which takes 2 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


@contextmanager
def without_storage() -> Iterator[None]:
    """Modules made in here have keys, shapes and dtypes, and no numbers yet: `fill_tower` brings those."""
    with torch.device("meta"), _NoDraws():
        yield


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Raises:
        ModelError: missing, truncated, padded, or not safetensors at all.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            text = file.read(length) if 0 < length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); fetch the model again.") from error
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] <= b"\x05" and not text.startswith(b"{")):
        raise ModelError(f"{path} is a pickle under another name; this project loads safetensors only.")
    if size < 8 or length > size - 8:
        raise ModelError(f"{path} is truncated or no safetensors file: {size} bytes; fetch the model again.")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        header = {key: TensorInfo(entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()}
        ends = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{path} is no safetensors file: its header cannot be read; fetch the model again.") from error
    for key, info in header.items():
        start, end = entries[key]["data_offsets"]
        if end - start != math.prod(info.shape) * _ITEM_BYTES.get(info.dtype, -1):
            raise ModelError(f"{path}: tensor {key} is {info.dtype} {list(info.shape)} but holds {end - start} bytes.")
    expected = 8 + length + (ends[-1][1] if ends else 0)
    if size != expected:
        fault = "truncated" if size < expected else "longer than its header says"
        raise ModelError(f"{path} is {fault}: {size} bytes, its header describes {expected}; fetch the model again.")
    return header


def check_tensors(path: Path, header: Mapping[str, TensorInfo], expected: Shapes) -> None:
    """Compare keys and shapes with what the towers hold.

    Raises:
        ModelError: listing what is missing, unknown and misshapen.
    """
    missing = sorted(expected.keys() - header.keys())
    unknown = sorted(header.keys() - expected.keys())
    misshapen = [
        f"{key} {list(header[key].shape)} instead of {list(shape)}"
        for key, shape in sorted(expected.items())
        if key in header and header[key].shape != shape
    ]
    faults = [("missing", missing), ("unknown", unknown), ("misshapen", misshapen)]
    if any(found for _, found in faults):
        lists = "; ".join(f"{len(found)} {fault}: {_some(found)}" for fault, found in faults if found)
        raise ModelError(f"{path} does not hold the weights that config.json describes: {lists}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_rope_table(key: str) -> bool:
    """Whether a key is the one tolerated extra: a rotary table that older savings of the published model hold."""
    return key.startswith(IMAGE_PREFIX) and key.endswith((".freqs_cos", ".freqs_sin"))


def check_rope_tables(path: Path, header: Mapping[str, TensorInfo], config: ImageConfig) -> None:
    """Compare stored rotary tables with the computed ones; they prove `pt_hw_seq_len` and `intp_freq`.

    Raises:
        ModelError: another shape or other values.
    """
    keys = [key for key in header if is_rope_table(key)]
    if not keys:
        return
    cos, sin = rope_table(config)
    with safe_open(path, framework="pt", device="cpu") as file:
        for key in keys:
            want, stored = cos if key.endswith("cos") else sin, file.get_tensor(key)
            if stored.shape != want.shape or not torch.allclose(stored.float(), want, rtol=0.0, atol=_ROPE_TOLERANCE):
                raise ModelError(
                    f"{path}: {key} differs from the rotary table that config.json gives; check vision_config's "
                    "pt_hw_seq_len and intp_freq."
                )


def shapes_of(tower: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes as they stand in the file."""
    return {prefix + key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()}


def fill_tower(tower: Tower, path: Path, prefix: str, *, dtype: torch.dtype, device: torch.device) -> Tower:
    """Give a tower that was built on the meta device its weights.

    In float32 on the CPU the tensors are views of the mapped file: processes on a node share one copy in memory.

    Raises:
        ModelError: a tensor is missing, misshapen or not finite, or something was left without a value.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {key: file.get_tensor(prefix + key).to(device, dtype) for key in tower.state_dict()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{path}: {prefix}{key} holds NaN or infinite values in {dtype}; fetch the model again.")
    try:
        tower.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path} does not fit the tower: {error}") from error
    left = [key for key, tensor in tower.named_parameters() if tensor.is_meta]
    left += [key for key, _ in tower.named_buffers()]
    if left:
        raise ModelError(f"{path}: {_some(left)} got no value from the file.")
    return tower.eval().requires_grad_(False)


def cache_folder() -> Path:
    """Where digests are remembered: `$XDG_CACHE_HOME/twotower`, else `~/.cache/twotower`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, lowercase hex, remembered by path, size and times so that large weights are hashed once.

    The change time stands beside the modification time because the latter can be set back by a copy. A cache that
    cannot be written costs the time to hash again and nothing else.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        path = path.resolve(strict=True)
        before = path.stat()
        key = f"{path}|{before.st_size}|{before.st_mtime_ns}|{before.st_ctime_ns}"
        memo = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()
        if memo.is_file():
            known = memo.read_text("ascii")
            if len(known) == 64:
                return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        settled = time.time() - max(before.st_mtime, before.st_ctime) > _SETTLED_S
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); fetch the model again.") from error
    if settled:
        _remember(memo, digest)
    return digest


def _remember(memo: Path, digest: str) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part = memo.with_suffix(f".{os.getpid()}")
        part.write_text(digest, "ascii")
        part.replace(memo)
    except OSError:
        return  # a read-only home is normal on a cluster
