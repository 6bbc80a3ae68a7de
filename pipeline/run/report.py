"""What a run did, as it goes and as it is told: the report, and the row in `runs`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from pipeline.config import Config
from pipeline.model import ModelCard
from pipeline.run.load import Loaded
from pipeline.run.progress import Progress
from pipeline.run.worker import ActorInfo
from pipeline.store.releases import Release
from pipeline.store.schemas import runs_schema
from pipeline.store.tables import Database, append_row


@dataclass
class Run:
    """One run as it goes: what it found, counted and measured. The report is made from it."""

    config: Config
    job: str
    run_id: str
    started_at: datetime
    card: ModelCard
    base: Release | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    products: int = 0
    rejected_rows: int = 0
    actors: list[ActorInfo] = field(default_factory=list)
    loaded: Loaded | None = None
    deleted: int = 0
    release: Release | None = None
    begun: float = field(default_factory=time.monotonic)

    def stage(self, name: str, since: float) -> float:
        """Book the time since a moment to a stage; returns the present moment."""
        moment = time.monotonic()
        self.seconds[name] = self.seconds.get(name, 0.0) + moment - since
        return moment


def counts(run: Run) -> dict[str, int]:
    """What the run counted: `inputs = texts + images = embedded + reused + rejected`; whole rows are apart."""
    progress = run.progress
    return {
        "products": run.products,
        "inputs": progress.texts + progress.images,
        "texts": progress.texts,
        "images": progress.images,
        "embedded": progress.embedded,
        "reused": progress.reused,
        "rejected": progress.rejected,
        "rejected_rows": run.rejected_rows,
        "deleted": run.deleted,
        "truncated_texts": progress.truncated_texts,
    }


def report(run: Run) -> dict[str, Any]:
    """The run as one JSON-able object."""
    current = run.release or run.base
    seconds = time.monotonic() - run.begun
    embed_s = max(run.seconds.get("embed", 0.0), 1e-9)
    return {
        **counts(run),
        "release": current.release if current else None,
        "released": run.release is not None,
        "seconds": round(seconds, 3),
        "run_id": run.run_id,
        "job": run.job,
        "db": run.config.db,
        "reasons": dict(run.loaded.reasons) if run.loaded else {},
        "model": run.config.model_name,
        "model_id": run.card.model_id,
        "fingerprint": run.card.fingerprint,
        "dim": run.card.dim,
        "actors": [asdict(info) for info in run.actors],
        "run_seconds": {name: round(value, 3) for name, value in run.seconds.items()},
        "stage_seconds": {name: round(value, 3) for name, value in run.progress.seconds.items()},
        "rates": {
            "inputs_per_s": round((run.progress.texts + run.progress.images) / embed_s, 1),
            "images_per_s": round(run.progress.images / embed_s, 1),
        },
        "versions": dict(current.versions) if current else {},
        "index": dict(current.index) if current else {},
    }


def record(db: Database, run: Run, status: str, error: str | None) -> None:
    """Add the run's row to `runs`, whatever became of it."""
    told = report(run)
    row: Mapping[str, object] = {
        "run_id": run.run_id,
        "job": run.job,
        "status": status,
        "started_at": run.started_at,
        "seconds": told["seconds"],
        "release": run.release.release if run.release else None,
        "catalog": run.config.catalog_uri,
        "model": run.config.model_name,
        "model_id": run.card.model_id,
        "fingerprint": run.card.fingerprint,
        "counts": json.dumps(counts(run)),
        "stages": json.dumps({**told["run_seconds"], **told["stage_seconds"]}),
        "rates": json.dumps(told["rates"]),
        "versions": json.dumps(told["versions"]),
        "error": error,
    }
    append_row(db, "runs", runs_schema(), row)
