"""Who a model is: digests of its files, its identities, and what `canary.json` recorded of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pipeline.errors import ModelError
from pipeline.model.images import Style
from pipeline.model.weights import TensorInfo, file_digest

NUMERICS = 1
"""Part of every fingerprint; raised only when golden vectors move."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

WEIGHTS, CONFIG, TOKENIZER, PIXELS = "model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json"
CANARY = "canary.json"
FILES = (CONFIG, WEIGHTS, TOKENIZER, PIXELS)

Kind = Literal["jina-clip", "clip", "siglip"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is used; all but `dtype` and `compile` are part of `model_id`."""

    dtype: str = "float32"
    preprocessing: Style = "shop"
    max_tokens: int = 512
    jpeg_draft: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        if self.preprocessing not in ("shop", "published"):
            raise ModelError(f"preprocessing must be shop or published, not {self.preprocessing!r}.")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Who a model is.

    Attributes:
        name: as it was asked for.
        path: the folder.
        kind: which architecture.
        dim: D, the length of a vector.
        model_id: sha256 over weights, config, tokenizer and preprocessing settings; the same on every machine.
        fingerprint: sha256 over model_id, compute dtype and `NUMERICS`.
        options: as it was asked for.
        image_size: side of the image tower's input, in pixels.
        n_parameters: elements in the weights file.
        weights_bytes: its size.
        digests: sha256 by file name.
        has_canary: whether the folder proves its own vectors.
    """

    name: str
    path: str
    kind: Kind
    dim: int
    model_id: str
    fingerprint: str
    options: ModelOptions
    image_size: int
    n_parameters: int
    weights_bytes: int
    digests: Mapping[str, str]
    has_canary: bool


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: missing, unreadable, or not an object.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing; a model folder holds {', '.join(FILES)}.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); fetch the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return values


def make_card(
    name: str,
    folder: Path,
    kind: Kind,
    dim: int,
    options: ModelOptions,
    settings: Mapping[str, object],
    header: Mapping[str, TensorInfo],
    *,
    check_canary: bool,
) -> ModelCard:
    """Hash the folder's files, compare them with `canary.json`, and derive the identities.

    Args:
        name: as the model was asked for.
        folder: where it lies.
        kind: its architecture.
        dim: length of its vectors.
        options: as they were asked for.
        settings: what preprocessing does, as plain values; `size` among them.
        header: of the weights file.
        check_canary: compare with `canary.json`; without it the card says that there is none.

    Raises:
        ModelError: a file is not the one that `canary.json` records.
    """
    digests = {file: file_digest(folder / file) for file in FILES if (folder / file).is_file()}
    has_canary = check_canary and check_digests(folder, digests)
    identity = {
        "weights": digests[WEIGHTS],
        "config": digests[CONFIG],
        "tokenizer": digests[TOKENIZER],
        "preprocessing": settings,
    }
    model_id = _sha256(identity)
    return ModelCard(
        name=name,
        path=str(folder),
        kind=kind,
        dim=dim,
        model_id=model_id,
        fingerprint=_sha256({"model_id": model_id, "dtype": options.dtype, "numerics": NUMERICS}),
        options=options,
        image_size=int(str(settings["size"])),
        n_parameters=sum(math.prod(info.shape) for info in header.values()),
        weights_bytes=(folder / WEIGHTS).stat().st_size,
        digests=digests,
        has_canary=has_canary,
    )


def check_digests(folder: Path, digests: Mapping[str, str]) -> bool:
    """Compare files with the digests in `canary.json`; false where there is none.

    Raises:
        ModelError: a file is not the one that was recorded.
    """
    if not (folder / CANARY).is_file():
        return False
    recorded = read_json(folder / CANARY).get("files")
    if not isinstance(recorded, dict) or recorded.keys() < {CONFIG, WEIGHTS, TOKENIZER}:
        raise ModelError(f"{folder / CANARY} records no digests; write it anew with jobs.check_model --write-canary.")
    for file, digest in recorded.items():
        if digests.get(file) != digest:
            raise ModelError(
                f"{folder / file} is not the file that canary.json records: its sha256 is "
                f"{str(digests.get(file))[:12]}..., recorded is {str(digest)[:12]}...; restore the file, or, if the "
                "change is meant, write a new canary with jobs.check_model --write-canary."
            )
    return True


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
