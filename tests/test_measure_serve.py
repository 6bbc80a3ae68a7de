"""`jobs.measure_serve` on a small database."""

from __future__ import annotations

import json

import pytest
from served import catalog

from jobs.measure_serve import KINDS, describe, main


@pytest.mark.slow
def test_a_server_under_load(tmp_path, capsys):
    db = catalog(tmp_path / "db")
    assert main(["--db", db, "--clients", "8", "--seconds", "3", "--k", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["errors"] == {}
    assert set(told["kinds"]) == {*KINDS, "all"}
    assert told["requests"] == told["kinds"]["all"]["requests"] > 50
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in told["kinds"].values())
    assert all(mb > 50 for mb in told["memory_mb"].values())
    assert f"{told['requests']:,} requests in" in describe(told)


def test_a_server_that_does_not_start_is_said(tmp_path, capfd):
    assert main(["--db", str(tmp_path), "--seconds", "1"]) == 1
    err = capfd.readouterr().err
    assert "Nothing is released" in err
    assert "the server did not start" in err
    assert "Traceback" not in err
