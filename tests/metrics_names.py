"""The metrics that dashboards and rules may name, as the code defines them, and PromQL that asks for others."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser as promql

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Metric:
    """A metric as the code names it: a counter or a gauge of Ray's, a gauge of the status page, one of jobs.serve."""

    kind: str
    labels: frozenset[str] = frozenset()


def _ray(kind: str, *labels: str) -> Metric:
    return Metric(kind, frozenset(labels))


CONTRACT = {
    "twotower_inputs": _ray("counter", "actor", "outcome"),
    "twotower_rejects": _ray("counter", "actor", "reason"),
    "twotower_stage_seconds": _ray("counter", "actor", "stage"),
    "twotower_stage_wait_seconds": _ray("counter", "actor", "stage"),
    "twotower_queue_depth": _ray("gauge", "actor"),
    "twotower_partitions_pending": _ray("gauge"),
    "twotower_partitions_done": _ray("gauge"),
    "twotower_up": _ray("status"),
    "twotower_release": _ray("status"),
    "twotower_release_age_seconds": _ray("status"),
    "twotower_release_products": _ray("status"),
    "twotower_release_images": _ray("status"),
    "twotower_release_rejects": _ray("status", "reason"),
    "twotower_last_run_seconds": _ray("status", "run", "status"),
    "twotower_last_run_timestamp_seconds": _ray("status", "run", "status"),
    "twotower_writer_held": _ray("status"),
    "twotower_serve_requests": _ray("served", "route", "status"),
    "twotower_serve_seconds": _ray("histogram", "route", "le"),
    "twotower_serve_text_batch": _ray("histogram", "le"),
    "twotower_serve_searches": _ray("status"),
    "twotower_serve_release": _ray("status"),
}
"""What dashboards rely on. `kind` says how Prometheus sees it: Ray adds `ray_`, and `_total` to a counter."""

TARGET_LABELS = {"namespace", "pod", "job", "instance", "container", "WorkerId", "NodeAddress", "Component"}
"""What Prometheus and Ray add to every sample."""

_RATES = {"rate", "irate", "increase"}
_GRAFANA = {"$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}


def names_in_code() -> set[str]:
    """Every string of pipeline/ and jobs/ that is a metric's name and nothing else."""
    found = set()
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"^twotower_[a-z_]+$", node.value))
    return found


def labels_in_code() -> dict[str, frozenset[str]]:
    """Labels that stand as a literal in the call that defines a metric, for those that have any."""
    found = {}
    for path in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                for keyword in node.keywords:
                    if keyword.arg in ("tag_keys", "labels") and isinstance(keyword.value, ast.Tuple | ast.List):
                        found[str(node.args[0].value)] = frozenset(ast.literal_eval(keyword.value))
    return found


def exported() -> dict[str, tuple[bool, frozenset[str]]]:
    """Names as Prometheus sees them, each with whether it is a counter, and its labels."""
    ending = {"counter": ("ray_{}_total", True), "gauge": ("ray_{}", False), "status": ("{}", False)}
    ending |= {"served": ("{}_total", True), "histogram": ("{}_bucket", True)}
    return {
        ending[metric.kind][0].format(name): (ending[metric.kind][1], metric.labels)
        for name, metric in CONTRACT.items()
    }


def problems(expression: str, recorded: dict[str, set[str]] | None = None) -> Iterator[str]:
    """What is wrong with an expression: syntax, unknown metrics or labels, a counter as it is, a rate of a gauge.

    Args:
        expression: PromQL, with Grafana's variables.
        recorded: names of recording rules, with the labels that they keep.
    """
    for variable, value in _GRAFANA.items():
        expression = expression.replace(variable, value)
    try:
        tree = promql.parse(re.sub(r"\$\{?\w+\}?", "x", expression))
    except ValueError as error:
        yield f"{expression!r} is no PromQL: {error}"
        return
    yield from _look(tree, recorded or {}, in_rate=False)


def labels_of(expression: str) -> set[str]:
    """Labels that an aggregation keeps."""
    return set(re.findall(r"\w+", (re.findall(r"by \(([^)]*)\)", expression) or [""])[0]))


def _look(node: Any, recorded: dict[str, set[str]], *, in_rate: bool) -> Iterator[str]:
    if isinstance(node, promql.VectorSelector):
        yield from _selector(node, recorded, in_rate=in_rate)
    elif isinstance(node, promql.MatrixSelector):
        yield from _look(node.vector_selector, recorded, in_rate=in_rate)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _look(argument, recorded, in_rate=node.func.name in _RATES)
    elif isinstance(node, promql.BinaryExpr):
        yield from _look(node.lhs, recorded, in_rate=in_rate)
        yield from _look(node.rhs, recorded, in_rate=in_rate)
    elif isinstance(node, promql.AggregateExpr):
        kept = set(node.modifier.labels) if node.modifier else set()
        known = set().union(*(_labels(name, recorded) for name in _metrics(node.expr)), TARGET_LABELS)
        if unknown := kept - known:
            yield f"no metric in it has the label {', '.join(sorted(unknown))}: {node}"
        yield from _look(node.expr, recorded, in_rate=in_rate)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr):
        yield from _look(node.expr, recorded, in_rate=in_rate)
    elif isinstance(node, promql.SubqueryExpr):
        yield "a subquery: this check cannot judge it"


def _selector(node: Any, recorded: dict[str, set[str]], *, in_rate: bool) -> Iterator[str]:
    known = exported()
    if node.name not in known and node.name not in recorded:
        yield f"the metric {node.name} does not exist"
        return
    for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", str(node.matchers)):
        if label not in _labels(node.name, recorded) | TARGET_LABELS:
            yield f"{node.name} has no label {label}"
    is_counter = node.name in known and known[node.name][0]
    if is_counter != in_rate:
        yield f"{node.name} is {'a counter: take its rate' if is_counter else 'a gauge: it has no rate'}"


def _labels(name: str, recorded: dict[str, set[str]]) -> set[str]:
    return recorded.get(name) or set(exported().get(name, (False, frozenset()))[1])


def _metrics(node: Any) -> set[str]:
    """Names in an expression, whatever its shape."""
    return set(re.findall(r"[a-z_:]*twotower[a-z0-9_:]*", str(node)))
