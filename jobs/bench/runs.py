"""Decoding alone, and an embedder and whole backfills beside the towers alone, on the same catalog and model."""

from __future__ import annotations

import io
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.limits import SIDES, photo
from jobs.bench.timing import TURNS, Row, Timed, in_turns

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.model.model import Model
    from pipeline.model.preprocess import PixelRecipe
    from pipeline.records import Product

log = logging.getLogger("jobs.benchmark")

JPEG = b"\xff\xd8\xff"
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
    """Decode and preprocess on one thread, beside the decoder alone and beside Pillow's steps, on the same files.

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
        if data.startswith(JPEG):
            good.append(data)
    yield from _decoding({"": model.recipe}, good, "the catalog's JPEG images")
    ways = {"": model.recipe, ", images.jpeg_draft=true": replace(model.recipe, jpeg_draft=True)}
    for side in sides:
        yield from _decoding(ways, [photo(side, seed) for seed in range(max(1, _PHOTO_SIDES // side))], f"{side} px")


def _decoding(ways: Mapping[str, PixelRecipe], images: Sequence[bytes], of: str) -> Iterator[Row]:
    import simplejpeg
    from PIL import Image

    def library() -> None:
        for data in images:
            simplejpeg.decode_jpeg(data, fastdct=False, fastupsample=False)

    def by_pillow(size: int) -> None:
        for data in images:
            np.array(centre_crop(Image.open(io.BytesIO(data)).convert("RGB"), size))

    def prepare(recipe: PixelRecipe, *, thumbnail: bool) -> None:
        for data in images:
            recipe.prepare(data, thumbnail=thumbnail)

    alone, pillow, count = "the decoder alone", "Pillow's steps", len(images)
    calls: dict[str, Callable[[], object]] = {alone: library, pillow: partial(by_pillow, ways[""].size)}
    for way, recipe in ways.items():
        calls[f"decode and preprocess, {of}{way}"] = partial(prepare, recipe, thumbnail=False)
        calls[f"the same, and a thumbnail, {of}{way}"] = partial(prepare, recipe, thumbnail=True)
    timed = in_turns(calls)
    names = tuple(calls)[2:]
    yield timed.row("decode", names[0], count, "images/s", beside=pillow)
    for name in names:
        aim = 0.7 if name.startswith("decode") else None
        yield timed.row("decode", name, count, "images/s", beside=alone, aim=aim)
    for name in (alone, pillow):
        yield timed.row("decode", name, count, "images/s", what=f"{name}, {of}")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """As one writes it with Pillow: the short side to the model's size, and the centre of that."""
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), 3).crop((left, top, left + size, top + size))  # 3: bicubic


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
    It takes minutes, in which a shared machine drifts: the towers run before and after each; their mean is compared.

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

    def towers_s() -> float:
        begun = time.perf_counter()
        towers()
        return time.perf_counter() - begun

    before = towers_s()
    for turn in range(turns):
        told = whole_backfill(catalog, model_name, folder / f"backfill-{turn}", limit=limit, settings=settings)
        stages = told["run_seconds"]
        spent = told["usage"]["embedding_s"] + stages["reduce"] + stages["release"]
        seconds["whole backfill"].append(spent * count / max(1, told["embedded"]))
        after = towers_s()
        seconds["towers alone"].append((before + after) / 2)
        before = after
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
    model.embed_crops(crops[:32])
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


def fixed_cost(
    catalog: str, model_name: str, folder: Path, *, settings: Sequence[str] = (), turns: int = TURNS
) -> Iterator[Row]:
    """Seconds of a whole backfill of ten products on a Ray that runs already, and of the start of its actor."""
    seconds, starts = [], []
    for turn in range(turns + 1):
        begun = time.perf_counter()
        told = whole_backfill(catalog, model_name, folder / f"fixed-{turn}", limit=10, settings=settings)
        if turn:  # the first one imports what all use
            seconds.append(time.perf_counter() - begun)
            starts.append(told["usage"]["start_s"])
    for what, found in (("backfill of 10 products, after ray.init", seconds), ("of it the actor's start", starts)):
        yield Row("backfill", what, statistics.median(found), min(found), max(found), "s")


def whole_backfill(
    catalog: str, model_name: str, db: Path, *, limit: int | None, settings: Sequence[str]
) -> Mapping[str, Any]:
    """One run into a database that is removed, and its report."""
    from pipeline.config import load_config
    from pipeline.run.backfill import backfill

    shutil.rmtree(db, ignore_errors=True)
    config = load_config(None, settings, catalog_uri=catalog, db=str(db), model_name=model_name)
    told = backfill(config, limit=limit)
    shutil.rmtree(db, ignore_errors=True)
    return told
