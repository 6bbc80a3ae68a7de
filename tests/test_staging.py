from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import Product, Reason, Rejected
from pipeline.run.ledger import Ledger, work_key
from pipeline.run.partition import PartitionResult
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


def test_the_ledger_takes_only_what_is_whole_and_of_the_same_key(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    path = Path(ledger.staged_path("part"))
    result = PartitionResult("part", str(path), _write(path), {"texts": 1, "images": 1}, {"read": 0.1}, 0.5)
    key = work_key("part", "size:time", "fingerprint")
    assert ledger.find("part", key) is None, "a staged file without an entry does not count"
    ledger.record(result, key)
    assert ledger.find("part", key) == result
    assert ledger.find("part", work_key("part", "size:time", "another model")) is None
    assert ledger.find("other", key) is None
    assert [entry["name"] for entry in ledger.entries()] == ["part"]
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-1])
    assert ledger.find("part", key) is None, "a file that changed since does not count"
    path.unlink()
    assert ledger.find("part", key) is None
    (tmp_path / f"{path.name}.0123456789ab.tmp").write_bytes(b"of a writer that was killed")
    ledger.forget({"part": result})
    assert list(tmp_path.iterdir()) == []
    ledger.forget({"part": result})


def test_a_damaged_entry_is_no_entry(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    path = Path(ledger.staged_path("part"))
    ledger.record(PartitionResult("part", str(path), _write(path), {}, {}, 0.0), "key")
    (entry,) = tmp_path.glob("*.json")
    entry.write_text(entry.read_text()[:20])
    assert ledger.find("part", "key") is None
    assert ledger.entries() == []
