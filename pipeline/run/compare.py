"""What got slower: a run's seconds per input beside the median of earlier runs of the same job and model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.store.tables import Database

_RUNS = 5
_SLOWER_BY = 1.25
_LEAST_S = 2.0
_LEAST_SHARE = 0.03


@dataclass(frozen=True)
class Measure:
    """A time that can be compared between runs.

    Attributes:
        value: in `unit`.
        unit: `s`, or `s per 1,000 inputs` and the like.
        seconds_each: how many seconds of this run one of `unit` stands for.
    """

    value: float
    unit: str
    seconds_each: float


@dataclass(frozen=True)
class Slower:
    """Something that took longer than it used to.

    Attributes:
        now: in `unit`, as is `before`, the median of the earlier runs.
        seconds: what it cost this run; thread seconds for decode and fetch.
    """

    what: str
    unit: str
    now: float
    before: float
    ratio: float
    seconds: float


def measures(told: Mapping[str, Any]) -> dict[str, Measure]:
    """The comparable times of a run's report.

    Stages are taken by the input that goes through them: all that the actors were given, or those that were embedded.
    Planning and releasing go over the whole tables, and are taken by their products.
    """
    usage, run_s, stage_s = told["usage"], told["run_seconds"], told["stage_seconds"]
    groups = (
        ("inputs", usage["inputs"], stage_s, ("read", "fetch", "write")),
        ("embedded inputs", usage["embedded"], stage_s, ("decode", "tokenise", "towers")),
        ("inputs", told["inputs"], run_s, ("reduce",)),
        ("products", (told["after"] or {}).get("products", 0), run_s, ("plan", "release")),
    )
    found = {"starting the actors": Measure(usage["start_s"], "s", 1.0)} if usage["actors"] else {}
    for unit, count, seconds, names in groups:
        for name in names:
            if count and name in seconds:
                value = 1000 * seconds[name] / count
                found[name] = Measure(value, f"s per 1,000 {unit}", count / 1000)
    return found


def slower(told: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> list[Slower]:
    """Everything that took 1.25 times as long as before, and cost enough time to matter; the worst first.

    Args:
        told: a run's report.
        earlier: reports of earlier runs.
    """
    history = [measures(report) for report in earlier]
    found: list[Slower] = []
    for what, measure in measures(told).items():
        known = [before[what].value for before in history if what in before and before[what].value > 0]
        if not known:
            continue
        usual = median(known)
        seconds = (measure.value - usual) * measure.seconds_each
        is_much = seconds >= max(_LEAST_S, _LEAST_SHARE * told["seconds"])
        if is_much and measure.value >= _SLOWER_BY * usual:
            now, before = round(measure.value, 3), round(usual, 3)
            found.append(Slower(what, measure.unit, now, before, round(measure.value / usual, 2), round(seconds, 1)))
    return sorted(found, key=lambda item: -item.seconds)


def sentence(found: Sequence[Slower], runs: int) -> str | None:
    """The worst of it in one sentence, the rest by name; None where nothing got slower."""
    if not found:
        return None
    worst, *others = found
    usual = f"the median of the {runs} runs before" if runs > 1 else "the run before"
    told = (
        f"{worst.what} took {worst.ratio:g} times as long as in {usual} "
        f"({worst.now:,.3g} instead of {worst.before:,.3g} {worst.unit}, {worst.seconds:,.1f} s in all)"
    )
    more = ", ".join(f"{item.what} ({item.ratio:g} times)" for item in others)
    return f"{told}; slower too: {more}" if more else told


def earlier_reports(db: Database, job: str, fingerprint: str) -> list[dict[str, Any]]:
    """Reports of the newest runs that ended well, of the same job and model; the newest first."""
    if not db.exists("runs"):
        return []
    runs = db.dataset("runs")
    if "report" not in runs.schema.names:
        return []
    quoted = job.replace("'", "''"), fingerprint.replace("'", "''")
    wanted = f"job = '{quoted[0]}' AND fingerprint = '{quoted[1]}' AND status IN ('released', 'unchanged')"
    rows = runs.to_table(columns=["run_id", "started_at"], filter=wanted).sort_by([("started_at", "descending")])
    ids = rows.column("run_id").to_pylist()[:_RUNS]
    if not ids:
        return []
    named = ", ".join("'" + run_id.replace("'", "''") + "'" for run_id in ids)
    reports = runs.to_table(columns=["run_id", "report"], filter=f"run_id IN ({named})").to_pylist()
    reports.sort(key=lambda row: ids.index(row["run_id"]))
    return [json.loads(row["report"]) for row in reports if row["report"]]
