"""The report as one HTML page: nothing loaded, no script, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pipeline.run.progress import STAGES
from pipeline.run.report_html import Markup, bar, document, line, section, table
from pipeline.run.usage import Sample, rows_per_s
from pipeline.shown import escaped

_PARTS = {
    "towers": "towers at work",
    "decode": "waiting for decoded images",
    "fetch": "waiting for fetched images",
    "read": "waiting for rows",
    "tokenise": "tokenising",
    "write": "writing staged files",
    "idle": "no partition in hand",
    "other": "Python between these",
}
_CHANGES = {
    "embedded": "inputs embedded",
    "reused": "inputs whose vectors were there",
    "rejected": "inputs rejected",
    "rejected_rows": "whole rows rejected",
    "truncated_texts": "texts cut at model.max_tokens",
    "deleted": "products gone",
}


def page(told: Mapping[str, Any], series: Sequence[Sample]) -> str:
    """The page.

    Args:
        told: a run's report, with its `settings`, free of credentials.
        series: how far the run was over time.
    """
    sections = (
        section("What happened", _happened(told)),
        section("What changed", _changed(told)),
        section("Where the actors' time went", _shares(told)),
        section("Time by stage", _stages(told)),
        section("GPU busy share", _actors(told)),
        section("Rows a second", _rows_over_time(series)),
        section("The run's time", _run_seconds(told)),
        section("Rejects by reason", _reasons(told)),
        section("What got slower", _slower(told)),
        section("What it cost", _cost(told)),
        section("Settings", _settings(told)),
    )
    heading = f"{told['job']} {told['run_id']}: {told['status']}"
    slower = f"<p>{escaped(told['slower_sentence'])}.</p>" if told["slower_sentence"] else ""
    lead = f"<p><strong>Bottleneck:</strong> {escaped(told['diagnosis']['sentence'])}.</p>"
    return document(heading, lead + slower, sections)


def _happened(told: Mapping[str, Any]) -> str:
    release = f"{told['release'] or 'none'}, {'new' if told['released'] else 'as before'}"
    rows = [
        ("status", told["status"]),
        ("began", told["started_at"]),
        ("took", _duration(told["seconds"])),
        ("release", release),
        ("model", told["model"]),
        ("catalog", told["catalog"]),
        ("database", told["db"]),
    ]
    rows += [("error", told["error"])] if told["error"] else []
    before, after = told["before"] or {}, told["after"] or {}
    held = [
        (name, f"{before.get(name, 0):,}", f"{after.get(name, 0):,}", f"{after.get(name, 0) - before.get(name, 0):+,}")
        for name in ("products", "images", "rejects")
    ]
    return table("The run", (), rows) + table("In the release", ("", "before", "after", "change"), held)


def _changed(told: Mapping[str, Any]) -> str:
    rows = [(label, f"{told[name]:,}") for name, label in _CHANGES.items()]
    result = table(f"Of {told['inputs']:,} inputs, {told['texts']:,} texts and {told['images']:,} images", (), rows)
    if told["changes"]:
        result += table("Planned", (), [(name, f"{count:,}") for name, count in told["changes"].items()])
    return result


def _shares(told: Mapping[str, Any]) -> str:
    shares = told["diagnosis"]["shares"]
    if not any(shares.values()):
        return "<p>No actor was at work.</p>"
    rows = [
        (label, f"{shares[part]:.1%}", Markup(bar([("busy" if part == "towers" else "wait", shares[part])], 1.0)))
        for part, label in _PARTS.items()
    ]
    return table("Of the time in which the actors could have embedded", ("", "share", ""), rows)


def _stages(told: Mapping[str, Any]) -> str:
    busy, waits = told["stage_seconds"], told["stage_wait_seconds"]
    whole = max((busy[stage] + waits[stage] for stage in STAGES), default=0.0)
    rows = [
        (stage, f"{busy[stage]:,.1f}", f"{waits[stage]:,.1f}",
         Markup(bar([("busy", busy[stage]), ("wait", waits[stage])], whole)))
        for stage in STAGES
    ]  # fmt: skip
    caption = "Seconds of all actors, of fetch and decode summed over their threads; the bar is busy, then waiting"
    return table(caption, ("stage", "busy", "waiting", ""), rows)


def _actors(told: Mapping[str, Any]) -> str:
    actors = told["usage"]["actors"]
    if not actors:
        return "<p>No actor was started.</p>"
    rows = [
        (f"{actor['actor']} on {actor['node']}", f"{actor['gpus']:g}", f"{actor['embedded']:,}",
         f"{actor['towers_busy_share']:.0%}", Markup(bar([("busy", actor["towers_busy_share"])], 1.0)))
        for actor in actors
    ]  # fmt: skip
    vcpus = told["diagnosis"]["vcpus_per_gpu"]
    note = f"{vcpus:g} vCPUs per GPU" if vcpus is not None else "no GPU: the towers ran on CPUs"
    caption = f"Towers at work, of the time in which an actor could have embedded; {note}"
    return table(caption, ("actor", "GPUs", "embedded", "busy", ""), rows)


def _rows_over_time(series: Sequence[Sample]) -> str:
    points = rows_per_s(series)
    if len(points) < 2:
        return "<p>The run was too short to draw.</p>"
    span = series[-1].seconds - series[0].seconds
    mean = (series[-1].rows - series[0].rows) / span if span > 0 else 0.0
    most = max(value for _, value in points)
    each = span / len(points)
    label = (
        f"Rows a second over {span:,.0f} seconds: {mean:,.1f} on average, {most:,.1f} in the best {each:,.1f} seconds"
    )
    return f"{line(points, label=label, unit='rows a second, by seconds since the start')}<p>{escape(label)}.</p>"


def _run_seconds(told: Mapping[str, Any]) -> str:
    seconds = told["run_seconds"]
    rows = [
        (name, f"{spent:,.1f}", Markup(bar([("busy", spent)], max(seconds.values()))))
        for name, spent in seconds.items()
    ]
    return table("Seconds of the driver, one after the other", ("", "seconds", ""), rows)


def _reasons(told: Mapping[str, Any]) -> str:
    reasons = told["reasons"]
    if not reasons:
        return "<p>Nothing was rejected.</p>"
    most = max(reasons.values())
    rows = [(reason, f"{count:,}", Markup(bar([("bad", count)], most))) for reason, count in reasons.items()]
    return table("Inputs and rows that were rejected", ("reason", "count", ""), rows)


def _slower(told: Mapping[str, Any]) -> str:
    if not told["slower"]:
        return "<p>Nothing, beside earlier runs of this job and model.</p>"
    rows = [
        (item["what"], f"{item['now']:,.4g}", f"{item['before']:,.4g}", f"{item['ratio']:g}", f"{item['seconds']:,.1f}")
        for item in told["slower"]
    ]
    unit = ", ".join(dict.fromkeys(f"{item['what']}: {item['unit']}" for item in told["slower"]))
    return table(f"Beside the median of earlier runs ({unit})", ("", "now", "before", "times", "seconds lost"), rows)


def _cost(told: Mapping[str, Any]) -> str:
    cost, rates = told["cost"], told["rates"]
    rows = [
        ("actors", f"{rates['actors']:g}"),
        ("GPUs", f"{rates['gpus']:g}"),
        ("actor seconds", f"{cost['actor_seconds']:,.1f}"),
        ("GPU seconds", f"{cost['gpu_seconds']:,.1f}"),
        ("GPU hours", f"{cost['gpu_hours']:,.4f}"),
        ("embedded a second", f"{rates['embedded_per_s']:,.1f}"),
        ("seconds that are not embedding", f"{rates['overhead_s']:,.1f}"),
    ]
    return table("From when the actors were asked for until they were let go", (), rows)


def _settings(told: Mapping[str, Any]) -> str:
    rows = list(told.get("settings", {}).items())
    return table("Those that differ from their defaults, without credentials", (), rows)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:.0f} s" if minutes else f"{rest:.1f} s"
