"""The faults themselves: each does what it says, where it says, and tells so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from harness import INJECT, POISON, Fault

AT = "colorsys:rgb_to_hsv"  # a module of the standard library that nothing else here imports
CALLS = "import threading, colorsys; [colorsys.rgb_to_hsv(i, 0, 0) for i in range(4)]; print('whole')"
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)); "


def run(
    folder: Path, fault: Fault, code: str = CALLS, path: str = "", timeout_s: float = 30
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    """Python with a fault in it: how it ended, and what came true."""
    log = folder / "faults.jsonl"
    env = {
        **os.environ,
        "PYTHONPATH": f"{INJECT}{os.pathsep}{path}",
        "FAULTS": json.dumps([asdict(fault)]),
        "FAULT_LOG": str(log),
        "FAULT_MEETING": str(folder),
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout_s)
    return done, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize(
    ("action", "code", "said"),
    [
        ("note", 0, ""),
        ("kill_self", -9, ""),
        ("crash", -11, ""),
        ("out_of_memory", 1, "MemoryError: injected"),
        ("fail", 1, "No space left on device"),
        ("kill_raylet", 1, "is no raylet"),
    ],
)
def test_a_fault_comes_true_at_the_named_call(action: str, code: int, said: str, tmp_path: Path) -> None:
    done, events = run(tmp_path, Fault(AT, action, nth=3))
    assert (done.returncode, "whole" in done.stdout) == (code, code == 0), done.stderr
    assert said in done.stderr
    assert [(event["action"], event["when"]) for event in events] == [(action, "before")]


@pytest.mark.parametrize("action", ["hang", "hang_in_c"])
def test_a_hang_hangs(action: str, tmp_path: Path) -> None:
    """Another thread goes on, unless the interpreter's lock is held."""
    beside = f"import threading, time, pathlib; beat = pathlib.Path({str(tmp_path / 'beat')!r})\n"
    beside += "threading.Thread(target=lambda: (time.sleep(0.5), beat.touch()), daemon=True).start()\n"
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, Fault(AT, action), beside + CALLS, timeout_s=6)
    assert (tmp_path / "beat").exists() == (action == "hang")


def test_memory_is_used_until_there_is_none(tmp_path: Path) -> None:
    done, _ = run(tmp_path, Fault(AT, "use_memory", memory_bytes=2 << 30), LIMITED + CALLS)
    assert "MemoryError" in done.stderr
    done, _ = run(tmp_path, Fault(AT, "use_memory", memory_bytes=1 << 27, is_once=False), LIMITED + CALLS)
    assert done.returncode == 0, done.stderr


def test_only_where_it_is_meant(tmp_path: Path) -> None:
    code = f"import base64; base64.b64encode(b'good'); base64.b64encode(b'is {POISON}')"
    fault = Fault("base64:b64encode", "fail", nth=0, poison=POISON, error="EROFS")
    done, events = run(tmp_path, fault, code)
    assert ("Read-only" in done.stderr, len(events)) == (True, 1)
    fault = Fault("base64:b64encode", "note", nth=0, is_once=False, over_rows=3)
    done, events = run(tmp_path, fault, "import base64; [base64.b64encode(b'a' * n) for n in (1, 3, 4, 9)]")
    assert (done.returncode, len([event for event in events if event["action"] == "note"])) == (0, 2)


def test_once_means_in_one_process(tmp_path: Path) -> None:
    assert [run(tmp_path, Fault(AT, "kill_self"))[0].returncode for _ in range(3)] == [-9, 0, 0]
    assert [run(tmp_path, Fault(AT, "fail", is_once=False))[0].returncode for _ in range(2)] == [1, 1]


def test_a_name_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done, _ = run(tmp_path, Fault("colorsys:rgb_to_mud"))
    assert "has no attribute 'rgb_to_mud'" in done.stderr


def test_another_sitecustomize_is_loaded_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the other one')")
    done, events = run(tmp_path, Fault(AT, "note"), path=str(tmp_path))
    assert done.stdout.split() == ["the", "other", "one", "whole"]
    assert len(events) == 1
