"""Who holds the writer's lease: its row, and whether that process still runs."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """Who holds the lease, as its row says.

    Attributes:
        token: of one acquisition; no two have the same.
        system: boot of the machine and namespace of its process numbers; empty where that is unknown.
        process_start: in clock ticks since that boot, because process numbers are used again; None where unknown.
        ttl_s: as many seconds after `renewed_at` anyone may take the lease.
    """

    token: str
    run_id: str
    job: str
    host: str
    pid: int
    system: str
    process_start: int | None
    acquired_at: datetime
    renewed_at: datetime
    ttl_s: float
    is_released: bool = False

    @property
    def has_died(self) -> bool:
        """Whether the process is known to be gone: it ran on this very system, and runs no more."""
        return self._is_here and process_start(self.pid) != self.process_start

    @property
    def is_this_process(self) -> bool:
        """Whether this very process took it."""
        return self._is_here and self.pid == os.getpid() and not self.has_died

    @property
    def _is_here(self) -> bool:
        return bool(self.system) and (self.host, self.system) == (socket.gethostname(), system_id())

    def describe(self, at: datetime | None = None) -> str:
        """`backfill 3f2a on host X (pid 123) since 12 minutes, renewed 4 s ago`."""
        at = at or datetime.now(UTC)
        since, renewed = (_age(at - moment) for moment in (self.acquired_at, self.renewed_at))
        return f"{self.job} {self.run_id} on host {self.host} (pid {self.pid}) since {since}, renewed {renewed} ago"


def this_process() -> tuple[str, int, str, int | None]:
    """Host, pid, system and start of this process, as `Holder` takes them."""
    return socket.gethostname(), os.getpid(), system_id(), process_start(os.getpid())


def system_id() -> str:
    """Boot and process namespace: only there does a process number mean a process that we can see."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def process_start(pid: int) -> int | None:
    """When a process of this system began, in clock ticks; None where it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(fields[18])


def _age(span: timedelta) -> str:
    seconds = max(span.total_seconds(), 0.0)
    for unit, size in (("days", 172_800), ("hours", 7200), ("minutes", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'hours': 3600, 'minutes': 60}[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"
