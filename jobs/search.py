"""Search a released database from the command line: a table, JSON, or a contact sheet."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.cli import JobParser, run_job, start_log
from pipeline.errors import QueryError
from pipeline.query import Diversify, Mixture, Searcher
from pipeline.query.contact_sheet import Section, contact_sheet
from pipeline.query.filters import parse_where
from pipeline.query.request import MODES, VECTOR_MODES
from pipeline.query.rerank import METHODS
from pipeline.query.results import SAME_PICTURE, Hits
from pipeline.records import Hit
from pipeline.shown import as_json, visible

_CONDITION = re.compile(r"\s*(?P<column>[^=!<>~]+?)\s*(?P<operator>!=|<=|>=|=|<|>|~)\s*(?P<value>.*)", re.DOTALL)
_OPERATORS = {"=": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "~": "contains"}
_WIDEST = 60
_LABELS = {"text": "query to description", "image": "query to image", "avg": "query to average"}
_SCORES = {"vector": "score: cosine, 1 is the same direction", "hybrid": "score: sum of reciprocal ranks"}
_LABELS["hybrid"] = "query to average and to words"
_LABELS["diversified"] = "query to description, different pictures first"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    arguments = _parser().parse_args(argv)
    start_log("warning")
    return run_job(lambda: _run(arguments), as_json=arguments.json)


def _run(arguments: argparse.Namespace) -> None:
    query = _query(arguments)
    if arguments.open and arguments.sheet is None:
        arguments.sheet = Path(tempfile.mkdtemp(prefix="twotower-")) / "contact_sheet.html"
    if arguments.sheet and arguments.sheet.suffix.lower() not in (".html", ".png"):
        raise QueryError(f"--sheet writes .html or .png, not {arguments.sheet.name!r}.")
    searcher = Searcher.open(arguments.db, release=arguments.release, model=arguments.model, device=arguments.device)
    diversify = _diversify(arguments)
    where = parse_conditions(arguments.where, searcher)
    options = {
        "k": arguments.k, "offset": arguments.offset, "where": where, "exact": arguments.exact,
        "collapse_duplicates": arguments.collapse_duplicates,
    }  # fmt: skip
    is_all = arguments.mode == "all"
    explained = {}
    if arguments.explain:  # before the search, which leaves the query's vector where explain would find it
        modes = {mode: (mode, None if is_all else diversify) for mode in (VECTOR_MODES if is_all else [arguments.mode])}
        if is_all and diversify:
            modes["diversified"] = ("text", diversify)
        explained = {
            name: searcher.explain(query, mode=mode, diversify=how, **options) for name, (mode, how) in modes.items()
        }
    results = {
        mode: searcher.search(query, mode=mode, diversify=None if is_all else diversify, **options)
        for mode in (VECTOR_MODES if is_all else [arguments.mode])
    }
    if is_all and diversify:  # the article's layout: three modes as they are, and the text mode diversified
        results["diversified"] = searcher.search(query, mode="text", diversify=diversify, **options)
    if arguments.sheet:
        within = SAME_PICTURE if arguments.collapse_duplicates is None else arguments.collapse_duplicates
        _write_sheet(searcher, _shown(arguments), results, diversify, within, arguments.sheet)
    if arguments.json:
        lists = {mode: [_as_json(hit) for hit in hits] for mode, hits in results.items()}
        print(as_json(lists if is_all else lists[arguments.mode]).decode(), flush=True)
    else:
        for mode, hits in results.items():
            print(f"{_LABELS[mode]} ({mode})" + (", diversified" if diversify and not is_all else ""))
            print(table(hits, width=shutil.get_terminal_size((110, 24)).columns), flush=True)
            if hits.rank_correlation is not None:
                spread = "-" if hits.diversity is None else f"{hits.diversity:.3f}"
                print(f"mean distance of two images {spread}, rank correlation {hits.rank_correlation:.2f}")
            if mode in explained:
                print(explained[mode])
            print(flush=True)
    if arguments.sheet and (arguments.open or not arguments.json):
        print(f"contact sheet: {visible(arguments.sheet)}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.open and _has_screen():
        webbrowser.open(arguments.sheet.absolute().as_uri())


def _diversify(arguments: argparse.Namespace) -> Diversify | None:
    """How to diversify; its options are none of a search that does not."""
    names = ("candidates", "clusters", "method", "trade_off")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if given and not arguments.diversify:
        raise QueryError(f"--{next(iter(given)).replace('_', '-')} says how --diversify reorders; give that too.")
    return Diversify(**given) if arguments.diversify else None


def _query(arguments: argparse.Namespace) -> object:
    """A text, an image, or both and more as a mixture."""
    parts: list[tuple[object, float]] = [(part, 1.0) for part in (arguments.query, arguments.image) if part is not None]
    for text in arguments.mix:
        words, _, weight = text.rpartition("=")
        try:
            parts.append((words, float(weight)))
        except ValueError:
            words = ""
        if not words:
            raise QueryError(f"--mix takes TEXT=WEIGHT, as in --mix 'red=0.5' --mix 'stripes=-0.3', not {text!r}.")
    if not parts:
        raise QueryError("Give a query text, --image FILE, or both.")
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1.0 else Mixture(parts)


def _has_screen() -> bool:
    """Whether a browser would open a window; without one Python may start one in the terminal, and wait for it."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _shown(arguments: argparse.Namespace) -> str:
    return " + ".join(str(part) for part in (arguments.query, arguments.image, *arguments.mix) if part is not None)


def parse_conditions(texts: Sequence[str], searcher: Searcher) -> dict[str, Any] | None:
    """The `where` of conditions such as `price<100`, with values read as their columns' types.

    Raises:
        QueryError: a text is no condition, or its value is none of the column's.
    """
    conditions = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise QueryError(f"{text!r} is no condition; write column=value, or one of != < <= > >= ~ in place of =.")
        conditions.append(
            _read(match["column"], _OPERATORS[match["operator"]], match["value"].strip(), searcher.schema)
        )
    return {"and": conditions} if conditions else None


def _read(column: str, operator: str, value: str, schema: pa.Schema) -> dict[str, Any]:
    """The condition with its value as a text, a number or a boolean: the first that the column takes."""
    refused = QueryError(f"{value!r} cannot be read.")
    for one in dict.fromkeys((value, _number(value), _boolean(value))):  # once, where it reads as a text alone
        condition = {column: {operator: one}}
        try:
            parse_where(condition, schema)
        except QueryError as error:
            refused = error
        else:
            return condition
    raise refused


def table(hits: Sequence[Hit], *, width: int) -> str:
    """Hits as aligned lines at most `width` wide; control characters are written out, never sent to the terminal."""
    if not hits:
        return "nothing was found"
    rows = [["rank", "score", "product_id", "title", "category"]]
    if has_cluster := any(hit.cluster is not None for hit in hits):
        rows[0].insert(2, "cluster")
    for hit in hits:
        categories = dict.fromkeys(hit.fields.get(name) for name in ("broad_category", "fine_category"))
        title = hit.fields.get("title") or hit.fields.get("description") or ""
        row = [str(hit.rank), f"{hit.score:.4f}", visible(hit.product_id), visible(title)]
        row.append(" > ".join(visible(category) for category in categories if category))
        if has_cluster:
            row.insert(2, "-" if hit.cluster is None else str(hit.cluster + 1))
        rows.append(row)
    wide = [min(_WIDEST, max(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    spare = width - sum(wide) - 2 * (len(wide) - 1)
    if spare < 0:
        wide[-2] = max(16, wide[-2] + spare)
    lines = ("  ".join(_padded(cell, size) for cell, size in zip(row, wide, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _padded(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"


def _number(value: str) -> object:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _boolean(value: str) -> object:
    return {"true": True, "false": False}.get(value.lower(), value)


def _as_json(hit: Hit) -> Mapping[str, object]:
    return {
        "product_id": hit.product_id,
        "score": hit.score,
        "rank": hit.rank,
        "cluster": hit.cluster,
        "duplicates": list(hit.duplicates),
        "fields": hit.fields,
    }


def _write_sheet(
    searcher: Searcher,
    query: str,
    results: Mapping[str, Hits],
    diversify: Diversify | None,
    alike: float,
    path: Path,
) -> None:
    sections = [
        Section(_LABELS[mode], hits, _note(mode, hits, diversify), hits.look_alikes(alike))
        for mode, hits in results.items()
    ]
    thumbnails = searcher.thumbnails(hit.product_id for hits in results.values() for hit in hits)
    release = searcher.release
    about = f"release {release.release} · model {release.model} · {release.created_at:%Y-%m-%d}"
    contact_sheet(sections, path, query=query, thumbnails=thumbnails, note=about)


def _note(mode: str, hits: Hits, diversify: Diversify | None) -> str:
    """What a list's scores are, how much its pictures differ, and where it was reordered, how."""
    parts = [_SCORES["hybrid" if mode == "hybrid" else "vector"]]
    if diversify and hits.rank_correlation is not None:
        how = f"{diversify.clusters} clusters"
        if diversify.method == "mmr":
            how = f"marginal relevance, trade-off {diversify.trade_off:g}"
        parts.append(f"{diversify.candidates} candidates, {how}")
        parts.append(f"rank correlation with the original order {hits.rank_correlation:.2f}")
    if hits.diversity is not None:
        parts.append(f"mean distance of two images {hits.diversity:.3f}")
    return " · ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = JobParser(prog="python -m jobs.search", description=__doc__)
    parser.add_argument("query", nargs="?", help="what to look for, in words")
    parser.add_argument("--db", required=True, help="folder or URI of the database")
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="look for what is in this image; with words, for both"
    )
    parser.add_argument("--model", help="a model folder, when the release's own is not at hand")
    parser.add_argument("--mode", choices=[*MODES, "all"], default="avg", help="what is compared with the query")
    parser.add_argument("--k", type=int, default=10, help="how many hits")
    parser.add_argument("--offset", type=int, default=0, help="how many better hits to leave out")
    parser.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="column=value, or != < <= > >= ~ (contains) in place of =; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--diversify", action="store_true", help="show different pictures first; with --mode all, as a fourth list"
    )
    parser.add_argument("--candidates", type=int, help="how many hits --diversify reorders (50)")
    parser.add_argument("--clusters", type=int, help="into how many groups of similar pictures (5)")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="of --diversify: clusters of pictures (kmeans, the default), or marginal relevance",
    )
    parser.add_argument(
        "--trade-off", type=float, metavar="W", help="of mmr: 1 only the query counts, 0 only differences (0.5)"
    )
    parser.add_argument(
        "--collapse-duplicates", type=float, metavar="D",
        help="show hits whose images are within this cosine distance once, 0.02 for instance",
    )  # fmt: skip
    parser.add_argument(
        "--mix", action="append", default=[], metavar="TEXT=WEIGHT",
        help="more or, with a negative weight, less of this too; may be repeated",
    )  # fmt: skip
    parser.add_argument("--exact", action="store_true", help="compare with every vector instead of using the index")
    parser.add_argument("--explain", action="store_true", help="tell what was read, and the time by step")
    parser.add_argument("--release", type=int, metavar="N", help="search this release instead of the newest")
    parser.add_argument("--device", default="cpu", help="where the query is embedded: cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print a list of hits; for --mode all an object of lists")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet too: .html or .png")
    parser.add_argument(
        "--open", action="store_true", help="write a contact sheet, name it, and show it where there is a screen"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
