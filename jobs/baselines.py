"""What one model for texts and images buys: the same catalog and queries through others, in one table.

`python -m jobs.baselines --catalog DIR --out DIR --model jinaai/jina-clip-v1 --beside clip=FOLDER` embeds the catalog
with each model into a database of its own under --out, and with the first one its texts alone. All answer the same
queries, exactly. Two models, one for texts and another for images, are shown as those run them who have no unified one:
each mode by its own model, and no average, as their spaces differ.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import JobParser, add_log_level, count, positive, run_and_tell
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.evaluate.answers import Answers, Settings

log = logging.getLogger("jobs.baselines")

TEXT_ONLY = "texts alone"
_NO_IMAGES = ('columns.images=""', "max_reject_share=1")
_MODES = ("text", "image", "avg")
_K = 10


@dataclass(frozen=True)
class Baseline:
    """One row of the table.

    Attributes:
        name: as it is shown.
        models: how many have to be kept and run.
        precision: by level and mode precision@10; without a mode that it does not have.
        seconds: that its run, or its runs, took to embed the catalog, start of the actors included.
        bytes_per_product: of vectors, those of its images included, indices and thumbnails left out.
        image_bytes_per_product: of them those of images.
    """

    name: str
    models: int
    precision: Mapping[str, Mapping[str, float]]
    seconds: float
    bytes_per_product: float
    image_bytes_per_product: float


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.baselines", description=__doc__)
    result.add_argument("--catalog", required=True, help="folder, file, glob or object-store prefix of Parquet files")
    result.add_argument("--out", required=True, type=Path, metavar="DIR", help="a database for each model goes here")
    result.add_argument("--model", required=True, help="the unified model: a folder, a hub id, or `demo`")
    result.add_argument(
        "--beside", action="append", default=[], metavar="NAME=MODEL", help="another model, as clip=FOLDER; repeatable"
    )
    result.add_argument("--config", metavar="FILE.toml", help="settings of the runs")
    result.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, as pool.gpus=2")
    result.add_argument("--recipe", default="article", help="of the queries; see jobs.evaluate")
    result.add_argument("--queries", type=positive, default=1000, metavar="N", help="how many to draw")
    result.add_argument("--seed", type=count, default=0, help="of the draw")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run_and_tell(arguments, lambda: _measure(arguments), describe)


def _measure(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from pipeline.evaluate.answers import Settings

    beside = dict(_named(arguments.beside))
    settings = Settings(recipe=arguments.recipe, queries=arguments.queries, seed=arguments.seed)
    unified = Path(arguments.model).name or str(arguments.model)
    texts = _run(arguments, settings, TEXT_ONLY, arguments.model, "texts", *_NO_IMAGES)
    others = [_run(arguments, settings, name, model, f"beside-{name}") for name, model in beside.items()]
    rows = [
        _run(arguments, settings, unified, arguments.model, "unified"),
        texts,
        *others,
        *(_both(texts, other) for other in others),
    ]
    return {"k": _K, "queries": arguments.queries, "seed": arguments.seed, "rows": [asdict(row) for row in rows]}


def _named(pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, _, model = pair.partition("=")
        if not model or not name.isalnum():
            raise ConfigError(
                f"--beside takes NAME=MODEL, the name of letters and digits, as clip=FOLDER; got {pair!r}"
            )
        yield name, model


def _run(arguments: argparse.Namespace, settings: Settings, name: str, model: str, folder: str, *more: str) -> Baseline:
    """Embed the catalog with a model, unless its database holds it already, and ask it the queries."""
    from pipeline.config import load_config
    from pipeline.evaluate.answers import answer
    from pipeline.query import Searcher
    from pipeline.run.backfill import backfill

    db = str(arguments.out / folder)
    log.info("%s: %s into %s", name, model, db)
    sets = [*arguments.set, *more]
    backfill(load_config(arguments.config, sets, catalog_uri=arguments.catalog, db=db, model_name=model))
    answers = answer(Searcher.open(db).held(), settings, tell=log.info)
    modes = ("text",) if more else _MODES
    count = len(answers.products)
    stored, of_images = (_bytes(db, columns) / count for columns in (modes, ("image",)))
    return Baseline(name, 1, _precision(answers, modes), _seconds(db), stored, of_images)


def _precision(answers: Answers, modes: Sequence[str]) -> dict[str, dict[str, float]]:
    from pipeline.evaluate import measures

    return {
        level: {
            mode: float(measures.precision(answers.gains(level, mode)[relevance.asked], _K).mean()) for mode in modes
        }
        for level, relevance in answers.relevance.items()
    }


def _seconds(db: str) -> float:
    """Of the run that embedded: the first that released, as a later one may have found little to do."""
    from pipeline.store.tables import Database

    runs = Database(db).dataset("runs").to_table(columns=["status", "started_at", "seconds"]).to_pylist()
    return float(
        min((run for run in runs if run["status"] == "released"), key=lambda run: run["started_at"])["seconds"]
    )


def _bytes(db: str, modes: Sequence[str]) -> int:
    """Bytes on disk of the vectors of these modes, and of single images where they have them."""
    from pipeline.store.tables import Database

    columns = {"products": {f"{mode}_vector" for mode in modes}, "images": {"vector"} if "image" in modes else set()}
    total = 0
    for table, wanted in columns.items():
        dataset = Database(db).dataset(table)
        ids = {field.id() for field in dataset.lance_schema.fields() if field.name() in wanted}
        total += sum(field.bytes_on_disk for field in dataset.stats.data_stats().fields if field.id in ids)
    return total


def _both(texts: Baseline, other: Baseline) -> Baseline:
    """One model for texts beside another for images, as they are run without a unified one."""
    precision = {
        level: {"text": modes["text"], "image": other.precision[level]["image"]}
        for level, modes in texts.precision.items()
    }
    return Baseline(
        f"{texts.name} and {other.name} for images",
        2,
        precision,
        texts.seconds + other.seconds,  # the other's run embedded its texts too
        texts.bytes_per_product + other.image_bytes_per_product,
        other.image_bytes_per_product,
    )


def describe(result: Mapping[str, Any]) -> str:
    """The table."""
    rows = result["rows"]
    levels = list(rows[0]["precision"])
    width = max(len(row["name"]) for row in rows)
    heads = [f"{level} {mode}" for level in levels for mode in _MODES]
    lines = [
        f"precision@{result['k']}, exact search, {result['queries']:,} queries, seed {result['seed']}",
        "",
        f"{'':<{width}}  models" + "".join(f"{head:>13}" for head in heads) + f"{'embed, s':>10}{'bytes':>8}",
    ]
    for row in rows:
        found = [row["precision"][level].get(mode) for level in levels for mode in _MODES]
        cells = "".join(f"{'-' if value is None else format(value, '.4f'):>13}" for value in found)
        lines.append(
            f"{row['name']:<{width}}  {row['models']:>6}{cells}{row['seconds']:>10.1f}{row['bytes_per_product']:>8,.0f}"
        )
    return "\n".join([*lines, "", "bytes: of vectors, a product; embed: the first run of each, start-up included"])


if __name__ == "__main__":
    raise SystemExit(main())
