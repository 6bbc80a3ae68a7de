"""Measure a model on drawn products that the demo model was not trained on: `python -m jobs.measure_demo --model demo`.

Queries are `<colour> <fine category>`, every combination that occurs. precision@10 counts hits of the right broad
category, of the right fine category, and exact ones (colour and fine category, out of min(10, matches)); beside it are
the same towers untrained and the random floor. An untrained text tower is not at the floor: a mean of random word
vectors still measures the overlap of words. Queries for combinations that training never saw are reported apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from jobs.cli import add_log_level, run_job, start_log
from jobs.train_demo import DRAWN_PX, Pair, Recipe, initialise, write_folder
from pipeline.catalog.demo_garments import draw_photo
from pipeline.catalog.demo_products import TEST_SEED, DemoProduct, held_out_pair, product
from pipeline.catalog.demo_words import catalog_listing
from pipeline.catalog.products import assemble_text
from pipeline.model.identity import read_json
from pipeline.model.image_tower import ImageConfig
from pipeline.model.load import load_model
from pipeline.model.model import Model
from pipeline.model.text_tower import TextConfig

MODES = ("text", "image", "avg")
MEASURES = ("broad", "fine", "exact")
K = 10
_CHUNK = 200


@dataclass(frozen=True)
class Drawn:
    """Products to search: their texts and the crops of their photos, uint8 (N, 64, 64, 3) with the owner of each."""

    items: Sequence[DemoProduct]
    texts: Sequence[str]
    crops: np.ndarray
    owner: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.measure_demo", description=__doc__)
    parser.add_argument("--model", default="demo", help="`demo` or a folder of the demo model's layout")
    parser.add_argument("--products", type=int, default=8000, help="how many products are searched")
    parser.add_argument("--seed", type=int, default=TEST_SEED, help="of the products; never the training seed")
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_log_level(parser)
    arguments = parser.parse_args(argv)
    start_log(arguments.log_level)
    torch.set_num_threads(arguments.threads)

    def job() -> Mapping[str, Any]:
        result = measure(arguments.model, products=arguments.products, seed=arguments.seed, workers=arguments.threads)
        if not arguments.json:
            print(table(result))
        return result

    return run_job(job, as_json=arguments.json)


def measure(name: str, *, products: int, seed: int, workers: int = 1) -> dict[str, Any]:
    """precision@10 by mode and measure, of the model, of its towers untrained, and of chance.

    Returns:
        `trained`, `untrained`: {mode: {measure: value}}; `held_out`: the same over combinations not trained on;
        `chance`: {measure: value}; `queries`, `held_out_queries`: how many.
    """
    model = load_model(name)
    drawn = draw(model, products=products, seed=seed, workers=workers)
    queries = sorted({(item.colour, item.fine) for item in drawn.items})
    is_held_out = np.array([held_out_pair(colour, fine) for colour, fine in queries])
    scores = precision(model, drawn, queries)
    with tempfile.TemporaryDirectory() as folder:
        untrained = load_model(str(untrained_folder(model, Path(folder))))
        floor = precision(untrained, drawn, queries)
    return {
        "products": products,
        "photos": len(drawn.crops),
        "seed": seed,
        "queries": len(queries),
        "held_out_queries": int(is_held_out.sum()),
        "trained": _means(scores),
        "held_out": _means({key: values[is_held_out] for key, values in scores.items()}),
        "untrained": _means(floor),
        "chance": chance(drawn.items, queries),
    }


def draw(model: Model, *, products: int, seed: int, workers: int) -> Drawn:
    """Draw every photo of the products and crop it as the model does."""
    chunks = [(seed, range(i, min(i + _CHUNK, products))) for i in range(0, products, _CHUNK)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        photos = [photo for chunk in pool.map(_draw_chunk, chunks) for photo in chunk]
    items = [product(seed, i) for i in range(products)]
    owner = np.repeat(np.arange(products), [item.n_images for item in items])
    crops = np.stack([model.prepare_image(_picture(photo)).crop for photo in photos])
    listings = [catalog_listing(seed, item) for item in items]
    return Drawn(items, [assemble_text(words.title, words.description) or "" for words in listings], crops, owner)


def precision(model: Model, drawn: Drawn, queries: Sequence[tuple[str, str]]) -> dict[tuple[str, str], np.ndarray]:
    """precision@10 of each query, by (mode, measure)."""
    text = model.embed_texts(list(drawn.texts))
    photos = np.concatenate([model.embed_crops(drawn.crops[i : i + 512]) for i in range(0, len(drawn.crops), 512)])
    image = np.zeros_like(text)
    np.add.at(image, drawn.owner, photos)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    average = text + image
    average /= np.linalg.norm(average, axis=1, keepdims=True)
    asked = model.embed_texts([f"{colour} {fine}" for colour, fine in queries])
    result = {}
    for mode, vectors in zip(MODES, (text, image, average), strict=True):
        best = np.argsort(-(asked @ vectors.T), axis=1, kind="stable")[:, :K]
        for measure, relevant in relevance(drawn.items, queries):
            found = np.take_along_axis(relevant, best, axis=1).sum(axis=1)
            result[mode, measure] = found / np.minimum(K, relevant.sum(axis=1))
    return result


def relevance(items: Sequence[DemoProduct], queries: Sequence[tuple[str, str]]) -> Iterator[tuple[str, np.ndarray]]:
    """Bool (queries, products) for each measure."""
    fine = np.array([item.fine for item in items])
    broad_of = {item.fine: item.broad for item in items}
    broad = np.array([item.broad for item in items])
    colour = np.array([item.colour for item in items])
    wanted_colour, wanted_fine = (np.array(part)[:, None] for part in zip(*queries, strict=True))
    wanted_broad = np.array([broad_of[fine] for _, fine in queries])[:, None]
    yield "broad", broad == wanted_broad
    yield "fine", fine == wanted_fine
    yield "exact", (fine == wanted_fine) & (colour == wanted_colour)


def chance(items: Sequence[DemoProduct], queries: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What ten products drawn by lot would score."""
    result = {}
    for measure, relevant in relevance(items, queries):
        expected = K * relevant.mean(axis=1) / np.minimum(K, relevant.sum(axis=1))
        result[measure] = float(expected.mean())
    return result


def untrained_folder(model: Model, folder: Path) -> Path:
    """The same architecture and tokenizer with the weights that training began from."""
    source = Path(model.card.path)
    config = read_json(source / "config.json")
    text, image = TextConfig.from_config(config["text_config"]), ImageConfig.from_config(config["vision_config"])
    torch.manual_seed(Recipe().seed)
    pair = Pair(text, image, Recipe().first_scale)
    initialise(pair)
    write_folder(folder, pair, text, image, Tokenizer.from_file(str(source / "tokenizer.json")))
    return folder


def table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        f"{result['queries']} queries over {result['products']:,} products ({result['photos']:,} photos), "
        f"seed {result['seed']}; {result['held_out_queries']} queries ask for combinations that were not trained on",
        "",
        "| precision@10: broad / fine / exact | text | image | avg |",
        "|---|---|---|---|",
    ]
    for name, label in (("trained", "demo model"), ("held_out", "held-out combinations"), ("untrained", "untrained")):
        cells = [" / ".join(f"{result[name][mode][measure]:.3f}" for measure in MEASURES) for mode in MODES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    floor = " / ".join(f"{result['chance'][measure]:.3f}" for measure in MEASURES)
    return "\n".join([*lines, f"| by lot | {floor} | {floor} | {floor} |"])


def _draw_chunk(chunk: tuple[int, range]) -> list[np.ndarray]:
    """uint8 (128, 128, 3) for every photo of the chunk's products, in order."""
    seed, indices = chunk
    found = [product(seed, index) for index in indices]
    return [np.asarray(draw_photo(item, seed, n, DRAWN_PX)) for item in found for n in range(item.n_images)]


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _means(scores: Mapping[tuple[str, str], np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        mode: {m: float(np.mean(scores[mode, m])) if len(scores[mode, m]) else 0.0 for m in MEASURES} for mode in MODES
    }


if __name__ == "__main__":
    raise SystemExit(main())
