"""Whole backfills beside Ray Data with the same model, as Ray's own guide to batch inference does it.

Rows are read and decoded in tasks, by Pillow as one writes it, embedded by the same model in an actor, and written to
Parquet files. Once the vectors of each product alone; and once what a backfill's tables hold: images with vector, hash,
size and thumbnail, and products with their averages. Neither looks at what is unchanged or wrong, resumes, verifies or
releases.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from jobs.bench.runs import centre_crop, read_inputs, whole_backfill
from jobs.bench.timing import TURNS, Row, in_turns

_BATCH_ROWS = 64
_THUMBNAIL_PX, _THUMBNAIL_QUALITY = 224, 85
_IMAGE = pa.struct({"image_id": pa.string(), "sha256": pa.string(), "width_px": pa.int32(), "height_px": pa.int32(),
                    "thumbnail": pa.binary()})  # fmt: skip


def backfill_beside_ray_data(
    catalog: str, model_name: str, folder: Path, *, settings: Sequence[str] = (), turns: int = TURNS
) -> Iterator[Row]:
    """Whole runs, start-up of actors included, on one Ray: ours to released tables, Ray Data's to files.

    Args:
        catalog: of all.
        model_name: of all.
        folder: for what is written, which is removed.
        settings: of the backfill.
        turns: how often each runs.
    """
    from pipeline.model import load_model

    inputs, size = read_inputs(catalog), load_model(model_name).recipe.size
    count, out = len(inputs.texts) + len(inputs.images), folder / "ray-data"
    tables, vectors = "Ray Data, all that the tables hold", "Ray Data, vectors alone"

    def theirs(write: Callable[[str, str, int, Path], None]) -> None:
        write(catalog, model_name, size, out)
        shutil.rmtree(out)

    calls: Mapping[str, Callable[[], object]] = {
        vectors: lambda: theirs(write_vectors),
        tables: lambda: theirs(write_tables),
        "ours": lambda: whole_backfill(catalog, model_name, folder / "ours", limit=None, settings=settings),
    }
    shutil.rmtree(out, ignore_errors=True)
    timed = in_turns(calls, turns=turns, warm=False)
    what = f"whole backfill, {count:,} inputs, start-up included"
    yield timed.row("peers", "ours", count, "inputs/s", beside=tables, aim=2.0, what=what)
    yield timed.row("peers", "ours", count, "inputs/s", beside=vectors, what=what)
    for name in (tables, vectors):
        yield timed.row("peers", name, count, "inputs/s")


def write_vectors(catalog: str, model_name: str, size: int, out: Path) -> None:
    """The three vectors of each product, to Parquet files."""
    _embedded(catalog, model_name, size, has_images=False).write_parquet(str(out))


def write_tables(catalog: str, model_name: str, size: int, out: Path) -> None:
    """Both tables, to Parquet files, since the `write_lance` of Ray 2.60 fails on pylance 14."""
    embedded = _embedded(catalog, model_name, size, has_images=True).materialize()
    for name, rows in (("products", _product_rows), ("images", _image_rows)):
        table = embedded.map_batches(rows, batch_format="pyarrow", batch_size=None)
        table.write_parquet(str(out / name))


def _embedded(catalog: str, model_name: str, size: int, *, has_images: bool) -> Any:
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    products = ray.data.read_parquet(catalog).select_columns(["product_id", "title", "description", "images"])
    how = {"size": size, "has_images": has_images}
    decoded = products.map_batches(_decode, fn_kwargs=how, batch_size=_BATCH_ROWS)
    # Half a core by Ray's count: an actor and a task of one on two cores leave none to read with, and the job waits.
    actor: Any = {"compute": ray.data.ActorPoolStrategy(size=1), "num_cpus": 0.5, "batch_size": _BATCH_ROWS}
    return decoded.map_batches(_Embed, fn_constructor_args=(model_name, has_images), **actor)


def _decode(batch: dict[str, Any], size: int, has_images: bool) -> pa.Table:
    """Texts as they are assembled, and of each product the crops of the images that can be read, one after another."""
    crops: list[bytes] = []
    images: list[list[dict[str, object]]] = []
    for product_id, row in zip(batch["product_id"], batch["images"], strict=True):
        own: list[bytes] = []
        about: list[dict[str, object]] = []
        for ordinal, data in enumerate(row):
            try:
                image = Image.open(io.BytesIO(data or b"")).convert("RGB")
            except OSError:
                continue
            own.append(centre_crop(image, size).tobytes())
            if has_images:
                values = (f"{product_id}/{ordinal}", hashlib.sha256(data).hexdigest(), *image.size, _thumbnail(image))
                about.append(dict(zip(_IMAGE.names, values, strict=True)))
        crops.append(b"".join(own))
        images.append(about)
    pairs = zip(batch["title"], batch["description"], strict=True)
    texts = [". ".join(part for part in pair if part).strip() or "-" for pair in pairs]
    table = {"product_id": pa.array(batch["product_id"]), "text": pa.array(texts), "crops": pa.array(crops)}
    return pa.table(table | ({"images": pa.array(images, pa.list_(_IMAGE))} if has_images else {}))


def _thumbnail(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    image.save(out, "JPEG", quality=_THUMBNAIL_QUALITY)
    return out.getvalue()


class _Embed:
    """Both towers, and the average of each product's vectors."""

    def __init__(self, model_name: str, has_images: bool) -> None:
        from pipeline.model import load_model

        self._model, self._has_images = load_model(model_name), has_images

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        texts = self._model.embed_texts(list(batch["text"]))
        size = self._model.recipe.size
        crops = np.frombuffer(b"".join(batch["crops"]), np.uint8).reshape(-1, size, size, 3)
        counts = [len(data) // (3 * size**2) for data in batch["crops"]]
        ends = np.cumsum(counts)
        vectors = self._model.embed_crops(crops)
        own = np.split(vectors, ends[:-1])
        means = np.stack([part.mean(axis=0) if len(part) else text for part, text in zip(own, texts, strict=True)])
        table = {"product_id": pa.array(batch["product_id"]), "text": pa.array(batch["text"])}
        for name, found in (("text", texts), ("image", means), ("avg", (texts + means) / 2)):
            table[f"{name}_vector"] = _vectors(found)
        if self._has_images:
            about = pa.array([list(row) for row in batch["images"]], pa.list_(_IMAGE)).flatten()
            rows = pa.StructArray.from_arrays([*about.flatten(), _vectors(vectors)], [*_IMAGE.names, "vector"])
            table["images"] = pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), rows)
        return pa.table(table)


def _vectors(array: np.ndarray[Any, Any]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), array.shape[1])


def _product_rows(batch: pa.Table) -> pa.Table:
    return batch.drop_columns("images")


def _image_rows(batch: pa.Table) -> pa.Table:
    return pa.Table.from_struct_array(batch["images"].combine_chunks().flatten())
