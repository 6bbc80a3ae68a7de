"""What a run has to do to bring a release to a catalog: which products, which inputs, and what leaves."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.catalog.partitions import Catalog, Partition
from pipeline.catalog.products import RowPlan
from pipeline.config import Config
from pipeline.errors import ConfigError, ReleaseRefused
from pipeline.run.changes import Changes, known_partitions, plan_changes
from pipeline.run.checks import Cluster
from pipeline.run.fill import known_bad
from pipeline.run.report import Run
from pipeline.run.rows import RowPlans, plan_rows, rejected_rows, released_ids
from pipeline.run.scan import LoadSettings, scan_partitions
from pipeline.run.signals import Stop
from pipeline.run.tasks import run_tasks
from pipeline.run.wanted import Wanted, plan_inputs
from pipeline.store.releases import Release
from pipeline.store.schemas import TABLES, products_schema
from pipeline.store.tables import Database

log = logging.getLogger(__name__)

_BRIEF_BYTES = 64_000_000  # of catalog: read and hashed within a second or two
_TASK_BYTES = 128_000_000  # a task's share of what is to be scanned
_SCAN_THREADS = 4


@dataclass(frozen=True)
class Order:
    """What a run is asked to do.

    Attributes:
        job: its name.
        is_truth: whether products that the catalog does not hold are gone; else they stay.
        limit: only the first products, for a trial.
        fresh: embed every input again.
        replay: only what the release has rejected.
        verify_content: read every partition, whatever its digest says.
        confirm_deletes: the number of products that may be deleted, whatever `max_delete_share` says.
        is_shown: the plan is only to be shown: nothing is written for actors, and deletes are not refused.
    """

    job: str = "backfill"
    is_truth: bool = False
    limit: int | None = None
    fresh: bool = False
    replay: bool = False
    verify_content: bool = False
    confirm_deletes: int | None = None
    is_shown: bool = False


@dataclass(frozen=True)
class Plan:
    """What a run will do. Where everything goes through the towers anyway the catalog is only read for its ids.

    Attributes:
        rows: which rows the actors read.
        settings: digest of what decides how rows are read.
        gone: released products that leave.
        released: how many products the release holds.
        changes: what the catalog changed; None where all of it, or a part that was asked for, is embedded.
        wanted: the inputs to embed, where there are changes.
        bad: hashes known to be bad, with reason and sentence.
        is_rebuilt: whether all tables are written whole: on a first load, or with another model.
        is_averaged_anew: whether the products that stay need another average, or other columns.
    """

    rows: RowPlans
    settings: str
    gone: pa.Array
    released: int
    changes: Changes | None = None
    wanted: Wanted = field(default_factory=Wanted)
    bad: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    is_rebuilt: bool = False
    is_averaged_anew: bool = False

    @property
    def is_nothing(self) -> bool:
        """Whether the release is as the catalog wants it already, rows without a product apart."""
        changes = self.changes
        return changes is not None and changes.is_nothing and not (self.is_averaged_anew or changes.scanned)


def counts_of(plan: Plan) -> dict[str, int]:
    """What a plan sets out to do, by kind, for people; of a plan that reads ids alone there is less to tell."""
    changes, wanted = plan.changes, plan.wanted
    if changes is None:
        return {"products to embed": plan.rows.products, "products to delete": len(plan.gone)}
    return {
        "new products": changes.added,
        "products with other texts or images": changes.averaged,
        "products with other metadata": changes.relabelled,
        "products to delete": len(plan.gone),
        "texts to embed": wanted.texts,
        "images to embed": wanted.images,
        "inputs to reuse": wanted.reused,
        "partitions read": len(changes.scanned),
        "partitions unread": len(changes.unread),
    }


def make_plan(
    db: Database, run: Run, catalog: Catalog, order: Order, *, cluster: Cluster, scratch: str, stop: Stop
) -> Plan:
    """Plan a run on its base release.

    Args:
        db: the database.
        run: its base, model and settings.
        catalog: the checked catalog.
        order: what is asked for.
        cluster: joined where there is much to scan.
        scratch: where scanned files go.
        stop: ends the work when it is set.

    Raises:
        ConfigError: the new rows cannot stand beside those of the release.
        ReleaseRefused: more products would leave than may without being confirmed.
    """
    base, config = run.base, run.config
    if base is not None and not base.versions.keys() >= set(TABLES):
        raise ConfigError(
            f"release {base.release} of {config.db} was made before releases kept what their catalog said; searching "
            "it works, writing beside it does not: backfill the catalog into another --db"
        )
    settings = settings_digest(config, catalog)
    is_other_model = base is not None and base.fingerprint != run.card.fingerprint
    if order.replay or order.limit is not None:
        check_base(db, run, catalog, absent=None)
        only = rejected_rows(db, base) if order.replay else None
        rows = plan_rows(catalog, limit=order.limit, only=only)
        return Plan(rows, settings, pa.array([], pa.string()), _released(base), is_rebuilt=base is None)
    if not (config.plan.dedupe or order.is_shown) and (base is None or is_other_model or order.fresh):
        rows = plan_rows(catalog, released=released_ids(db, base))
        is_rebuilt = base is None or check_base(db, run, catalog, absent=0 if order.is_truth else len(rows.absent))
        gone = rows.absent if order.is_truth else pa.array([], pa.string())
        plan = Plan(rows, settings, gone, _released(base), is_rebuilt=is_rebuilt)
    else:
        plan = _compared(db, run, catalog, order, settings, cluster=cluster, scratch=scratch, stop=stop)
    if not order.is_shown:
        check_deletes(config, order, len(plan.gone), plan.released)
    return plan


def settings_digest(config: Config, catalog: Catalog) -> str:
    """Of everything beside its bytes that decides what a partition's rows say, and which inputs are rejected."""
    fetch = config.fetch
    facts = {
        "columns": asdict(catalog.columns),
        "shape": catalog.shape,
        "root": catalog.root,
        "carried": [str(column) for column in catalog.carried],
        "limits": asdict(config.images.limits),
        "fetch": [fetch.http, fetch.allow_hosts, fetch.allow_private_hosts],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def check_base(db: Database, run: Run, catalog: Catalog, *, absent: int | None) -> bool:
    """Whether old rows cannot stand beside new ones: another model, average weight or columns.

    Args:
        db: the database.
        run: its base, model and settings.
        catalog: names the carried columns.
        absent: released products that the run neither writes nor deletes; None: it does not go through all.

    Raises:
        ConfigError: they cannot, and there are such products; or a carried column has another type.
    """
    base = run.base
    if base is None:
        return False
    weight = run.config.average.text_weight
    old = db.dataset("products", base.versions["products"]).schema
    schema = products_schema(run.card.dim, catalog.carried)
    for column in schema:
        found = old.field(column.name).type if column.name in old.names else column.type
        if found != column.type and not column.name.endswith("_vector"):
            raise ConfigError(
                f"the column {column.name} is {column.type} in the catalog and {found} in release {base.release}: give "
                "it its old type, another name, or take another --db"
            )
    differences = {
        f"model (fingerprint {base.fingerprint[:12]}, now {run.card.fingerprint[:12]})": base.fingerprint
        != run.card.fingerprint,
        f"average.text_weight ({base.average_text_weight}, now {weight})": base.average_text_weight != weight,
        "columns of products": [(f.name, f.type) for f in old] != [(f.name, f.type) for f in schema],
    }
    differing = [name for name, is_different in differences.items() if is_different]
    if differing and absent != 0:
        how_many = f"{absent:,} of its" if absent else "not all of its"
        where = "not in this catalog" if absent else "part of this run"
        raise ConfigError(
            f"release {base.release} was made with another {' and another '.join(differing)}, and {how_many} "
            f"{_released(base):,} products are {where}: their vectors would not be comparable. Backfill a catalog that "
            "holds all of them, use the old settings, or another --db"
        )
    return bool(differing)


def check_deletes(config: Config, order: Order, deletes: int, released: int) -> None:
    """Stop a run that would delete more products than it may: a catalog that lost rows by accident looks just so.

    Raises:
        ReleaseRefused: the sentence says how many, and how to confirm it.
    """
    if order.confirm_deletes is not None:
        if order.confirm_deletes != deletes:
            raise ReleaseRefused(
                f"--confirm-deletes {order.confirm_deletes} was given, but {deletes:,} of {released:,} products are "
                "not in this catalog any more; nothing was changed"
            )
        return
    share = deletes / released if released else 0.0
    if share > config.max_delete_share:
        raise ReleaseRefused(
            f"{deletes:,} of {released:,} products ({share:.1%}) are not in this catalog any more; max_delete_share is "
            f"{config.max_delete_share:.1%}. Nothing was changed. See that the catalog is whole; if they are to go, "
            f"give --confirm-deletes {deletes}"
        )


def _compared(
    db: Database,
    run: Run,
    catalog: Catalog,
    order: Order,
    settings: str,
    *,
    cluster: Cluster,
    scratch: str,
    stop: Stop,
) -> Plan:
    """The plan by content."""
    base = run.base
    is_reusable = base is not None and base.fingerprint == run.card.fingerprint and not order.fresh
    known = known_partitions(db, base)
    has_same_settings = is_reusable and all(partition.settings == settings for partition in known.values())
    bad = known_bad(db, base) if has_same_settings else {}
    changes = plan_changes(
        db,
        base,
        catalog,
        partial(_scan, run, catalog, cluster=cluster, scratch=scratch, stop=stop),
        settings=settings,
        is_truth=order.is_truth,
        bad=frozenset(bad),
        is_fresh=not is_reusable,
        verify_content=order.verify_content,
    )
    stop.check()
    differs = check_base(db, run, catalog, absent=0 if order.is_truth else changes.absent)
    folder = "" if order.is_shown else scratch
    wanted = plan_inputs(db, base if is_reusable else None, catalog, changes, bad=frozenset(bad), folder=folder)
    return Plan(
        wanted_rows(catalog, wanted),
        settings,
        changes.gone,
        changes.released,
        changes,
        wanted,
        bad,
        is_rebuilt=base is None or base.fingerprint != run.card.fingerprint,
        is_averaged_anew=differs,
    )


def wanted_rows(catalog: Catalog, wanted: Wanted) -> RowPlans:
    """The rows that hold wanted inputs; all others are skipped."""
    rows: dict[str, RowPlan] = {}
    for partition in catalog.partitions:
        if partition.name in wanted.files:
            first, stop = partition.span
            others = np.setdiff1d(np.arange(first, stop), wanted.files[partition.name].rows, assume_unique=True)
            rows[partition.name] = RowPlan(skipped=others)
    total = sum(len(file.rows) for file in wanted.files.values())
    return RowPlans(rows, frozenset(rows), total, total)


def _scan(
    run: Run, catalog: Catalog, partitions: Sequence[Partition], *, cluster: Cluster, scratch: str, stop: Stop
) -> Mapping[str, str]:
    """Scan partitions, by tasks where they are large; returns the scanned file of each."""
    numbers = {partition.name: i for i, partition in enumerate(catalog.partitions)}
    config = run.config
    settings = LoadSettings(catalog.root, config.images.limits, config.fetch, _SCAN_THREADS)
    groups: list[list[tuple[Partition, str]]] = [[]]
    size = 0
    for partition in partitions:
        if size and size + partition.size_bytes > _TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((partition, f"{scratch}/{numbers[partition.name]}.scanned.parquet"))
        size += partition.size_bytes
    is_brief = sum(partition.size_bytes for partition in partitions) <= _BRIEF_BYTES
    if not is_brief:
        cluster.join()
    found: list[Any] = run_tasks(
        scan_partitions, [(catalog, group, settings) for group in groups], stop=stop, is_brief=is_brief
    )
    return {scanned.partition: scanned.path for part in found for scanned in part}


def _released(base: Release | None) -> int:
    return int(base.checks.get("products", 0)) if base else 0
