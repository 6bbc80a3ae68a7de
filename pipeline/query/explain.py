"""What a search does and what it costs: index, probes, rows that were compared, and time by step."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from pipeline.query.encoder import Vector, words_of
from pipeline.query.filters import expression
from pipeline.query.nearest import RARE_ROWS, Pinned, nearest, passing, vector_query
from pipeline.query.request import Request

_COUNT = re.compile(r"\b(\w+)=([\d.]+)(?: ([KMB]))?(?=[,\]\s])")
_THOUSANDS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True, slots=True)
class Explanation:
    """How one query is answered.

    Attributes:
        release: number of the release.
        mode: which vector is compared.
        index: `exact`, or the kind of the index that is read.
        partitions: of the index; 0 without.
        probes: how many of them are read at least; a filter reads on until enough rows pass.
        refine: how many candidates for each hit are scored again with their whole vectors.
        passing: products that pass the filter; None without a filter, or where there are more than are counted.
        vectors_compared: with the query, in the index and in whole, as LanceDB counts them: three digits.
        rows_read: of the table, likewise.
        seconds: of each step: `encode`, `count` (of what passes the filter), `search and rerank`.
        plan: LanceDB's own account of the search by vector; of a hybrid search, of that half.
    """

    release: int
    mode: str
    index: str
    partitions: int
    probes: int
    refine: int
    passing: int | None
    vectors_compared: int
    rows_read: int
    seconds: dict[str, float] = field(default_factory=dict)
    plan: str = ""

    def __str__(self) -> str:
        read = "every vector is compared"
        if self.index != "exact":
            read = f"{self.index}, at least {self.probes} of {self.partitions} partitions read, refine {self.refine}"
        some = f"more than {RARE_ROWS:,}" if self.passing is None else f"{self.passing:,}"
        lines = [f"release {self.release}, mode {self.mode}: {read}"]
        lines += [f"filter: {some} products pass"] if "count" in self.seconds else []
        lines.append(f"{self.vectors_compared:,} vectors compared, {self.rows_read:,} rows read")
        lines.append("  ".join(f"{step} {1000 * seconds:.1f} ms" for step, seconds in self.seconds.items()))
        return "\n".join(lines)


def explain(pinned: Pinned, query: object, request: Request) -> Explanation:
    """Answer a query once, step by step, and tell what was done."""
    begun = time.perf_counter()
    seconds = {}

    def step(name: str, since: float) -> float:
        moment = time.perf_counter()
        seconds[name] = moment - since
        return moment

    vector: Vector = pinned.encoder.encode([query])[0]
    moment = step("encode", begun)
    filter_ = None if request.where is None else expression(request.where)
    count = None if request.where is None else passing(pinned, request.where, filter_)
    if request.where is not None:
        moment = step("count", moment)
    nearest(pinned, vector, words_of(query), request)
    moment = step("search and rerank", moment)
    wanted = request.offset + request.k
    if request.diversify is not None:
        wanted = max(wanted, request.diversify.candidates)
    asked, how = vector_query(pinned, vector, request, filter_, count, wanted + 1)
    plan = asked.select(["product_id", "_distance"]).limit(wanted + 1).analyze_plan()
    index = pinned.release.index.get(request.vector_mode) or {}
    is_exact = how.probes == 0
    return Explanation(
        release=pinned.release.release,
        mode=request.mode,
        index="exact" if is_exact else str(index["kind"]),
        partitions=0 if is_exact else int(index["partitions"]),
        probes=how.probes,
        refine=how.refine,
        passing=count if count is not None and count <= RARE_ROWS else None,
        vectors_compared=_total(plan, "index_comparisons") + _vectors_in_whole(plan),
        rows_read=_total(plan, "rows_scanned"),
        seconds=seconds,
        plan=plan,
    )


def _total(plan: str, metric: str) -> int:
    return round(sum(float(n) * _THOUSANDS[unit or ""] for name, n, unit in _COUNT.findall(plan) if name == metric))


def _vectors_in_whole(plan: str) -> int:
    """Rows that the steps that compare whole vectors passed on."""
    return sum(_total(line, "output_rows") for line in plan.splitlines() if line.strip().startswith("KNNVectorDist"))
