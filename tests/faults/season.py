"""A demo catalog, its release of last season, and what an undisturbed run makes of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from harness import Ended, arguments, run_here

from pipeline.catalog.demo import SCHEMA, write_demo_catalog

PRODUCTS, PARTITIONS, SEED = 300, 6, 77


@dataclass(frozen=True)
class Season:
    """A shop in mid-season.

    Attributes:
        old: the catalog of which release 1 was made.
        new: the catalog that is to be embedded: 300 products in 6 partitions.
        before: a database with release 1.
        after: the same one after an undisturbed run over `new`.
        undisturbed: how that run ended.
    """

    old: Path
    new: Path
    before: Path
    after: Path
    model: str
    undisturbed: Ended

    def copy(self, folder: Path) -> Path:
        """A database with release 1, to be spoilt."""
        return Path(shutil.copytree(self.before, folder / "db"))

    def arguments(self, db: Path, *sets: str) -> list[str]:
        """Of the run over the new catalog."""
        return arguments(self.new, db, self.model, *sets)


def make_season(folder: Path, model: str) -> Season:
    """Draw and embed; a Ray is up."""
    old, new, before, after = (folder / name for name in ("old", "new", "before", "after"))
    each = PRODUCTS // PARTITIONS
    for number in range(PARTITIONS):
        write_demo_catalog(new / str(number), products=each, start=number * each, seed=SEED)
    write_last_season(new, old)
    first = run_here(arguments(old, before, model))
    assert first.code == 0, first.log
    shutil.copytree(before, after)
    undisturbed = run_here(arguments(new, after, model))
    assert (undisturbed.code, undisturbed.told["release"]) == (0, 2), undisturbed.log
    return Season(old, new, before, after, model, undisturbed)


def write_last_season(new: Path, old: Path) -> None:
    """The catalog as it was: no last partition, other titles for two thirds, a photo less for a third."""
    for path in sorted(new.rglob("*.parquet"))[:-1]:
        rows = pq.read_table(path).to_pylist()
        for number, row in enumerate(rows):
            if number % 3 and row["title"]:
                row["title"] += " (last season)"
            if not number % 3:
                row["images"] = row["images"][1:]
        target = old / path.relative_to(new)
        target.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), target)
