"""The whole path on the embedded model and catalog: `make demo`, or `python -m jobs.demo --out DIR`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import search as search_job
from jobs.backfill import summary
from jobs.cli import add_log_level, run_job, start_log

QUERY = "red midi dress"
_SHOWN = 6


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m jobs.demo", description=__doc__)
    result.add_argument("--out", type=Path, default=Path(".demo"), metavar="DIR", help="where catalog and tables go")
    result.add_argument("--products", type=int, default=2000, metavar="N", help="how many products to draw")
    result.add_argument("--seed", type=int, default=0, help="of the drawn catalog")
    result.add_argument("--query", default=QUERY, help="what to search for at the end")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    start_log(arguments.log_level)

    def job() -> Mapping[str, Any]:
        from pipeline.config import load_config
        from pipeline.run.backfill import backfill

        catalog, db = arguments.out / "catalog", arguments.out / "db"
        print(draw(catalog, products=arguments.products, seed=arguments.seed), flush=True)
        carried = 'columns.carried=["price"]'
        config = load_config(None, [carried], catalog_uri=str(catalog), db=str(db), model_name="demo")
        print(f"\n$ {command('backfill', catalog=catalog, db=db, model='demo', set=carried)}", flush=True)
        print(summary(backfill(config)), flush=True)
        code = show(db, arguments.query, arguments.out)
        print(_next_steps(catalog, db, carried))
        return {"exit_code": code}

    return run_job(job)


def draw(catalog: Path, *, products: int, seed: int) -> str:
    """Draw the catalog, unless it lies there already; returns a line about it."""
    from pipeline.catalog.demo import write_demo_catalog

    wanted = {"products": products, "seed": seed}
    mark = catalog / "_drawn.json"  # written last, so that a half-drawn catalog is drawn again
    if mark.exists() and json.loads(mark.read_text()) == wanted:
        return f"catalog    {products:,} products in {catalog}, drawn before"
    for old in catalog.glob("*.parquet"):
        old.unlink()
    manifest = write_demo_catalog(catalog, products=products, seed=seed, workers=os.cpu_count() or 1)
    mark.write_text(json.dumps(wanted))
    return f"catalog    {manifest.products:,} products, {manifest.images:,} images drawn in {catalog}"


def show(db: Path, query: str, out: Path) -> int:
    """One query in the three modes and diversified: in the terminal and as a picture."""
    arguments = [query, "--db", str(db), "--k", str(_SHOWN), "--mode", "all", "--diversify"]
    picture = [*arguments, "--sheet", str(out / "contact_sheet.png")]
    print(f"\n$ {shlex.join(['python', '-m', 'jobs.search', *picture])}", flush=True)
    return search_job.main(picture)


def command(job: str, **options: object) -> str:
    """A job's command line as a person would type it."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", f"jobs.{job}", *words])


def _next_steps(catalog: Path, db: Path, carried: str) -> str:
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    again = command("backfill", catalog=catalog, db=db, model="demo", set=carried).partition(" ")[2]
    return "\n".join(
        [
            "\nnext:",
            f"  {shown} -m jobs.search 'navy pleated skirt' --db {db} --where 'price<60' --diversify",
            f"  {shown} -m jobs.evaluate --db {db}",
            f"  {shown} {again}",
            f"  {shown} -m jobs.status --db {db}",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
