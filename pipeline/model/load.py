"""`load_model` and `describe_model`: from a name to a model that proved itself, or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.errors import ModelError
from pipeline.model import canary, weights
from pipeline.model.folder import describe_jina, kind_of, read_jina, resolve
from pipeline.model.identity import DTYPES, WEIGHTS, ModelCard, ModelOptions
from pipeline.model.image_tower import ImageTower
from pipeline.model.images import Style
from pipeline.model.model import Model
from pipeline.model.text_tower import TextTower
from pipeline.records import ImageLimits

TOWERS = ("text", "image")


def describe_model(
    name: str,
    *,
    dtype: str = "float32",
    preprocessing: Style = "shop",
    max_tokens: int = 512,
    jpeg_draft: bool = False,
    revision: str | None = None,
) -> ModelCard:
    """Check a model as far as that goes without loading it, and say who it is.

    For the driver of a run, which must refuse a bad model before any worker starts: config, tokenizer, preprocessing,
    keys and shapes of the weights, and every digest that `canary.json` records. Digests are remembered, so a second
    call takes well under a second.

    Raises:
        ModelError: what is wrong, in which file, and what to do.
    """
    options = ModelOptions(dtype, preprocessing, max_tokens, jpeg_draft)
    folder = resolve(name, revision)
    if (kind := kind_of(folder)) != "jina-clip":
        from pipeline.model import clip

        return clip.describe(name, folder, kind, options)
    return describe_jina(name, folder, options, read_jina(folder, options), check_canary=True)


def load_model(
    name: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Style = "shop",
    towers: Sequence[str] = TOWERS,
    max_tokens: int = 512,
    jpeg_draft: bool = False,
    compile: bool = False,  # noqa: A002  the field's own word
    revision: str | None = None,
    limits: ImageLimits | None = None,
    check_canary: bool = True,
) -> Model:
    """Load a model and let it prove itself.

    Args:
        name: `demo`, a folder, or a hub id such as `jinaai/jina-clip-v1`.
        device: `cpu` or `cuda`.
        dtype: `float32`, `bfloat16` or `float16`; weights are cast once, normalisation stays in float32.
        preprocessing: `shop`, or `published`: exactly the published code's, alpha dropped and EXIF ignored.
        towers: which to load; identities are the same whichever.
        max_tokens: longer texts are cut; up to 8,192.
        jpeg_draft: decode large JPEG files at reduced size: faster, and no longer exact.
        compile: run the towers through `torch.compile`, after comparing them with the plain ones.
        revision: commit hash on the hub; pinned already for jina-clip-v1.
        limits: which images are refused undecoded.
        check_canary: compare the files with the digests in `canary.json`, embed its golden inputs and compare those.

    Raises:
        ModelError: what is wrong, in which file, and what to do.
    """
    options = ModelOptions(dtype, preprocessing, max_tokens, jpeg_draft)
    wanted = [tower for tower in TOWERS if tower in towers]
    if not wanted or len(wanted) != len(set(towers)):
        raise ModelError(f"towers must name text, image or both, not {list(towers)}.")
    folder = resolve(name, revision)
    place = _device(device)
    limits = limits or ImageLimits()
    if (kind := kind_of(folder)) == "jina-clip":
        model = _load_jina(name, folder, options, wanted, place, limits, check_canary)
    else:
        from pipeline.model import clip

        model = clip.load(name, folder, kind, options, wanted, place, limits, check_canary=check_canary)
    if compile:
        _compile(model, wanted)
    if check_canary:
        canary.check(model)
    model.reset_counts()
    return model


def _load_jina(
    name: str,
    folder: Path,
    options: ModelOptions,
    wanted: Sequence[str],
    device: torch.device,
    limits: ImageLimits,
    check_canary: bool,
) -> Model:
    parts = read_jina(folder, options)
    card = describe_jina(name, folder, options, parts, check_canary=check_canary)
    dtype, path = DTYPES[options.dtype], folder / WEIGHTS
    with weights.without_storage():
        text = TextTower(parts.text) if "text" in wanted else None
        image = ImageTower(parts.image) if "image" in wanted else None
    if text is not None:
        weights.fill_tower(text, path, weights.TEXT_PREFIX, dtype=dtype, device=device)
    if image is not None:
        weights.fill_tower(image, path, weights.IMAGE_PREFIX, dtype=dtype, device=device)
    return Model(
        card,
        text_tower=text,
        image_tower=image,
        tokenizer=parts.tokenizer,
        pad_token_id=parts.text.pad_token_id,
        recipe=parts.recipe,
        limits=limits,
        device=device,
    )


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device must be cpu or cuda, not {device!r}.") from error
    if place.type not in ("cpu", "cuda"):
        raise ModelError(f"device must be cpu or cuda, not {device!r}.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device is cuda, but this torch sees no GPU; install a CUDA build or use device cpu.")
    return place


def _compile(model: Model, wanted: Sequence[str]) -> None:
    """Swap in compiled towers after comparing them with the plain ones on the canary inputs."""
    plain = canary.embed(model)
    for kind in wanted:
        tower = model.text_tower if kind == "text" else model.image_tower
        model.replace_forward(kind, torch.compile(tower, dynamic=True))
    try:
        compiled = canary.embed(model)
    except Exception as error:  # the boundary to the compiler: anything from a missing C++ compiler to a bug of its own
        raise ModelError(f"torch.compile failed ({type(error).__name__}: {error}); load without compile.") from error
    canary.compare(plain, compiled, model.card.options.dtype, "The compiled tower differs from the plain one")
