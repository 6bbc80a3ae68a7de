"""What the documents say is run, or compared with the code."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import Config, load_config
from pipeline.records import Reason

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "pipeline" / "README.md").read_text(encoding="utf-8")
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if path.stem not in ("__init__", "cli"))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a module of the checkout in another folder, as a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=500
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small demo has run, as `make demo` runs it."""
    folder = tmp_path_factory.mktemp("demo")
    done = run("-m", "jobs.demo", "--products", "150", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.mark.ray
def test_the_demo_shows_what_it_promises(demo: Path) -> None:
    told = (demo / "stdout.txt").read_text()
    assert "150 products" in told
    assert re.search(r"release    1 in ", told)
    for mode in ("text", "image", "avg", "diversified"):
        assert f"({mode})" in told
    assert len(told.split("next:\n")[1].strip().splitlines()) == 4
    with Image.open(demo / ".demo" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 500
    again = run("-m", "jobs.demo", "--products", "150", cwd=demo)
    assert again.returncode == 0, again.stderr
    assert "drawn before" in again.stdout
    assert "release    1 stays: nothing changed" in again.stdout


@pytest.mark.ray
def test_the_demo_counts_what_was_drawn(demo: Path, tmp_path: Path) -> None:
    from pipeline.catalog.demo import write_demo_catalog

    manifest = write_demo_catalog(tmp_path / "again", products=150)
    status = json.loads(run("-m", "jobs.status", "--db", ".demo/db", "--json", cwd=demo).stdout.splitlines()[-1])
    assert status["rejects"] == manifest.bad
    assert status["releases"][0]["products"] == manifest.products


@pytest.mark.ray
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs(demo: Path, snippet: str) -> None:
    done = run("-W", "error", "-c", snippet, cwd=demo)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.ray
def test_hits_as_json(demo: Path) -> None:
    done = run("-m", "jobs.search", "red dress", "--db", ".demo/db", "--json", "--where", "price<100", cwd=demo)
    hits = json.loads(done.stdout)
    assert [hit["rank"] for hit in hits] == list(range(1, 11))
    assert all(hit["fields"]["price"] < 100 for hit in hits)


def test_there_are_snippets_for_each_reader() -> None:
    for package in ("Searcher", "lancedb", "duckdb", "polars", "pandas"):
        assert any(package in snippet for snippet in SNIPPETS), package


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_documented_and_explains_itself(job: str) -> None:
    assert f"{job}.py" in README
    done = run("-m", f"jobs.{job}", "--help", cwd=ROOT)
    assert done.returncode == 0
    assert f"python -m jobs.{job}" in done.stdout


def test_every_file_is_in_the_tree_and_every_module_on_the_architecture_page() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]:
        if path.stem == "__init__" or path.name.startswith("demo_"):
            continue
        assert path.name in tree, path
        if path.is_relative_to(ROOT / "pipeline"):
            assert path.stem in ARCHITECTURE, path
    folders = [ROOT / name for name in ("pipeline", "jobs", "tests", "infra")]
    existing = {path.name for folder in folders for path in folder.rglob("*.py")}
    assert set(re.findall(r"[a-z0-9_]+\.py", tree)) <= existing


def test_every_setting_in_the_readme_exists() -> None:
    names = {field.name for field in dataclasses.fields(Config)}
    table = README.split("### Settings")[1].split("## ")[0]
    for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", table):
        section, _, key = name.partition(".")
        if key:
            assert section in names, name
            assert key in vars(getattr(load_config(), section)) or hasattr(getattr(load_config(), section), key), name


def test_the_number_of_reasons() -> None:
    assert f"one of {len(Reason)} reasons" in README
