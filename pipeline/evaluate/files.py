"""An evaluation as files: the report, its figures as JSON, a row for each query, the plots, and the times apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RunError, first_line
from pipeline.evaluate.page import page
from pipeline.evaluate.plots import described, plots
from pipeline.evaluate.results import Evaluation
from pipeline.shown import as_json


def figures_of(evaluation: Evaluation) -> dict[str, Any]:
    """All figures as what JSON can hold, without times, pictures and the examples' fields."""
    found = dataclasses.asdict(dataclasses.replace(evaluation, examples=(), seconds={}))
    del found["examples"], found["seconds"]
    for figure in found["diversity"]:
        del figure["milliseconds"]
    return found


def times_of(evaluation: Evaluation) -> dict[str, Any]:
    """What took how long."""
    added = {figure.method: figure.milliseconds for figure in evaluation.diversity if figure.milliseconds is not None}
    return {"seconds": dict(evaluation.seconds), "diversity_milliseconds": added}


def write_report(
    evaluation: Evaluation, folder: Path, *, thumbnails: Mapping[str, bytes], per_query: pa.Table
) -> dict[str, Path]:
    """Write everything into a folder; what an earlier evaluation left there is replaced.

    All files but `times.json` are the same to the byte for equal evaluations.

    Args:
        evaluation: what came out.
        folder: is made where it is not there.
        thumbnails: JPEG bytes by product_id, of the examples' hits.
        per_query: a row for each query.

    Returns:
        Paths by what they are: `report`, `figures`, `queries`, `queries as JSON`, `times`, and the plots by name.

    Raises:
        RunError: the folder cannot be written.
    """
    drawn = plots(evaluation)
    sink = pa.BufferOutputStream()
    pq.write_table(per_query, sink)
    contents = {
        "figures": ("figures.json", _json(figures_of(evaluation))),
        "queries": ("queries.parquet", bytes(sink.getvalue())),
        "queries as JSON": ("queries.jsonl", b"".join(as_json(row) + b"\n" for row in per_query.to_pylist())),
        "times": ("times.json", _json(times_of(evaluation))),
        **{name: (f"plots/{name}.svg", svg.encode()) for name, svg in drawn.items()},
        "report": ("report.html", page(evaluation, drawn, described(evaluation), thumbnails).encode()),
    }
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for stale in (folder / "plots").glob("*.svg"):
            if stale.stem not in drawn:
                stale.unlink()
        return {name: _write(folder / file, content) for name, (file, content) in contents.items()}
    except OSError as error:
        raise RunError(
            f"the report cannot be written to {folder}: {first_line(error)}; name another with --out"
        ) from error


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> Path:
    """Whole or not at all."""
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content)
    half.replace(path)
    return path
