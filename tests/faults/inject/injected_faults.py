"""Faults at named functions: wrapped as their modules are imported, in whatever process of the job that is.

`FAULTS` is a JSON list of objects with the fields of `harness.Fault`; `FAULT_LOG` is the file that tells which came
true, one JSON object a line. Nothing here imports the project: the standard library is all that it needs.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import operator
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

DRIVER = "jobs.backfill"

_MEET_S, _MEMORY_STEP = 20.0, 1 << 26
_held: list[bytearray] = []
_calls: Counter[str] = Counter()


_LINGER_S = 2.0


def install() -> None:
    """Remember the driver's pid for its children, and wait for the imports of the named modules."""
    if DRIVER in sys.orig_argv and "FAULT_DRIVER" not in os.environ:
        os.environ["FAULT_DRIVER"] = str(os.getpid())
    sys.meta_path.insert(0, _Finder(json.loads(os.environ["FAULTS"])))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and puts the faults into it once it has run."""

    def __init__(self, faults: Sequence[dict[str, Any]]) -> None:
        self._faults = faults

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        faults = [fault for fault in self._faults if fault["at"].partition(":")[0] == name]
        if not faults:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                run: Callable[[ModuleType], None] = spec.loader.exec_module

                def run_and_wrap(module: ModuleType, run: Callable[[ModuleType], None] = run) -> None:
                    run(module)
                    for fault in faults:
                        _wrap(module, fault)

                setattr(spec.loader, "exec_module", run_and_wrap)  # noqa: B010  # mypy takes no assignment to a method
                return spec
        return None


def _wrap(module: ModuleType, fault: dict[str, Any]) -> None:
    """Put the fault before or after a function or method; a name that is not there is an error."""
    path, _, name = fault["at"].partition(":")[2].rpartition(".")
    owner = operator.attrgetter(path)(module) if path else module
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        is_meant = _is_meant(fault, args)
        if is_meant and fault["action"] == "say_yes":
            return True
        if is_meant and fault["when"] == "before":
            _come_true(fault, args)
        result = function(*args, **kwargs)
        if is_meant and fault["when"] == "after":
            _come_true(fault, args)
        return result

    setattr(owner, name, wrapped)


def _is_meant(fault: dict[str, Any], args: tuple[Any, ...]) -> bool:
    """Whether this call is the one: of the right number, on the poisoned image, on more rows than are harmless."""
    poison = fault["poison"].encode()
    if poison and not any(isinstance(arg, bytes) and poison in arg for arg in args):
        return False
    if fault["over_rows"] is not None and len(args[-1]) <= fault["over_rows"]:
        return False
    key = f"{fault['at']} {fault['when']} {fault['action']}"
    _calls[key] += 1
    return not fault["nth"] or _calls[key] == fault["nth"]


def _come_true(fault: dict[str, Any], args: tuple[Any, ...]) -> None:
    if fault["is_once"] and not _is_first_of_all_processes(fault):
        return
    _tell(fault, args)
    ACTIONS[fault["action"]](fault)


def _is_first_of_all_processes(fault: dict[str, Any]) -> bool:
    try:
        mark = f"{os.environ['FAULT_LOG']}.{fault['action']}"
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _tell(fault: dict[str, Any], args: tuple[Any, ...]) -> None:
    """One line in the log, whole even where several processes write."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    line = {
        "action": fault["action"],
        "at": fault["at"],
        "when": fault["when"],
        "pid": os.getpid(),
        "names": [arg.partition.name for arg in args if type(arg).__name__ == "Work"],
        "peak_bytes": int(peak.split()[1]) * 1024,
        "time": time.time(),
    }
    descriptor = os.open(os.environ["FAULT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    time.sleep(600)  # what comes after this moment does not happen, in this process either


def _raylet() -> int:
    """The raylet that started this worker."""
    command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if b"raylet" not in command.partition(b"\0")[0]:
        raise RuntimeError(f"the parent of a worker is no raylet: {command!r}")
    return os.getppid()


def _crash(_: dict[str, Any]) -> None:
    ctypes.string_at(0)


def _hang(_: dict[str, Any]) -> None:
    while True:
        time.sleep(3600)


def _hang_in_c(_: dict[str, Any]) -> None:
    """No other thread of this process runs any more: the interpreter's lock is held through the call."""
    ctypes.PyDLL(None).sleep(3600)


def _use_memory(fault: dict[str, Any]) -> None:
    """Touch memory until there is no more, or so much that any sensible limit is far behind; then give it back."""
    try:
        while len(_held) * _MEMORY_STEP < fault["memory_bytes"]:
            _held.append(bytearray(b"\1") * _MEMORY_STEP)
            time.sleep(0.01)
    finally:
        _held.clear()


def _out_of_memory(_: dict[str, Any]) -> None:
    raise MemoryError("injected")


def _fail(fault: dict[str, Any]) -> None:
    number = getattr(errno, fault["error"])
    raise OSError(number, os.strerror(number), "injected")


def _meet(fault: dict[str, Any]) -> None:
    """Wait for the other processes at this point, for some seconds."""
    folder = Path(os.environ["FAULT_MEETING"])
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + _MEET_S
    while len(list(folder.iterdir())) < fault["parties"] and time.monotonic() < until:
        time.sleep(0.02)


def _linger(_: dict[str, Any]) -> None:
    """As slow as a partition of some size."""
    time.sleep(_LINGER_S)


# "say_yes" is none of these: the function is not run at all, and its answer is True.
ACTIONS: dict[str, Callable[[dict[str, Any]], None]] = {
    "note": lambda fault: None,
    "kill_driver": lambda fault: _kill(int(os.environ["FAULT_DRIVER"])),
    "kill_self": lambda fault: _kill(os.getpid()),
    "kill_raylet": lambda fault: _kill(_raylet()),
    "crash": _crash,
    "hang": _hang,
    "hang_in_c": _hang_in_c,
    "use_memory": _use_memory,
    "out_of_memory": _out_of_memory,
    "fail": _fail,
    "meet": _meet,
    "linger": _linger,
}
