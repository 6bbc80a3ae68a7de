"""What a run did, as it goes and as it is told: the report, its page, and the row in `runs`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any

from pipeline.config import Config
from pipeline.errors import described
from pipeline.model import ModelCard
from pipeline.run.compare import Slower, earlier_reports, sentence, slower
from pipeline.run.diagnosis import diagnose
from pipeline.run.load import Loaded
from pipeline.run.progress import Progress, stage_waits
from pipeline.run.report_files import page_path, write_report
from pipeline.run.usage import Samples, Usage
from pipeline.run.worker import ActorInfo
from pipeline.shown import redacted_tree
from pipeline.store.releases import Release
from pipeline.store.schemas import runs_schema
from pipeline.store.tables import Database, append_row

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One run as it goes: what it found, counted and measured. The report is made from it.

    Attributes:
        usage: what its actors did with their time.
        samples: how far it was over time.
        changes: what it set out to do, by kind, for the page; empty where a plan does not tell.
        status: what became of it, once that is known: `released`, `unchanged`, `failed`, `interrupted`.
        slower: what took longer than in `compared` earlier runs.
        page: where its page lies.
    """

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
    usage: Usage = field(default_factory=Usage)
    samples: Samples = field(default_factory=Samples)
    changes: Mapping[str, int] = field(default_factory=dict)
    loaded: Loaded | None = None
    deleted: int = 0
    release: Release | None = None
    status: str | None = None
    error: str | None = None
    slower: Sequence[Slower] = ()
    compared: int = 0
    page: str | None = None
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
    usage = run.usage
    diagnosis = diagnose(usage, run.config)
    return {
        **counts(run),
        "release": current.release if current else None,
        "released": run.release is not None,
        "status": run.status or ("released" if run.release else "unchanged"),
        "error": run.error,
        "seconds": round(time.monotonic() - run.begun, 3),
        "run_id": run.run_id,
        "job": run.job,
        "started_at": f"{run.started_at:%Y-%m-%d %H:%M:%S %Z}".strip(),
        "db": run.config.db,
        "catalog": run.config.catalog_uri,
        "reasons": dict(run.loaded.reasons) if run.loaded else {},
        "changes": dict(run.changes),
        "before": _held(run.base) if run.base else None,
        "after": _held(current) if current else None,
        "model": run.config.model_name,
        "model_id": run.card.model_id,
        "fingerprint": run.card.fingerprint,
        "dim": run.card.dim,
        "actors": [asdict(info) for info in run.actors],
        "run_seconds": _rounded(run.seconds),
        "stage_seconds": _rounded(usage.seconds),
        "stage_wait_seconds": _rounded(stage_waits(usage.waits)),
        "rates": _rates(run),
        "usage": _usage(usage),
        "cost": _cost(usage),
        "diagnosis": {**asdict(diagnosis), "shares": _rounded(diagnosis.shares)},
        "slower": [asdict(item) for item in run.slower],
        "slower_sentence": sentence(run.slower, run.compared),
        "versions": dict(current.versions) if current else {},
        "index": dict(current.index) if current else {},
        "report": run.page,
    }


def record(db: Database, run: Run, status: str, error: str | None) -> None:
    """Write the run's page, and add its row to `runs`, whatever became of it."""
    run.status, run.error = status, error
    try:
        earlier = earlier_reports(db, run.job, run.card.fingerprint)
        run.slower, run.compared = slower(report(run), earlier), len(earlier)
    except (OSError, ValueError, KeyError, TypeError) as unread:
        log.warning("the run is not compared with earlier ones, they cannot be read: %s", described(unread))
    run.page = page_path(db, run.run_id)
    if not write_report(db, report(run) | {"settings": settings(run.config)}, run.samples.series()):
        run.page = None
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
        "report": json.dumps(redacted_tree(told)),
        "error": error,
    }
    append_row(db, "runs", runs_schema(), row)


def settings(config: Config) -> dict[str, str]:
    """The settings that differ from their defaults, by dotted name."""
    found: dict[str, str] = {}

    def compare(value: Any, default: Any, name: str) -> None:
        if is_dataclass(value):
            for item in fields(value):
                inner = f"{name}.{item.name}" if name else item.name
                compare(getattr(value, item.name), getattr(default, item.name), inner)
        elif value != default:
            found[name] = str(list(value) if isinstance(value, tuple) else value)

    compare(config, Config(), "")
    return found


def _held(release: Release) -> dict[str, int]:
    return {name: int(release.checks.get(name, 0)) for name in ("products", "images", "rejects")}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def _rates(run: Run) -> dict[str, float]:
    """Rates of the run; `overhead_s + inputs to embed / embedded_per_s` estimates another run on as many actors.

    `embedded_per_s` is of all actors together, while they embed; 0 where nothing was embedded.
    """
    usage = run.usage
    embed_s = max(run.seconds.get("embed", 0.0), 1e-9)
    embedding_s = usage.embedding_s
    return {
        "inputs_per_s": round((run.progress.texts + run.progress.images) / embed_s, 1),
        "images_per_s": round(run.progress.images / embed_s, 1),
        "embedded_per_s": round(usage.count("embedded") / embedding_s, 3) if embedding_s > 0 else 0.0,
        "overhead_s": round(max(0.0, time.monotonic() - run.begun - embedding_s), 3),
        "actors": usage.at_once,
        "gpus": usage.gpus,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    """The actors' times; `inputs` and `embedded` are of this run alone, without what it found staged."""
    return {
        "start_s": round(usage.start_s, 3),
        "embedding_s": round(usage.embedding_s, 3),
        "decode_threads": usage.decode_threads,
        "fetch_threads": usage.fetch_threads,
        "inputs": usage.count("texts") + usage.count("images"),
        "embedded": usage.count("embedded"),
        "actors": [
            {
                "actor": actor.actor,
                "node": actor.node,
                "gpus": actor.gpus,
                "held_s": round(actor.held_s, 3),
                "start_s": round(actor.start_s, 3),
                "working_s": round(actor.working_s, 3),
                "embedded": actor.counts.get("embedded", 0),
                "towers_busy_share": round(actor.towers_busy_share, 4),
            }
            for actor in usage.actors
        ],
    }


def _cost(usage: Usage) -> dict[str, float]:
    """What the actors held, their start included."""
    gpu_s = sum(actor.gpus * actor.held_s for actor in usage.actors)
    return {
        "actor_seconds": round(sum(actor.held_s for actor in usage.actors), 3),
        "gpu_seconds": round(gpu_s, 3),
        "gpu_hours": round(gpu_s / 3600, 6),
    }
