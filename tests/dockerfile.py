"""A lint of our Dockerfile: hadolint's rules, and what it has no rule for."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Stage:
    """One FROM and what follows: instructions as (name, rest)."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)


def problems(text: str, ignored: str, targets: tuple[str, ...] = ("cpu", "cuda")) -> list[str]:
    """What is wrong with a Dockerfile.

    Args:
        text: its contents.
        ignored: contents of its .dockerignore.
        targets: stages that are run.
    """
    stages = _stages(text)
    found = [*_hadolint(text), *_bases(text, stages), *_copies(stages, ignored), *_runs(stages)]
    for name in targets:
        found += _target(name, stages)
    for secret in re.findall(r"^(?:ARG|ENV)\s+\w*(?:TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)\w*", text, re.MULTILINE):
        found.append(f"{secret}: a secret would stay in the image")
    return found


def _stages(text: str) -> list[Stage]:
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            stages.append(Stage(alias.strip() or str(len(stages)), base.strip()))
        elif stages:
            stages[-1].instructions.append((name, " ".join(rest.split())))
    return stages


def _hadolint(text: str) -> Iterator[str]:
    beside = Path(sys.executable).parent / "hadolint"
    binary = str(beside) if beside.exists() else shutil.which("hadolint")
    assert binary, "hadolint is not installed: make install"
    done = subprocess.run([binary, "--format", "json", "--no-color", "-"], input=text, capture_output=True, text=True)
    for fault in json.loads(done.stdout):
        yield f"line {fault['line']}: {fault['code']} {fault['message']}"


def _bases(text: str, stages: list[Stage]) -> Iterator[str]:
    defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", text.partition("FROM")[0], re.MULTILINE))
    for number, stage in enumerate(stages):
        base = re.sub(r"\$\{?(\w+)\}?", lambda m: defaults.get(m[1], ""), stage.base)
        if base == "scratch" or base in {before.name for before in stages[:number]}:
            continue
        if not re.fullmatch(r"[\w./-]+(:(?!latest$)[\w.-]*\d[\w.-]*)?(@sha256:[0-9a-f]{64})?", base) or (
            ":" not in base
        ):
            yield f"FROM {stage.base}: {base or 'nothing'} is pinned neither by tag nor by digest"


def _copies(stages: list[Stage], ignored: str) -> Iterator[str]:
    allowed = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    if "*" not in ignored.splitlines():
        yield "the .dockerignore lets everything through"
    for stage in stages:
        for name, rest in stage.instructions:
            if name == "ADD":
                yield f"ADD {rest}: it fetches and unpacks unasked; COPY does not"
            if name != "COPY":
                continue
            if source := re.search(r"--from=(\S+)", rest):
                if source[1] not in {s.name for s in stages}:
                    yield f"COPY --from={source[1]}: there is no such stage"
                continue
            for path in re.sub(r"--\S+ ", "", rest).split()[:-1]:
                if not (ROOT / path).exists():
                    yield f"COPY {path}: it does not exist"
                elif path not in allowed:
                    yield f"COPY {path}: the .dockerignore keeps it out"


def _runs(stages: list[Stage]) -> Iterator[str]:
    for stage in stages:
        for name, rest in stage.instructions:
            if name != "RUN":
                continue
            if "apt-get" in rest and not (
                "apt-get update" in rest and "--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists/*" in rest
            ):
                yield f"RUN {rest}: update, install --no-install-recommends and the removal of lists: one layer"
            for install in re.findall(r"pip install (?:(?!&&).)*", rest):
                if "--constraint constraints.txt" not in install and "--no-deps" not in install:
                    yield f"{install.strip()}: without constraints.txt, versions are whatever is newest"


def _target(name: str, stages: list[Stage]) -> Iterator[str]:
    """User, entrypoint and model check of a stage, those of the stages below it included."""
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        yield f"there is no target {name}"
        return
    chain, stage = [], by_name.get(name)
    while stage is not None:
        chain.insert(0, stage)
        stage = by_name.get(stage.base)
    last: dict[str, str] = {}
    runs = ""
    for stage in chain:
        for instruction, rest in stage.instructions:
            last[instruction] = rest
            runs += rest + "\n" if instruction == "RUN" else ""
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", last.get("USER", "")):
        yield f"target {name}: USER is {last.get('USER', 'not set')}; Kubernetes wants a number that is not root's"
    for instruction in ("ENTRYPOINT", "CMD"):
        if not last.get(instruction, "").startswith("["):
            yield f"target {name}: {instruction} is not in exec form, so signals do not arrive"
    if "python -m jobs.check_model" not in runs:
        yield f"target {name}: the model folder is not checked at build"
