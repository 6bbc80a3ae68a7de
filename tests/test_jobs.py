"""The command lines of backfill and status: one sentence, an exit code, one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalog import items, write_products

from jobs import backfill, cli, status
from pipeline.errors import RunInterrupted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--catalog", "{}/none"], "there is no catalog at"),
        (["--catalog", "{}/empty"], "holds no Parquet file"),
        (["--catalog", "{}/no_id"], "has no column 'product_id'"),
        (["--catalog", "{}/mixed"], "1 and '1' would become one product"),
        (["--model", "{}/no_model"], "no_model"),
        (["--set", "pool.gpsu=2"], "unknown setting pool.gpsu"),
        (["--config", "{}/none.toml"], "cannot read the config file"),
        (["--catalog", ""], "--catalog is missing"),
        (["--db", "{}/good/part-00000.parquet"], "is a file; give a folder"),
        (["--db", "{}/good/part-00000.parquet/deep/db"], "is a file; give a folder"),
        (["--set", "staging.path={}/good/part-00000.parquet"], "is a file; give a folder"),
    ],
)
def test_what_cannot_start_is_one_sentence_and_exit_2(
    tmp_path: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    write_products(tmp_path / "good", [items(2)])
    for name in ("empty", "no_id", "mixed"):
        (tmp_path / name).mkdir()
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "no_id" / "a.parquet")
    pq.write_table(pa.table({"product_id": [1], "title": ["t"]}), tmp_path / "mixed" / "a.parquet")
    pq.write_table(pa.table({"product_id": ["1"], "title": ["t"]}), tmp_path / "mixed" / "b.parquet")
    given = ["--catalog", str(tmp_path / "good"), "--db", str(tmp_path / "db"), "--model", tiny_model, "--json"]
    code = backfill.main([*given, *(argument.replace("{}", str(tmp_path)) for argument in arguments)])
    out, err = capsys.readouterr()
    assert code == 2
    assert said in json.loads(out.splitlines()[-1])["error"]
    (sentence,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert said in sentence
    assert "Traceback" not in err
    assert not (tmp_path / "db").exists()


def test_status_of_nothing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for name in ("none", "file"):
        assert status.main(["--db", str(tmp_path / name)]) == 2
    assert "there is no database at" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "abc", "1.5"])
def test_a_limit_is_a_whole_number(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backfill.main(["--catalog", "c", "--db", "d", "--model", "demo", "--json", f"--limit={limit}"])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert "takes a whole number from 1" in err
    assert "takes a whole number from 1" in json.loads(out)["error"]


def test_an_error_keeps_its_code_and_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> dict[str, object]:
        raise RunInterrupted("stopped")

    def without_ray() -> dict[str, object]:
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    assert cli.run_job(interrupted, as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "stopped"
    assert cli.run_job(without_ray) == 2
    assert "pip install 'twotower[embed]'" in capsys.readouterr().err


def test_the_base_install_searches_by_vector_without_the_extras(tmp_path: Path) -> None:
    """Importing the query module and a job's command line needs no package of an extra."""
    import subprocess

    blocked = "torch", "ray", "transformers", "tokenizers", "safetensors", "PIL", "huggingface_hub"
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "from pipeline.query import Searcher, Diversify\nimport jobs.backfill, jobs.status, jobs.search\n"
        "raise SystemExit(jobs.backfill.main(['--catalog', 'x', '--db', 'y', '--model', 'demo']))"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "pip install 'twotower[" in done.stderr
    assert "Traceback" not in done.stderr
