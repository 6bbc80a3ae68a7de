"""What this machine can do, and how near to it we come: `python -m jobs.benchmark --out DIR`.

Limits of the machine, the towers, decoding, whole backfills, the write path, and peers in the same run on the same
bytes. What is compared takes turns; every figure is a median with its spread, and ratios come first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.bench.timing import TURNS, Row
from jobs.cli import JobParser, add_log_level, positive, run_and_tell
from pipeline.errors import ConfigError
from pipeline.run.memory import keep_freed_memory

log = logging.getLogger("jobs.benchmark")

PEERS = ("onnx", "timm", "sentence-transformers")
"""Parts that need `twotower[peers]`, and are left out unless they are named."""
PARTS = (
    "limits", "towers", "decode", "plain", "embedder", "backfill", "fixed", "raydata", "write", "query", "scaling",
    "actors", *PEERS,
)  # fmt: skip
_ROWS, _DIM = 200_000, 768
_TEXTS, _IMAGES = 128, 32
_EMBEDDER_ROWS = 16
_PRODUCTS, _RAY_PRODUCTS = 300, 2_000
_SIZES = (10_000, 100_000)
_ACTORS = (1, 2, 4)
_ACTORS_PRODUCTS = 40_000
_SEARCHED, _SEARCHES = 20_000, 100


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = JobParser(prog="python -m jobs.benchmark", description=__doc__)
    result.add_argument("--out", type=Path, default=Path(".demo/benchmark"), metavar="DIR", help="where results go")
    ours = [part for part in PARTS if part not in PEERS]
    named = f"which, of {', '.join(PARTS)}; all but the last {len(PEERS)}, which need twotower[peers], by default"
    result.add_argument("--parts", default=",".join(ours), help=named)
    result.add_argument("--catalog", help="of all that reads one; by default a drawn one of 300 products")
    result.add_argument(
        "--model", help="of towers and backfills; by default the published configuration with seeded weights"
    )
    result.add_argument("--limit", type=positive, metavar="N", help="products of the backfill beside the towers")
    result.add_argument(
        "--sizes", default=",".join(map(str, _SIZES)), metavar="N,N", help="products of the catalogs of `scaling`"
    )
    result.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of towers and matrix products")
    result.add_argument("--dtypes", default="float32", help="of them, as float32,bfloat16")
    result.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the backfills")
    result.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    arguments = parser().parse_args(argv)
    return run_and_tell(arguments, lambda: _measure(arguments), describe)


def _measure(arguments: argparse.Namespace) -> Mapping[str, Any]:
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"--parts knows no {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()  # as the actors do; peers that run in this process have it too
    rows: list[Row] = []
    for name, part in _parts(arguments).items():
        if name in parts:
            log.info("%s", name)
            for row in part():
                log.info("%s", line_of(row))
                rows.append(row)
    told = {"machine": _machine(), "turns": TURNS, "rows": [dataclasses.asdict(row) for row in rows]}
    (arguments.out / "benchmark.json").write_text(json.dumps(told, indent=1))
    (arguments.out / "benchmark.html").write_text(_page(told, rows), encoding="utf-8")
    return {**told, "out": str(arguments.out)}


def _parts(arguments: argparse.Namespace) -> Mapping[str, Callable[[], Iterator[Row]]]:
    """Each part by name; imported only as it runs, since peers may be missing."""
    from jobs.bench import limits, peers, queries, ray_data, runs, scaling, towers, writes
    from pipeline.model import load_model

    out, dtypes = arguments.out, arguments.dtypes.split(",")
    model_name = _model(arguments)
    catalog = _catalog(arguments)

    def load(dtype: str = "float32") -> Any:
        return load_model(model_name, device=arguments.device, dtype=dtype)

    def images() -> Sequence[bytes]:
        return runs.read_inputs(catalog, limit=_IMAGES).images[:_IMAGES]

    def texts() -> list[str]:
        return runs.mixed_texts(catalog, _TEXTS)

    def on_ray(part: Callable[..., Iterator[Row]], of: str) -> Iterator[Row]:
        return _on_one_ray(lambda settings: part(of, "demo", out, settings=settings), arguments.set)

    def larger() -> str:
        return catalog if arguments.catalog else _drawn(out, _RAY_PRODUCTS)

    settings = arguments.set
    return {
        "limits": lambda: limits.limits(out, arguments.device, dtypes),
        "towers": lambda: towers.towers({d: load(d) for d in dtypes}, texts()),
        "decode": lambda: runs.decoding(load(), runs.read_inputs(catalog, limit=200).images),
        "plain": lambda: towers.plain_loop({d: load(d) for d in ("float32", *dtypes)}, texts(), images()),
        "embedder": lambda: runs.embedder_beside_towers(catalog, model_name, out, rows=_EMBEDDER_ROWS),
        "backfill": lambda: _each(
            dtypes,
            lambda dtype: runs.backfill_beside_towers(
                catalog, model_name, out, limit=arguments.limit, device=arguments.device, dtype=dtype, settings=settings
            ),
        ),
        "fixed": lambda: on_ray(runs.fixed_cost, catalog),
        "raydata": lambda: on_ray(ray_data.backfill_beside_ray_data, larger()),
        "write": lambda: writes.writes(out, rows=_ROWS, dim=_DIM),
        "query": lambda: queries.queries(out, Path(model_name), products=_SEARCHED, count=_SEARCHES),
        "scaling": lambda: scaling.by_products(out, _sizes(arguments.sizes), settings=settings),
        "actors": lambda: scaling.by_actors(out, _ACTORS_PRODUCTS, _ACTORS, settings=settings),
        "onnx": lambda: peers.beside_onnx(load(), texts(), images(), out),
        "timm": lambda: peers.beside_timm(load(), images()),
        "sentence-transformers": lambda: peers.beside_sentence_transformers(texts(), images(), out / "clip"),
    }


def _each(dtypes: Sequence[str], part: Callable[[str], Iterator[Row]]) -> Iterator[Row]:
    for dtype in dtypes:
        yield from part(dtype)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--sizes takes whole numbers from 1, as 10000,100000, not {text!r}")
    return sizes


def _on_one_ray(part: Callable[[Sequence[str]], Iterator[Row]], settings: Sequence[str]) -> Iterator[Row]:
    """A part whose runs share a Ray, so that its start is in none of them."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield from part([*settings, "ray.address=auto"])
    finally:
        ray.shutdown()


def _model(arguments: argparse.Namespace) -> str:
    """The model's name; the seeded one of the published size is written once."""
    if arguments.model:
        return str(arguments.model)
    folder = arguments.out / "model"
    if not (folder / "model.safetensors").exists():
        from jobs.measure_query import write_model

        write_model(folder, 0)
    return str(folder)


def _catalog(arguments: argparse.Namespace) -> str:
    if arguments.catalog:
        return str(arguments.catalog)
    return _drawn(arguments.out, _PRODUCTS)


def _drawn(out: Path, products: int) -> str:
    """A drawn catalog of so many products, drawn once."""
    from jobs.demo import draw

    folder = out / f"catalog-of-{products}"
    draw(folder, products=products, seed=0)
    return str(folder)


def _machine() -> dict[str, str]:
    import torch

    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    told = {"cpu": f"{len(names)} x {names[0]}" if names else platform.processor(), "torch": torch.__version__}
    if torch.cuda.is_available():
        told["gpu"] = torch.cuda.get_device_name()
    return told


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def line_of(row: Row, what_width: int = 0, ratio_width: int = 0) -> str:
    """A row as text, its ratio first."""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x {row.beside}"
    aim = "" if row.aim is None else f" (aim {row.aim:g})"
    told = f"{row.what:<{what_width}}  {ratio + aim:<{ratio_width}}"
    return f"{told}  {row.rate:>9,.1f} {row.unit}, {row.low:,.1f} to {row.high:,.1f}"


def describe(result: Mapping[str, Any]) -> str:
    """The table."""
    machine = ", ".join(f"{name} {text}" for name, text in result["machine"].items())
    rows = [Row(**row) for row in result["rows"]]
    widths = max(len(row.what) for row in rows), max(len(row.beside) for row in rows) + len("0.00x  (aim 0.00)")
    lines = [line_of(row, *widths) for row in rows]
    return "\n".join([machine, f"medians of {result['turns']} turns", "", *lines, "", f"results: {result['out']}"])


def _page(told: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The same as a page."""
    from pipeline.run.report_html import document, section, table

    lead = "".join(f"<p>{name}: {text}</p>" for name, text in told["machine"].items())
    sections = []
    for part in dict.fromkeys(row.part for row in rows):
        body = [_cells(row) for row in rows if row.part == part]
        sections.append(section(part.capitalize(), table(part, ["", "ratio", "to", "aim", "median", "spread"], body)))
    return document("Benchmark", lead, sections)


def _cells(row: Row) -> list[str]:
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    aim = "" if row.aim is None else f"{row.aim:g}"
    return [row.what, ratio, row.beside, aim, f"{row.rate:,.1f} {row.unit}", f"{row.low:,.1f} to {row.high:,.1f}"]


if __name__ == "__main__":
    raise SystemExit(main())
