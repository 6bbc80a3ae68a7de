"""Measure how good search is, or whether it got worse: `python -m jobs.evaluate --db DB [--against RELEASE]`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, count, number, positive, run_and_tell
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.evaluate.products import Products
    from pipeline.evaluate.queries import Query
    from pipeline.store.releases import Release

log = logging.getLogger("jobs.evaluate")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(
        prog="python -m jobs.evaluate",
        description="Ask a release many queries in three modes, and tell how many hits are of the right category, "
        "what diversifying costs and brings, and how sure that is. With --against: whether it is worse than another.",
        epilog="exit codes: 0 measured, or not worse; 1 worse, or not shown not to be; 2 wrong arguments, database, "
        "model or query file",
    )
    result.add_argument("--db", required=True, help="folder or object-store prefix of the LanceDB tables")
    result.add_argument("--release", type=positive, metavar="N", help="which release; by default the newest")
    result.add_argument("--model", help="a folder, when the release's own model is not at hand")
    result.add_argument("--device", default="cpu", help="where queries are embedded: cpu or cuda")
    result.add_argument("--against", type=positive, metavar="N", help="ask both the frozen queries of release N")
    result.add_argument("--margin", type=number, default=0.01, help="with --against: loss of precision@10 that may be")
    result.add_argument(
        "--recipe", default="article", help="of the queries: article, attribute, broad, fine, description"
    )
    result.add_argument("--queries", type=positive, default=1000, metavar="N", help="how many to draw")
    result.add_argument("--seed", type=count, default=0, help="of the draw")
    result.add_argument("--query-file", type=Path, metavar="FILE", help="CSV, TSV or JSON lines in place of a recipe")
    result.add_argument("--qrels", type=Path, metavar="FILE", help="judgements of its queries, in TREC's form")
    result.add_argument(
        "--fine",
        default="category",
        choices=("category", "type"),
        help="what fine is: fine_category, or what texts say",
    )
    result.add_argument(
        "--keep-source", action="store_true", help="let the product that a query is drawn from be a hit"
    )
    result.add_argument("--index", action="store_true", help="also through the vector index, as users search")
    result.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes; by default beside DB if that is local"
    )
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    if arguments.against is not None:
        return run_and_tell(arguments, lambda: _compare(arguments), _verdict)
    return run_and_tell(arguments, lambda: _evaluate(arguments), lambda result: str(result["table"]))


def _evaluate(arguments: argparse.Namespace) -> Mapping[str, Any]:
    if arguments.qrels is not None and arguments.query_file is None:
        raise ConfigError("--qrels judges the queries of a file: give it with --query-file")
    out = _folder(arguments)
    from pipeline.evaluate.answers import Settings
    from pipeline.evaluate.evaluation import evaluate
    from pipeline.evaluate.files import figures_of, write_report
    from pipeline.evaluate.table import lines
    from pipeline.query import Searcher

    searcher = Searcher.open(
        arguments.db, release=arguments.release, model=arguments.model, device=arguments.device
    ).held()
    settings = Settings(
        recipe=arguments.recipe,
        queries=arguments.queries,
        seed=arguments.seed,
        fine=arguments.fine,
        keeps_source=arguments.keep_source,
        through_index=arguments.index,
    )
    evaluation, per_query = evaluate(searcher, settings, queries=_from_file(arguments), tell=log.info)
    shown = {hit.product_id for example in evaluation.examples for _, hits in example.rows for hit in hits}
    written = write_report(evaluation, out, thumbnails=searcher.thumbnails(shown), per_query=per_query)
    table = f"{lines(evaluation)}\n\nreport     {written['report']}"
    if arguments.json:
        return {**figures_of(evaluation), "report": str(written["report"]), "seconds": dict(evaluation.seconds)}
    return {"table": table}


def _from_file(arguments: argparse.Namespace) -> Callable[[Products], Sequence[Query]] | None:
    if arguments.query_file is None:
        return None
    from pipeline.evaluate.query_files import read_queries

    return lambda products: read_queries(arguments.query_file, products, qrels=arguments.qrels)


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the report goes."""
    from pipeline.paths import is_uri

    if arguments.out is not None:
        return Path(arguments.out)
    if is_uri(arguments.db):
        raise ConfigError("the report is written to a local folder: name one with --out")
    return Path(arguments.db) / "_evaluation" / "report"


def _compare(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from pipeline.config import GateConfig
    from pipeline.evaluate.gate import compare
    from pipeline.store.releases import get_release
    from pipeline.store.tables import open_database

    if arguments.query_file is not None:
        raise ConfigError("--against asks the frozen queries of that release; leave out --query-file")
    db = open_database(arguments.db)
    base, new = get_release(db, arguments.against), _newest(arguments)
    if base.release == new.release:
        raise ConfigError(f"--against {base.release} is the release itself; name an older one")
    settings = GateConfig(
        on=True, margin=arguments.margin, queries=arguments.queries, recipe=arguments.recipe, seed=arguments.seed
    )
    verdict = compare(db, base, new, settings, tell=log.info)
    told = {"release": new.release, **verdict.as_json(), "sentence": verdict.sentence}
    return {**told, "exit_code": 0 if verdict.is_passed else 1}


def _newest(arguments: argparse.Namespace) -> Release:
    from pipeline.query import Searcher

    return Searcher.open(arguments.db, release=arguments.release).release


def _verdict(result: Mapping[str, Any]) -> str:
    """The comparison as a table."""
    rows = [
        f"release {result['release']} against {result['base']}: {result['queries']:,} queries, {result['common']:,} "
        f"common products, {result['added']:,} new, {result['gone']:,} gone",
        "",
        f"{'precision@10':<16}{'base':>8}{'new':>8}{'change':>9}  {'95% interval':<20}{'p (Holm)':>9}",
    ]
    for line in result["lines"]:
        low, high = line["difference"]["low"], line["difference"]["high"]
        rows.append(
            f"{line['mode'] + ', ' + line['level']:<16}{line['base']:>8.4f}{line['new']:>8.4f}"
            f"{line['difference']['mean']:>+9.4f}  {f'{low:+.4f} to {high:+.4f}':<20}{line['p_holm']:>9.4f}"
            f"  {'passed' if line['is_passed'] else 'FAILED'}"
        )
        rows += [
            f"    {change['category']}: {change['base']:.3f} to {change['new']:.3f} ({change['queries']:,} queries)"
            for change in line["worst"][:3]
            if not line["is_passed"]
        ]
    if result["added"]:
        shares = ", ".join(f"{mode} {share:.1%}" for mode, share in result["added_hits"].items())
        rows += ["", f"new products among the first 10 of all: {shares}; they are not gated"]
    return "\n".join([*rows, "", str(result["sentence"])])


if __name__ == "__main__":
    raise SystemExit(main())
