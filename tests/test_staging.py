from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.records import Product, Reason, Rejected
from pipeline.run.ledger import Ledger, dealt_ending, work_key
from pipeline.run.partition import PartitionResult, StagedFile
from pipeline.run.staging import EmbeddedInput, StagedWriter, file_sha256, staged_schema

DIM = 3
SCHEMA = staged_schema(DIM, [pa.field("price", pa.float64())])
CARRIED = [pa.field("price", pa.float64())]


def _product(row: int, *, is_first: bool = True) -> Product:
    names = dict.fromkeys(("title", "description", "broad_category", "fine_category"), "x")
    return Product(f"p{row}", row, is_first, "x", (), {**names, "price": 1.5} if is_first else {})


def _write(path: Path) -> str:
    vector = np.array([1, 0, 0], dtype=np.float32)
    with StagedWriter(str(path), SCHEMA, CARRIED) as writer:
        writer.write(
            [_product(0), _product(1, is_first=False)], [EmbeddedInput("p0", 0, "text", None, "aa", vector)], []
        )
        writer.write([], [], [])
        writer.write([], [], [Rejected("p1", 1, "image", Reason.IMAGE_CORRUPT, "why", 2, "bb")])
    return writer.sha256


def test_a_staged_file_holds_metadata_inputs_and_rejects(tmp_path: Path) -> None:
    digest = _write(tmp_path / "deep" / "a.parquet")
    rows = pq.read_table(tmp_path / "deep" / "a.parquet").to_pylist()
    assert [row["kind"] for row in rows] == ["row", "text", "image"]
    assert rows[0]["carried.price"] == 1.5
    assert rows[1]["vector"] == [1, 0, 0]
    assert rows[2]["vector"] is None
    assert (rows[2]["reason"], rows[2]["ordinal"]) == ("image_corrupt", 2)
    assert digest == file_sha256(str(tmp_path / "deep" / "a.parquet"))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.parquet"], "no temporary file stays"


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StagedWriter(str(tmp_path / "a.parquet"), SCHEMA, CARRIED):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def staged(ledger: Ledger, name: str = "part", *, files: int = 1) -> PartitionResult:
    """A partition staged in some files."""
    paths = [Path(ledger.staged_path(name)) for _ in range(files)]
    staged_files = tuple(StagedFile(str(path), _write(path), attempt) for attempt, path in enumerate(paths, 1))
    return PartitionResult(name, staged_files, {"texts": 1, "images": 1}, {"read": 0.1}, 0.5)


def test_the_ledger_takes_only_what_is_whole_and_of_the_same_key(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    facts = {"identity": "size:time", "fingerprint": "f"}
    result, key = staged(ledger, files=2), work_key(facts)
    assert ledger.find({"part": key}) == {}, "a staged file without an entry does not count"
    ledger.record(result, key, facts)
    assert ledger.find({"part": key}) == {"part": result}
    assert ledger.find({"part": work_key(facts | {"fingerprint": "another"}), "other": key}) == {}
    assert [(entry["name"], entry["fingerprint"]) for entry in ledger.entries()] == [("part", "f")]
    path = Path(result.files[1].path)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert ledger.find({"part": key}) == {}, "a file that changed since does not count"
    path.unlink()
    assert ledger.find({"part": key}) == {}
    (tmp_path / f"{path.name}.0123456789ab.tmp").write_bytes(b"of a writer that was killed")
    staged(ledger)  # an attempt that came to no entry
    staged(ledger, "other")
    ledger.forget(["part"])
    (other,) = tmp_path.iterdir()
    ledger.forget(["part", "other"])
    assert not other.exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_entry_is_no_entry(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, or any one byte another: pending again, whatever it says."""
    ledger = Ledger(str(tmp_path))
    ledger.forget(["part"])
    result = staged(ledger)
    ledger.record(result, "key", {"run_id": "r", "finished_at": "now"})
    (entry,) = tmp_path.glob("*.json")
    whole = entry.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        entry.write_bytes(whole[:at])
    else:
        entry.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :])
    assert ledger.find({"part": "key"}) == {}
    assert ledger.entries() == []


def test_only_old_files_that_no_entry_names_are_swept(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    result = staged(ledger)
    ledger.record(result, "key", {})
    young, old = tmp_path / "rejects-young.parquet", tmp_path / "a.parquet.1.tmp"
    for path in (young, old):
        path.write_bytes(b"x")
    for path in (old, Path(result.files[0].path), *tmp_path.glob("*.json")):
        os.utime(path, (0, 0))
    ledger.sweep()
    assert young.exists()
    assert not old.exists()
    assert ledger.find({"part": "key"}) == {"part": result}


def test_a_dead_runs_scratch_is_swept_once_old_and_what_it_dealt_at_once(tmp_path: Path) -> None:
    ours, theirs = f"1{dealt_ending('db')}", f"1{dealt_ending('another')}"
    for name, seconds in (("plan-dead", 0), ("plan-living", None), ("plan-empty", 0), ("plan-own", 0), ("other", 0)):
        (tmp_path / name).mkdir()
        for file in (ours, theirs, "1.scanned.parquet") if name != "plan-empty" else ():
            (tmp_path / name / file).write_bytes(b"x")
        for path in [*(tmp_path / name).iterdir(), tmp_path / name] if seconds is not None else []:
            os.utime(path, (seconds, seconds))
    Ledger(str(tmp_path)).sweep_scratch("own", "db")
    left = {folder.name: sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()}
    everything = sorted([ours, theirs, "1.scanned.parquet"])
    living = sorted([theirs, "1.scanned.parquet"])
    assert left == {"other": everything, "plan-own": everything, "plan-living": living}
