"""The import rules: rooms stand on floors, and a dependency has one owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "pipeline"
FLOORS = {"model": 1, "catalog": 2, "store": 2, "run": 3, "query": 3, "evaluate": 4, "serve": 4}
OWNERS = {
    "ray": ("run/pool.py", "run/cluster.py", "run/worker.py", "run/tasks.py", "run/metrics.py"),
    "lance": ("store/",),
    "lancedb": ("store/", "query/searcher.py", "query/filters.py", "query/nearest.py"),
    "torch": ("model/", "run/embed.py"),
    "transformers": ("model/",),
    "tokenizers": ("model/",),
    "safetensors": ("model/",),
    "huggingface_hub": ("model/",),
    "fastapi": ("serve/app.py",),
    "starlette": ("serve/",),
    "uvicorn": ("serve/listen.py",),
    "pydantic": ("serve/",),
    "prometheus_client": ("serve/metrics.py",),
    "sklearn": ("query/rerank.py", "store/indices.py"),
    "scipy": ("evaluate/statistics.py",),
    "matplotlib": ("evaluate/plots.py",),
}
FILES = sorted(PIPELINE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            yield node.module or ""


def broken_rules(path: Path, modules: Iterator[str]) -> list[str]:
    """What is wrong with a file's imports."""
    inside = path.relative_to(PIPELINE).as_posix()
    room = inside.split("/")[0] if "/" in inside else ""
    wrong = []
    for module in modules:
        top, *rest = module.split(".")
        if top in OWNERS and not inside.startswith(OWNERS[top]):
            wrong.append(f"{inside} imports {module}, which belongs to {', '.join(OWNERS[top])}")
        if top == "jobs":
            wrong.append(f"{inside} imports a job")
        other = rest[0] if top == "pipeline" and rest and rest[0] in FLOORS else ""
        if other and other != room and (not room or FLOORS[other] >= FLOORS[room]):
            wrong.append(f"{inside} imports {module}, which is not on a floor below")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PIPELINE).as_posix())
def test_rooms_and_owners(path: Path) -> None:
    assert broken_rules(path, imported(path)) == []


@pytest.mark.parametrize(
    ("file", "module"),
    [("query/x.py", "pipeline.run.plan"), ("store/x.py", "pipeline.catalog.fetch"), ("catalog/x.py", "lance"),
     ("model/x.py", "pipeline.run.pool"), ("errors.py", "pipeline.model"), ("run/embed.py", "ray.util.metrics"),
     ("run/plan.py", "jobs.backfill")],
)  # fmt: skip
def test_the_rule_finds_what_it_forbids(file: str, module: str) -> None:
    assert broken_rules(PIPELINE / file, iter([module]))


def test_packages_are_empty_but_for_what_they_hand_out() -> None:
    for path in PIPELINE.rglob("__init__.py"):
        if path.parent.name not in ("pipeline", "model", "query"):
            assert path.read_text().strip() == "", path


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("pipeline.query", ("torch", "ray", "transformers", "sklearn", "PIL", "fastapi", "pydantic")),
        ("jobs.serve", ("torch", "lancedb", "fastapi", "uvicorn", "pyarrow")),
        ("pipeline.serve.app", ("torch", "ray", "lancedb", "PIL")),
        ("pipeline.catalog.partitions", ("torch", "ray", "PIL", "lance", "lancedb")),
        ("jobs.backfill", ("torch", "ray", "transformers", "lancedb", "pyarrow")),
        ("pipeline.run.worker", ("torch", "lance", "lancedb", "pandas")),  # what an actor's start waits for
        ("jobs.import_table", ("torch", "ray", "lancedb", "pyarrow")),
        ("pipeline.catalog.importing", ("torch", "ray", "PIL", "lance", "lancedb")),
        ("jobs.rayjob", ("ray", "lance", "numpy", "pyarrow")),
    ],
)
def test_importing_is_light(module: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
