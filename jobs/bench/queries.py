"""Searches in a table of drawn vectors, beside LanceDB's bare call and a scan; `jobs.measure_query` has the rest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from jobs.bench.timing import Row, in_turns


def queries(folder: Path, model: Path, *, products: int, count: int) -> Iterator[Row]:
    """Searches a second of one thread, k=10 by average, and what a diversified page costs.

    Args:
        folder: for the database, which is removed.
        model: that the release names; no text is embedded here.
        products: in the table.
        count: queries in each turn.
    """
    from jobs import measure_query
    from pipeline.query import Diversify, Searcher

    columns, asked = measure_query.drawn(products, count, 0)
    db = folder / "query-db"
    shutil.rmtree(db, ignore_errors=True)
    measure_query.write_db(str(db), columns, model, 0)
    searcher = Searcher.open(str(db))
    bare, scan = measure_query.bare_search(str(db), searcher), measure_query.scan_of(columns["avg"])
    calls = {
        "search": lambda: [searcher.search(query, k=10) for query in asked],
        "lancedb search": lambda: [bare(query) for query in asked],
        "numpy scan in memory": lambda: [scan(query) for query in asked],
        "diversified search": lambda: [searcher.search(query, k=10, diversify=Diversify()) for query in asked],
    }
    timed = in_turns(calls)
    for beside in ("lancedb search", "numpy scan in memory"):
        what = f"search, {products:,} products, k=10"
        yield timed.row("query", "search", count, "queries/s", beside=beside, what=what)
        yield timed.row("query", beside, count, "queries/s")
    yield timed.row("query", "diversified search", count, "queries/s", beside="search")
    shutil.rmtree(db)
