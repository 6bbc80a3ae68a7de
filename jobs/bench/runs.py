"""Decoding alone, and whole backfills beside the towers alone and beside Ray Data, on the same catalog and model."""

from __future__ import annotations

import io
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.limits import SIDES, photo
from jobs.bench.timing import TURNS, Row, Timed, in_turns

if TYPE_CHECKING:
    from pipeline.model.model import Model
    from pipeline.model.preprocess import PixelRecipe
    from pipeline.records import Product

log = logging.getLogger("jobs.benchmark")

_DECODED = 200  # images of the catalog, for the decoder alone
_PHOTO_SIDES = 10_000  # of all drawn photos of a size together, in pixels


@dataclass(frozen=True)
class Inputs:
    """Everything of a catalog that goes through a tower: texts as they are assembled, images as they are stored."""

    texts: Sequence[str]
    images: Sequence[bytes]


def read_inputs(catalog_uri: str, *, limit: int | None = None) -> Inputs:
    """The distinct texts and images of a catalog's first products, those that cannot be decoded included."""
    texts: dict[str, None] = {}
    images: dict[bytes, None] = {}
    for product in islice(_products(catalog_uri), limit):
        if product.text:
            texts[product.text] = None
        images |= {image.data: None for image in product.images if isinstance(image.data, bytes)}
    return Inputs(list(texts), list(images))


def mixed_texts(catalog_uri: str, count: int) -> list[str]:
    """Texts of mixed lengths, as of a shop where half of the products have no description yet.

    The first texts of the catalog that differ, every second one cut to its title, in an order drawn with seed 0.
    """
    found: dict[str, None] = {}
    for number, product in enumerate(_products(catalog_uri)):
        if text := (product.metadata.get("title") if number % 2 else product.text):
            found[str(text)] = None
        if len(found) == count:
            break
    texts = list(found)
    return [texts[at] for at in np.random.default_rng(0).permutation(len(texts))]


def _products(catalog_uri: str) -> Iterator[Product]:
    from pipeline.catalog.partitions import open_catalog
    from pipeline.catalog.products import RowPlan, read_products
    from pipeline.config import CatalogConfig, ColumnsConfig

    catalog = open_catalog(catalog_uri, CatalogConfig(), ColumnsConfig())
    for partition in catalog.partitions:
        for products, _ in read_products(catalog, partition, RowPlan()):
            yield from products


def decoding(model: Model, images: Sequence[bytes], sides: Sequence[int] = SIDES) -> Iterator[Row]:
    """Decode and preprocess on one thread, beside the decoder's own rate on the same files.

    Args:
        model: whose preprocessing it is.
        images: of a catalog; those that cannot be read are left out.
        sides: longest sides, in pixels, of drawn photographs, which are decoded with `jpeg_draft` too.
    """
    from pipeline.errors import ImageRejected

    good = []
    for data in images[:_DECODED]:
        try:
            model.prepare_image(data)
        except ImageRejected:
            continue
        good.append(data)
    yield from _decoding(model.recipe, good, "the catalog's images", aim=0.7)
    for side in sides:
        photos = [photo(side, seed) for seed in range(max(1, _PHOTO_SIDES // side))]
        yield from _decoding(model.recipe, photos, f"{side} px", is_drafted=True)


def _decoding(
    recipe: PixelRecipe, images: Sequence[bytes], of: str, *, aim: float | None = None, is_drafted: bool = False
) -> Iterator[Row]:
    from PIL import Image

    def library() -> None:
        for data in images:
            Image.open(io.BytesIO(data)).convert("RGB").load()

    def prepare(recipe: PixelRecipe) -> None:
        for data in images:
            recipe.prepare(data)

    plain, draft = f"decode and preprocess, {of}", f"decode and preprocess with jpeg_draft, {of}"
    alone = "the decoder alone"
    calls: dict[str, Callable[[], object]] = {alone: library, plain: lambda: prepare(recipe)}
    if is_drafted:
        calls[draft] = lambda: prepare(replace(recipe, jpeg_draft=True))
    timed = in_turns(calls)
    for name in tuple(calls)[1:]:
        yield timed.row("decode", name, len(images), "images/s", beside=alone, aim=aim)
    yield timed.row("decode", alone, len(images), "images/s", what=f"{alone}, {of}")


def backfill_beside_towers(
    catalog: str,
    model_name: str,
    folder: Path,
    *,
    limit: int | None,
    device: str = "cpu",
    dtype: str = "float32",
    settings: Sequence[str] = (),
    turns: int = TURNS,
) -> Iterator[Row]:
    """Whole backfills, start-up aside, in turns with the towers alone on the same inputs, decoded beforehand.

    Both are rates of inputs. A backfill counts from its first batch to its release, index included where there is one.

    Args:
        catalog: of the backfill.
        model_name: of both.
        folder: for the databases, which are removed.
        limit: only so many products.
        device: of both.
        dtype: of both.
        settings: of the backfill.
        turns: how often each runs.
    """
    from pipeline.model import load_model

    settings = [f"model.device={device}", f"model.dtype={dtype}", *settings]
    inputs = read_inputs(catalog, limit=limit)
    count, towers = _towers_alone(load_model(model_name, device=device, dtype=dtype), inputs)
    seconds: dict[str, list[float]] = {"whole backfill": [], "towers alone": []}
    for turn in range(turns):
        begun = time.perf_counter()
        towers()
        seconds["towers alone"].append(time.perf_counter() - begun)
        told = _backfill(catalog, model_name, folder / f"backfill-{turn}", limit=limit, settings=settings)
        stages = told["run_seconds"]
        spent = told["usage"]["embedding_s"] + stages["reduce"] + stages["release"]
        seconds["whole backfill"].append(spent * count / max(1, told["embedded"]))
        log.info("turn %d: towers alone %.1f s, whole backfill %.1f s of %s inputs, stages %s", turn,
                 seconds["towers alone"][-1], spent, told["embedded"], stages)  # fmt: skip
    timed = Timed({name: tuple(found) for name, found in seconds.items()})
    what = f"whole backfill, {count:,} inputs, {dtype}"
    yield timed.row("backfill", "whole backfill", count, "inputs/s", beside="towers alone", aim=0.92, what=what)
    yield timed.row("backfill", "towers alone", count, "inputs/s", what=f"towers alone, {dtype}")


def embedder_beside_towers(catalog: str, model_name: str, folder: Path, *, rows: int) -> Iterator[Row]:
    """One actor's work in this process, a staged file from the catalog's first rows, in turns with the towers alone.

    Args:
        catalog: whose first partition's rows are embedded.
        model_name: of both.
        folder: for the staged file, which is removed.
        rows: how many.
    """
    import torch

    from pipeline.catalog.partitions import open_catalog
    from pipeline.catalog.products import RowPlan
    from pipeline.config import CatalogConfig, ColumnsConfig
    from pipeline.run.embed import Embedder, EmbedSettings
    from pipeline.run.partition import Work, stage_partition
    from pipeline.run.schedule import Unit

    opened = open_catalog(catalog, CatalogConfig(), ColumnsConfig())
    partition = opened.partitions[0]
    rows = min(rows, partition.rows)
    embedder = Embedder(EmbedSettings(model_name, decode_threads=torch.get_num_threads()), opened.root)
    count, towers = _towers_alone(embedder.model, read_inputs(catalog, limit=rows))
    staged = folder / "staged"
    work = Work(partition, RowPlan(), Unit(partition.name, 0, rows), str(staged))
    calls = {"towers alone": towers, "embedder": lambda: stage_partition(embedder, opened, work)}
    timed = in_turns(calls)
    staged.unlink()
    what = f"embedder, {count:,} inputs to a staged file"
    yield timed.row("embedder", "embedder", count, "inputs/s", beside="towers alone", what=what)
    yield timed.row("embedder", "towers alone", count, "inputs/s")


def _towers_alone(model: Model, inputs: Inputs) -> tuple[int, Callable[[], object]]:
    """How many of the inputs can be read, and a call that embeds those, decoded and tokenised beforehand."""
    tokens, crops = model.tokenize(inputs.texts), good_crops(model, inputs.images)
    model.embed_crops(crops[:16])
    return len(crops) + len(inputs.texts), lambda: (model.embed_tokens(tokens), model.embed_crops(crops))


def good_crops(model: Model, images: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Those of the images that can be read, decoded and cropped: uint8 (B, size, size, 3)."""
    from pipeline.errors import ImageRejected

    crops = [np.zeros((0, model.recipe.size, model.recipe.size, 3), np.uint8)]
    for data in images:
        try:
            crops.append(model.prepare_image(data).crop[None])
        except ImageRejected:
            continue
    return np.concatenate(crops)


def backfill_beside_ray_data(
    catalog: str, model_name: str, folder: Path, *, settings: Sequence[str] = (), turns: int = TURNS
) -> Iterator[Row]:
    """Whole runs, start-up of actors included, on one Ray: ours to released tables, Ray Data to Parquet files.

    The other one is what Ray's own guide shows: read, decode in tasks, embed in an actor, write.

    Args:
        catalog: of both.
        model_name: of both.
        folder: for what is written, which is removed.
        settings: of the backfill.
        turns: how often each runs.
    """
    inputs = read_inputs(catalog)
    count = len(inputs.texts) + len(inputs.images)
    seconds: dict[str, list[float]] = {"ours": [], "Ray Data": []}
    for turn in range(turns):
        begun = time.perf_counter()
        _ray_data(catalog, model_name, folder / f"ray-data-{turn}")
        seconds["Ray Data"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        _backfill(catalog, model_name, folder / f"ours-{turn}", limit=None, settings=settings)
        seconds["ours"].append(time.perf_counter() - begun)
    timed = Timed({name: tuple(found) for name, found in seconds.items()})
    what = f"whole backfill, {count:,} inputs, start-up included"
    yield timed.row("peers", "ours", count, "inputs/s", beside="Ray Data", aim=2.0, what=what)
    yield timed.row("peers", "Ray Data", count, "inputs/s")


def fixed_cost(
    catalog: str, model_name: str, folder: Path, *, settings: Sequence[str] = (), turns: int = TURNS
) -> Iterator[Row]:
    """Seconds of a whole backfill of ten products on a Ray that runs already, and of the start of its actor."""
    seconds, starts = [], []
    for turn in range(turns + 1):
        begun = time.perf_counter()
        told = _backfill(catalog, model_name, folder / f"fixed-{turn}", limit=10, settings=settings)
        if turn:  # the first one imports what all use
            seconds.append(time.perf_counter() - begun)
            starts.append(told["usage"]["start_s"])
    for what, found in (("backfill of 10 products, after ray.init", seconds), ("of it the actor's start", starts)):
        yield Row("backfill", what, statistics.median(found), min(found), max(found), "s")


def _backfill(
    catalog: str, model_name: str, db: Path, *, limit: int | None, settings: Sequence[str]
) -> Mapping[str, Any]:
    from pipeline.config import load_config
    from pipeline.run.backfill import backfill

    shutil.rmtree(db, ignore_errors=True)
    config = load_config(None, settings, catalog_uri=catalog, db=str(db), model_name=model_name)
    told = backfill(config, limit=limit)
    shutil.rmtree(db, ignore_errors=True)
    return told


def _ray_data(catalog: str, model_name: str, out: Path) -> None:
    """Ray Data from the same files to Parquet files of vectors."""
    import ray.data

    shutil.rmtree(out, ignore_errors=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Half a core each by Ray's count, or two actors on two cores leave none to read with, and the job waits for ever.
    how: Any = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 0.5}
    products = ray.data.read_parquet(catalog, columns=["product_id", "title", "description", "images"])
    decoded = products.map_batches(_Decode, fn_constructor_args=(model_name,), batch_size=64, **how)
    embedded = decoded.map_batches(_Embed, fn_constructor_args=(model_name,), batch_size=64, **how)
    embedded.write_parquet(str(out))
    shutil.rmtree(out, ignore_errors=True)


class _Decode:
    """Images to crops, on threads."""

    def __init__(self, model_name: str) -> None:
        from pipeline.model import load_model

        self._model = load_model(model_name, towers=("text",))  # for its preprocessing; no image tower is needed
        self._threads = ThreadPoolExecutor(2)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [[data for data in images if data] for images in batch["images"]]
        crops = [
            np.stack([c for c in self._threads.map(self._crop, row) if c is not None] or [self._none()]) for row in rows
        ]
        return {"product_id": batch["product_id"], "text": _texts(batch), "crops": _ragged(crops)}

    def _crop(self, data: bytes) -> np.ndarray[Any, Any] | None:
        from pipeline.errors import ImageRejected

        try:
            return self._model.prepare_image(data).crop
        except ImageRejected:
            return None

    def _none(self) -> np.ndarray[Any, Any]:
        size = self._model.recipe.size
        return np.zeros((size, size, 3), np.uint8)


class _Embed:
    """Both towers, and the average of each product's vectors."""

    def __init__(self, model_name: str) -> None:
        from pipeline.model import load_model

        self._model = load_model(model_name)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = self._model.embed_texts([text or "-" for text in batch["text"]])
        counts = [len(crops) for crops in batch["crops"]]
        images = self._model.embed_crops(np.concatenate(list(batch["crops"])))
        means = np.stack([part.mean(axis=0) for part in np.split(images, np.cumsum(counts)[:-1])])
        return {
            "product_id": batch["product_id"],
            "text_vector": texts,
            "image_vector": means,
            "avg_vector": texts + means,
        }


def _texts(batch: dict[str, Any]) -> np.ndarray[Any, Any]:
    pairs = zip(batch["title"], batch["description"], strict=True)
    return np.array([". ".join(part for part in pair if part).strip() for pair in pairs], object)


def _ragged(arrays: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    out = np.empty(len(arrays), object)
    out[:] = list(arrays)
    return out
