"""A plan shown and not carried out: what would be embedded, reused and deleted, and how long that would take."""

from __future__ import annotations

import json
import statistics
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from pipeline.catalog.partitions import Catalog, open_catalog
from pipeline.config import Config
from pipeline.model import describe_model
from pipeline.run.changes import known_partitions
from pipeline.run.checks import Cluster, settle_paths
from pipeline.run.cluster import ray_address
from pipeline.run.ledger import scratch
from pipeline.run.plan import Order, Plan, make_plan
from pipeline.run.report import Run
from pipeline.run.signals import Stop
from pipeline.store.releases import newest_release, now
from pipeline.store.tables import Database

_RUNS = 5  # the last ones with this fingerprint
_LEAST_EMBEDDED = 100  # fewer inputs tell nothing of the rate


def preview(config: Config, order: Order, *, price_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """What a run would do now. Changed partitions are read and hashed; nothing is embedded, nothing is written.

    Args:
        config: as the run would have it.
        order: what the run would be asked to do.
        price_per_gpu_hour: to tell the cost in the same currency.

    Returns:
        Counts of products, inputs, partitions and bytes by what would become of them, and an estimate.

    Raises:
        UsageError: as the run would raise.
    """
    config = settle_paths(config)
    catalog = open_catalog(config.catalog_uri, config.catalog, config.columns, images_root=config.images.root)
    card = describe_model(config.model_name, dtype=config.model.dtype, **config.model_settings)
    db, stop = Database(config.db), Stop()
    run = Run(config, order.job, uuid.uuid4().hex[:12], now(), card)
    run.base = newest_release(db)
    with (
        stop.installed(),
        Cluster(config, catalog, run.run_id, stop) as cluster,
        tempfile.TemporaryDirectory(prefix="twotower-plan-") as here,
        scratch(here if ray_address(config) == "local" else config.staging_path, run.run_id) as folder,
    ):
        plan = make_plan(db, run, catalog, order, cluster=cluster, scratch=folder, stop=stop)
    told = _told(db, run, catalog, plan)
    embedded = told["inputs"]["to_embed"]
    return told | {"estimate": estimate(db, card.fingerprint, embedded, price_per_gpu_hour=price_per_gpu_hour)}


def _told(db: Database, run: Run, catalog: Catalog, plan: Plan) -> dict[str, Any]:
    changes, wanted = plan.changes, plan.wanted
    assert changes is not None
    known = known_partitions(db, run.base)
    unread = [known[name] for name in changes.unread]
    stay = sum(k.products for k in unread) + sum(counts["products"] for counts in changes.untouched.values())
    deletes, limit = len(plan.gone), run.config.max_delete_share
    read = [partition for partition in catalog.partitions if partition.name in changes.scanned]
    base = run.base
    return {
        "dry_run": True,
        "job": run.job,
        "db": run.config.db,
        "release": base.release if base else None,
        "model": run.config.model_name,
        "is_other_model": base is not None and base.fingerprint != run.card.fingerprint,
        "products": {
            "catalog": stay + len(changes.touched),
            "new": changes.added,
            "inputs_changed": changes.averaged,
            "metadata_changed": changes.relabelled,
            "unchanged": stay,
            "deleted": deletes,
            "averaged_anew": stay if plan.is_averaged_anew else 0,
        },
        "inputs": {
            "to_embed": wanted.texts + wanted.images,
            "texts": wanted.texts,
            "images": wanted.images,
            "reused": wanted.reused,
            "known_bad": wanted.rejected,
        },
        "partitions": {"read": len(changes.scanned), "unread": len(changes.unread), "gone": len(changes.dropped)},
        "bytes": {"read": sum(partition.size_bytes for partition in read), "images_to_embed": wanted.bytes},
        "is_refused": plan.released > 0 and deletes / plan.released > limit,
        "is_nothing": plan.is_nothing or (changes.is_nothing and not plan.is_averaged_anew),
    }


def estimate(
    db: Database, fingerprint: str, inputs: int, *, price_per_gpu_hour: float | None = None
) -> dict[str, Any] | None:
    """How long a run over so many inputs would take, from the rates of the last runs with the same model.

    Returns:
        `seconds` (embedding and the median of what else a run takes), `embed_seconds`, `gpu_hours`, `cost`, and how
        many `runs` it rests on; None where none of them has embedded enough to tell.
    """
    if not db.exists("runs"):
        return None
    rows = db.dataset("runs").to_table(columns=["fingerprint", "started_at", "status", "counts", "rates"]).to_pylist()
    telling = [
        rates
        for row in sorted(rows, key=lambda row: row["started_at"])
        if row["fingerprint"] == fingerprint
        and row["status"] == "released"
        and json.loads(row["counts"])["embedded"] >= _LEAST_EMBEDDED
        and (rates := json.loads(row["rates"])).get("embedded_per_s")
    ][-_RUNS:]
    if not telling:
        return None
    embed_s = inputs / statistics.median(rate["embedded_per_s"] for rate in telling)
    overhead_s = statistics.median(rate.get("overhead_s", 0.0) for rate in telling)
    gpus = float(telling[-1].get("gpus", 0))
    gpu_hours = embed_s * gpus / 3600
    return {
        "seconds": round(embed_s + overhead_s, 1),
        "embed_seconds": round(embed_s, 1),
        "gpus": gpus,
        "gpu_hours": round(gpu_hours, 4),
        "cost": None if price_per_gpu_hour is None else round(gpu_hours * price_per_gpu_hour, 2),
        "runs": len(telling),
    }


def describe(told: Mapping[str, Any]) -> str:
    """The plan as a table for people."""
    products, inputs, bytes_ = told["products"], told["inputs"], told["bytes"]
    rows = [
        ("products", "in the catalog", products["catalog"]),
        ("", "new", products["new"]),
        ("", "with other texts or images", products["inputs_changed"]),
        ("", "with other metadata only", products["metadata_changed"]),
        ("", "unchanged", products["unchanged"]),
        ("", "deleted", products["deleted"]),
        ("inputs", "texts to embed", inputs["texts"]),
        ("", "images to embed", inputs["images"]),
        ("", "reused by changed products", inputs["reused"]),
        ("", "known to be bad", inputs["known_bad"]),
        ("partitions", "read", told["partitions"]["read"]),
        ("", "as they were, unread", told["partitions"]["unread"]),
        ("", "gone", told["partitions"]["gone"]),
        ("bytes", "read", bytes_["read"]),
        ("", "of images to embed", bytes_["images_to_embed"]),
    ]
    lines = [f"{group:<11}{what:<28}{count:>15,}" for group, what, count in rows]
    if products["averaged_anew"]:
        lines.append(f"{'':<11}{'averaged anew, no tower':<28}{products['averaged_anew']:>15,}")
    lines += ["", *_outlook(told)]
    return "\n".join(lines)


def _outlook(told: Mapping[str, Any]) -> list[str]:
    found = told["estimate"]
    lines = []
    if told["is_nothing"]:
        lines.append(f"nothing changed: release {told['release']} stays")
    elif found is None:
        lines.append("no estimate: no run has embedded enough with this model here yet")
    else:
        cost = "" if found["cost"] is None else f", cost {found['cost']:,.2f}"
        lines.append(
            f"about {found['seconds']:,.0f} s, {found['embed_seconds']:,.0f} of them embedding, "
            f"{found['gpu_hours']:.3f} GPU-hours{cost} (by the rates of the last {found['runs']} runs)"
        )
    if told["is_other_model"]:
        lines.append("another model: everything is embedded again, and readers keep the old release until it is whole")
    if told["is_refused"]:
        lines.append(f"refused without --confirm-deletes {told['products']['deleted']}: see max_delete_share")
    return lines
