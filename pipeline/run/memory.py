"""Memory: kept for the next batch, bounded for each actor, and where it runs out, recognised and met by halving."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.errors import ConfigError

log = logging.getLogger(__name__)

_SAID = ("out of memory", "out_of_memory", "low on memory", "can't allocate memory", "bad_alloc")


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's `mallopt`, from its malloc.h."""

_KEPT_BYTES = 1 << 30
_FROM_HEAP_BYTES = 32 << 20  # the most that glibc takes for its threshold on 64 bits
_HEAP_BYTES = 64 << 20  # of each heap of a thread other than the first, on 64 bits


def keep_freed_memory() -> None:
    """Have this process keep up to a gigabyte of what it frees, for as long as it lives.

    By default glibc gives every block of some megabytes back at once, and the next layer's tensors are faulted in anew,
    page by page: a tenth of a tower's time on a CPU. A thread other than the first, as an actor's methods run in,
    allocates from heaps of 64 MB that are given back whole once they are empty, whatever the threshold: not where the
    padding is as large as a heap. New heaps then count as data in full, though untouched, which is why an actor whose
    memory is bounded is better off without all this. Nothing is done where there is no glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_MMAP_THRESHOLD, _FROM_HEAP_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_TOP_PAD, _HEAP_BYTES)


def give_back_freed_memory() -> None:
    """Have the allocators of Arrow and of C give back what this process has freed, for a task beside others.

    Arrow's keeps some hundred MB for itself, which Lance, with the other, cannot use; and each of Lance's threads has a
    heap of its own.
    """
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_out_of_memory(said: BaseException | str) -> bool:
    """Whether an error says that there is no memory left, on a GPU or beside it; torch's and Ray's say it in words."""
    return isinstance(said, MemoryError) or any(words in str(said).lower() for words in _SAID)


class FittingBatch:
    """Runs a tower over inputs, in halves where memory runs out; the size that fits is kept for what comes later.

    Safe for threads: of two that run out of memory at once, the smaller size counts.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._most: int | None = None

    def run(self, n: int, tower: Callable[[slice], np.ndarray]) -> np.ndarray:
        """Vectors float32 (n, D) of `n` inputs.

        Args:
            n: how many inputs, at least one.
            tower: gives the vectors of a slice of them.

        Raises:
            MemoryError: a single input does not fit.
        """
        parts: list[np.ndarray] = []
        at = 0
        while at < n:
            size = min(self._most or n, n - at)
            try:
                parts.append(tower(slice(at, at + size)))
                at += size
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise MemoryError(f"a single {self._kind} does not fit into memory: {error}") from error
                self._most = min(size // 2, self._most or size)
                log.warning("%d inputs at once do not fit into memory in the %s tower, %d are tried", size, self._kind,
                            self._most)  # fmt: skip
        return np.concatenate(parts)


def limit_memory(limit_bytes: int) -> None:
    """Bound this process, as it stands with its model loaded: beyond the limit allocations fail, which Python survives.

    What counts is private memory that can be written (RLIMIT_DATA, of which Linux also counts anonymous mappings since
    4.7). Reserved but untouched memory is in it, so the bound is set by what may still come, not by the total.

    Raises:
        ConfigError: the process is over the limit already.
    """
    sizes = _sizes()
    if sizes is None:
        log.warning("pool.memory_per_actor_bytes is not enforced on this operating system")
        return
    resident, data = sizes
    if resident >= limit_bytes:
        raise ConfigError(
            f"pool.memory_per_actor_bytes is {limit_bytes:,}, but an actor takes {resident:,} bytes once its model is "
            "loaded; raise it"
        )
    import resource  # not everywhere, but where /proc is

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (data + limit_bytes - resident, hard))


def _sizes() -> tuple[int, int] | None:
    """Resident bytes, and bytes of writable private mappings, of this process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {name: text.split() for name, _, text in (line.partition(":") for line in lines)}
    return int(values["VmRSS"][0]) * 1024, int(values["VmData"][0]) * 1024
