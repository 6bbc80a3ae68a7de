"""Canaries: golden vectors stored with a model folder, embedded at every start and compared.

`canary.json` holds the sha256 of the folder's files and the float32 vectors of a few fixed texts and images. A changed
file is caught by its digest; weights that load but compute something else (another library, another device, a wrong
table) are caught by the vectors.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.errors import ModelError
from pipeline.model.folder import PUBLISHED_NAME, PUBLISHED_REVISION
from pipeline.model.identity import CANARY, NUMERICS, read_json

if TYPE_CHECKING:
    from pipeline.model.model import FloatArray, Model

log = logging.getLogger(__name__)

TEXTS = (
    "hello world",
    "red dress",
    "Ärmelloses Kleid aus Leinen, Größe 38, 100 % Baumwolle",
    "A long wool coat with a shawl collar, two patch pockets and a belt, fully lined, made for cold and windy days.",
)
MAX_TOKENS = 512
"""The canary texts are cut here and not at the model's `max_tokens`, which a user may set lower than they are long."""

IMAGES = ("gradient", "checks", "noise")

MAX_DIFFERENCE = 1e-4
"""Allowed between float32 vectors, in any coordinate of a unit vector."""

MIN_COSINE = {"float16": 0.9999, "bfloat16": 0.999}
"""Allowed against the float32 golden in half precision."""

HELLO_WORLD = (-0.0862, -0.0101, -0.0056, 0.0375, -0.0472)
"""First five coordinates of "hello world" under the published weights, from qdrant/fastembed's tests."""

HELLO_TOLERANCE = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 5e-3}
"""The source states 1e-3; half precision adds its own rounding."""

Vectors = Mapping[str, "FloatArray"]


def draw(name: str) -> Image.Image:
    """One of the fixed images, from integer arithmetic alone: RGB, opaque, the same on every machine."""
    if name == "gradient":
        y, x = np.mgrid[0:240, 0:320]
        channels = [x * 255 // 319, y * 255 // 239, (x + y) % 256]
    elif name == "checks":
        y, x = np.mgrid[0:150, 0:100]
        odd = (x // 12 + y // 20) % 2
        channels = [230 - 200 * odd, 40 + 100 * odd, 60 + x]
    else:
        # The raw stream of PCG64 is fixed by numpy's compatibility policy.
        raw = np.random.PCG64(20_241).random_raw(64 * 64 * 3) >> np.uint64(56)
        return Image.fromarray(raw.astype(np.uint8).reshape(64, 64, 3))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def embed(model: Model) -> dict[str, FloatArray]:
    """Unit vectors of the canary inputs, float32 (D,), by `text: ...` and `image: ...`, for the loaded towers."""
    out: dict[str, FloatArray] = {}
    if model.has_tower("text"):
        vectors = model.embed_tokens(model.tokenize(TEXTS, max_tokens=MAX_TOKENS))
        out |= {f"text: {text}": vector for text, vector in zip(TEXTS, vectors, strict=True)}
    if model.has_tower("image"):
        vectors = model.embed_crops(np.stack([model.recipe.prepare(draw(name)).crop for name in IMAGES]))
        out |= {f"image: {name}": vector for name, vector in zip(IMAGES, vectors, strict=True)}
    return out


def check(model: Model) -> None:
    """Embed the canary inputs and compare them with the folder's golden vectors.

    A folder without `canary.json` is let pass with one warning in the log; under the published name and revision the
    one vector that is publicly known is compared as well.

    Raises:
        ModelError: by how much which input is off.
    """
    got = embed(model)
    for name, vector in got.items():
        if not np.isfinite(vector).all():
            raise ModelError(f"{model.name} gives a vector that is not finite for {name!r}: its weights are damaged.")
    dtype, path = model.card.options.dtype, Path(model.card.path) / CANARY
    if model.card.has_canary:
        compare(read(path), got, dtype, f"{model.name} does not compute the vectors that {path} records")
    elif not is_published(model):
        log.warning(
            "%s has no canary.json: its vectors cannot be checked. Write one with: python -m jobs.check_model %s "
            "--write-canary",
            model.name,
            model.name,
        )
    if is_published(model) and model.has_tower("text"):
        off = float(np.abs(got["text: hello world"][:5] - np.array(HELLO_WORLD)).max())
        if off > HELLO_TOLERANCE[dtype]:
            raise ModelError(f'{model.name}: "hello world" is off the published vector by {off:.2g}: wrong weights.')


def is_published(model: Model) -> bool:
    """Whether the model is jina-clip-v1 at its pinned revision, as named by whoever loaded it.

    Only the name is proof: the published files' digests are not known here, and a 768-dimensional folder of the same
    configuration may well hold other weights, a fine-tuned model among them.
    """
    return model.name == PUBLISHED_NAME and Path(model.card.path).name == PUBLISHED_REVISION


def compare(want: Vectors, got: Vectors, dtype: str, sentence: str) -> None:
    """Compare vectors input by input, within what the compute dtype allows.

    Raises:
        ModelError: `sentence`, the worst input and by how much it is off.
    """
    for name, vector in got.items():
        golden = want.get(name)
        if golden is None or golden.shape != vector.shape:
            raise ModelError(f"{sentence}: it has no vector of {len(vector)} dimensions for {name!r}.")
        if dtype == "float32":
            off = float(np.abs(vector - golden).max())
            if not off <= MAX_DIFFERENCE:
                raise ModelError(f"{sentence}: {name!r} is off by {off:.2g}, allowed is {MAX_DIFFERENCE:g}.")
        else:
            cosine = float(vector @ golden)
            if not cosine >= MIN_COSINE[dtype]:
                raise ModelError(f"{sentence}: {name!r} has cosine {cosine:.5f}, wanted is {MIN_COSINE[dtype]}.")


def read(path: Path) -> dict[str, FloatArray]:
    """The golden vectors of a `canary.json`.

    Raises:
        ModelError: unreadable.
    """
    vectors: Any = read_json(path).get("vectors")
    try:
        return {str(name): np.array(vector, np.float32) for name, vector in vectors.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path} holds no vectors; write it anew with jobs.check_model --write-canary.") from error


def write(model: Model) -> Path:
    """Write `canary.json` into the model's folder, replacing an older one as a whole.

    Raises:
        ModelError: the model is not in float32, lacks a tower, or the folder cannot be written.
    """
    if model.card.options.dtype != "float32" or not (model.has_tower("text") and model.has_tower("image")):
        raise ModelError("A canary is written from both towers in float32.")
    path = Path(model.card.path) / CANARY
    vectors = {name: [round(float(x), 8) for x in vector] for name, vector in embed(model).items()}
    content = {"numerics": NUMERICS, "files": dict(model.card.digests), "vectors": vectors}
    part = path.with_name(f".{CANARY}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        part.replace(path)
    except OSError as error:
        raise ModelError(f"{path} cannot be written ({error.strerror}).") from error
    return path
