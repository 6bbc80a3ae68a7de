"""A job as a process of its own, as people start it: its log, its last line, its children, and signals to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[1]
BACKFILL = ("-m", "jobs.backfill")
_OWN_RAY = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_CONFIG_JSON_ENV_VAR")


class JobProcess:
    """`python -m jobs.backfill`, or another command, in a session of its own.

    Args:
        arguments: of the job, `--json` included where it is wanted.
        folder: where its output and log are written.
        env: more environment variables.
        command: what Python runs, when it is not a backfill.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = BACKFILL,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        self._children: dict[int, str] = {}
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *command, *arguments],
                cwd=CHECKOUT, env=environment(env), stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of the job."""
        return self._process.pid

    @property
    def log(self) -> str:
        """Standard error so far."""
        return self._err.read_text()

    def last_line(self) -> dict[str, Any]:
        """The JSON object at the end of standard output."""
        result: dict[str, Any] = json.loads(self._out.read_text().splitlines()[-1])
        return result

    def is_running(self) -> bool:
        """Whether the job has not ended yet."""
        return self._process.poll() is None

    def children(self) -> list[str]:
        """Names of all processes below this one; they are remembered for `left_behind`."""
        self._children |= _descendants(self._process.pid)
        return list(self._children.values())

    def wait_until(self, is_there: Callable[[], object], timeout_s: float = 120) -> None:
        """Wait for a condition while the job runs."""
        deadline = time.monotonic() + timeout_s
        while not is_there():
            self.children()
            assert self._process.poll() is None, f"the job ended early: {self.log}"
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    def signal(self, number: signal.Signals, *, to_group: bool = False) -> None:
        """Send a signal to the job; to its whole group, as a terminal's Ctrl-C does."""
        self.children()
        (os.killpg if to_group else os.kill)(self._process.pid, number)

    def end(self, timeout_s: float = 120) -> int:
        """Wait for the end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while (code := self._process.poll()) is None:
            self.children()
            if time.monotonic() > deadline:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise AssertionError(f"the job did not end: {self.log}")
            time.sleep(0.05)
        return code

    def left_behind(self, within_s: float = 15) -> list[str]:
        """Names of children that still run after that time."""
        deadline = time.monotonic() + within_s
        while left := [name for pid, name in self._children.items() if _is_running(pid, name)]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return left


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A user's environment: this one, less what the tests set for a Ray of their own."""
    clean = {name: value for name, value in os.environ.items() if name not in _OWN_RAY}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return clean | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"} | dict(more or {})


def run_backfill(arguments: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> tuple[int, Any, str]:
    """Run the job to its end: exit code, the JSON object of its last line, its log."""
    job = JobProcess([*arguments, "--json"], folder, env)
    code = job.end()
    return code, job.last_line(), job.log


def _descendants(root: int) -> dict[int, str]:
    """Pid to command line of all processes below one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it ended meanwhile
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
        found |= more
    return {pid: line for pid in found - {root} if (line := command_line(pid))}


def command_line(pid: int) -> str:
    """Of a process; empty where it is gone, and for a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _is_running(pid: int, name: str) -> bool:
    """Whether the process is there; a zombie, or another one that took its number, is not."""
    now = command_line(pid)
    return bool(now) and ("ray" in now or now == name)
