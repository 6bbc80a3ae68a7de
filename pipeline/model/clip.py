"""CLIP and SigLIP folders behind the same `load_model`, through transformers' own classes.

For people who compare or migrate. The weights file is safetensors, no code of the folder is ever run, and a missing,
unexpected or misshapen tensor is an error. Images take the same safe road as everywhere, with these models' own
resize; texts are cut at the tower's positions (77 for CLIP, 64 for SigLIP), which is counted as truncation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import MissingExtra, ModelError
from pipeline.model import weights
from pipeline.model.identity import (
    CONFIG,
    DTYPES,
    FILES,
    PIXELS,
    TOKENIZER,
    WEIGHTS,
    Kind,
    ModelCard,
    ModelOptions,
    make_card,
    read_json,
)
from pipeline.model.model import Model
from pipeline.model.preprocess import PixelRecipe, three_numbers
from pipeline.model.tokens import TokenBatch, readable
from pipeline.records import ImageLimits

TOKENIZER_CONFIG = "tokenizer_config.json"


class ClipTokenizer:
    """The folder's tokenizer as transformers reads it; cutting is done here, so one object serves all threads.

    Args:
        folder: the model folder.
        ceiling: positions of the text tower.
        vocab_size: rows of the word embedding.
        max_tokens: longer texts are cut, keeping the end token.

    Raises:
        ModelError: unreadable, or made for another model.
    """

    def __init__(self, folder: Path, *, ceiling: int, vocab_size: int, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the boundary to transformers: a broken folder raises whatever its parser raises
            raise ModelError(f"{folder / TOKENIZER} cannot be read as a tokenizer ({error}).") from error
        self.limit, self.ceiling = min(max_tokens, ceiling), ceiling
        largest = max(self._tokenizer.get_vocab().values(), default=-1)
        if not 0 <= largest < vocab_size:
            raise ModelError(
                f"{folder / TOKENIZER} is another model's tokenizer: its largest id is {largest}, but config.json's "
                f"vocab_size is {vocab_size}. Use the tokenizer.json that came with the weights."
            )
        self.pad_token_id = int(self._tokenizer.pad_token_id or 0)

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> TokenBatch:
        """Turn texts into ids.

        Raises:
            InputRejected: `text_empty` for an empty or blank text.
        """
        texts = readable(texts)
        limit = min(max_tokens or self.limit, self.ceiling)
        ids = self._tokenizer(texts, verbose=False)["input_ids"] if texts else []
        cut = tuple(list(one) if len(one) <= limit else [*one[: limit - 1], one[-1]] for one in ids)
        return TokenBatch(cut, tuple(len(one) > limit for one in ids))


class ClipText(nn.Module):
    """(B, T) ids to (B, D) float32; SigLIP was trained on texts padded to its full length, and reads the last place."""

    def __init__(self, model: nn.Module, *, pad_to: int | None, pad_token_id: int) -> None:
        super().__init__()
        self.model, self.pad_to, self.pad_token_id = model, pad_to, pad_token_id

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embed a batch; the mask is not needed, because attention is causal (CLIP) or over all places (SigLIP)."""
        del attention_mask
        if self.pad_to is not None:
            input_ids = F.pad(input_ids, (0, self.pad_to - input_ids.shape[1]), value=self.pad_token_id)
        return _vectors(self.model.get_text_features(input_ids=input_ids))  # type: ignore[operator]


class ClipImage(nn.Module):
    """(B, 3, H, W) pixels to (B, D) float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed a batch."""
        return _vectors(self.model.get_image_features(pixel_values=pixel_values))  # type: ignore[operator]


def _vectors(output: Any) -> Tensor:
    # transformers 4 returns the projected vectors, transformers 5 an object that holds them.
    vectors: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return vectors.float()


def describe(name: str, folder: Path, kind: Kind, options: ModelOptions, *, check_canary: bool = True) -> ModelCard:
    """Check a folder's config, preprocessing, tokenizer and weights header, and say who the model is.

    Raises:
        ModelError: what is wrong, in which file.
        MissingExtra: transformers is not installed.
    """
    for file in (*FILES, TOKENIZER_CONFIG):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder / file} is missing; a {kind} folder holds {', '.join(FILES)}, {TOKENIZER_CONFIG}."
            )
    config = _config(folder)
    recipe = _recipe(folder, kind, config.vision_config.image_size, options)
    header = weights.read_header(folder / WEIGHTS)
    with weights.without_storage():
        expected = weights.shapes_of(_class(kind)(config), "")
    # Older savings hold the position indices, 0 to n, which transformers makes by itself.
    found = {key: info for key, info in header.items() if not key.endswith("embeddings.position_ids")}
    weights.check_tensors(folder / WEIGHTS, found, expected)
    _tokenizer(folder, config, options)
    tokenizer_config = weights.file_digest(folder / TOKENIZER_CONFIG)
    settings = {**recipe.settings(), "max_tokens": options.max_tokens, "tokenizer_config": tokenizer_config}
    dim = config.projection_dim if kind == "clip" else config.vision_config.hidden_size
    return make_card(name, folder, kind, dim, options, settings, header, check_canary=check_canary)


def load(
    name: str,
    folder: Path,
    kind: Kind,
    options: ModelOptions,
    wanted: Sequence[str],
    device: torch.device,
    limits: ImageLimits,
    *,
    check_canary: bool,
) -> Model:
    """Load a folder after `describe` found nothing wrong with it.

    Args:
        name: as the model was asked for.
        folder: where it lies.
        kind: `clip` or `siglip`.
        options: as they were asked for.
        wanted: towers to keep.
        device: where they run.
        limits: which images are refused undecoded.
        check_canary: compare the files with `canary.json`.

    Raises:
        ModelError: transformers reports a key as missing, unexpected or mismatched, or cannot load at all.
    """
    card = describe(name, folder, kind, options, check_canary=check_canary)
    config = _config(folder)
    try:
        model, info = _class(kind).from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[options.dtype],
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # the boundary to transformers: a broken folder raises whatever its parser raises
        raise ModelError(f"{folder} cannot be loaded by transformers ({type(error).__name__}: {error}).") from error
    faults = {key: sorted(map(str, info.get(f"{key}_keys", ()))) for key in ("missing", "unexpected", "mismatched")}
    if any(faults.values()):
        lists = "; ".join(f"{fault}: {', '.join(keys[:5])}" for fault, keys in faults.items() if keys)
        raise ModelError(f"{folder / WEIGHTS} does not hold the weights that config.json describes: {lists}.")
    model = model.eval().requires_grad_(False)
    for tower in {"text", "image"} - set(wanted):
        setattr(model, "vision_model" if tower == "image" else "text_model", None)
    model = model.to(device)
    tokenizer = _tokenizer(folder, config, options)
    pad_to = tokenizer.ceiling if kind == "siglip" else None
    return Model(
        card,
        text_tower=ClipText(model, pad_to=pad_to, pad_token_id=tokenizer.pad_token_id) if "text" in wanted else None,
        image_tower=ClipImage(model) if "image" in wanted else None,
        tokenizer=tokenizer,
        pad_token_id=tokenizer.pad_token_id,
        recipe=_recipe(folder, kind, config.vision_config.image_size, options),
        limits=limits,
        device=device,
    )


def _class(kind: Kind) -> Any:
    import transformers

    return transformers.CLIPModel if kind == "clip" else transformers.SiglipModel


def _config(folder: Path) -> Any:
    read_json(folder / CONFIG)
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise MissingExtra("CLIP and SigLIP need transformers; install it: pip install 'twotower[embed]'.") from error
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the boundary to transformers
        raise ModelError(f"{folder / CONFIG} cannot be read by transformers ({error}).") from error


def _tokenizer(folder: Path, config: Any, options: ModelOptions) -> ClipTokenizer:
    text = config.text_config
    return ClipTokenizer(
        folder,
        ceiling=text.max_position_embeddings,
        vocab_size=text.vocab_size,
        max_tokens=options.max_tokens,
    )


def _recipe(folder: Path, kind: Kind, image_size: int, options: ModelOptions) -> PixelRecipe:
    """Read transformers' `preprocessor_config.json` of these two families."""
    values = read_json(folder / PIXELS)
    size, crop = values.get("size"), values.get("crop_size", image_size)
    sides = size if isinstance(size, dict) else {"shortest_edge" if kind == "clip" else "height": size, "width": size}
    if set(sides) - {"width"} == {"shortest_edge"}:
        fit, side = "crop", sides["shortest_edge"]
        crop_sides = set(crop.values()) if isinstance(crop, dict) else {crop}
        is_right = crop_sides == {side} and values.get("do_center_crop", True)
    else:
        fit, side = "squash", sides.get("height")
        is_right = sides.get("width") == side and not values.get("do_center_crop", False)
    resample = values.get("resample", 3)
    if not is_right or side != image_size or resample not in (2, 3) or values.get("rescale_factor", 1 / 255) != 1 / 255:
        raise ModelError(f"{folder / PIXELS} asks for a resize that is not supported: {json.dumps(values)[:200]}.")
    recipe = PixelRecipe(
        size=image_size,
        fit=fit,
        centre="floor",
        resample=resample,
        style=options.preprocessing,
        jpeg_draft=options.jpeg_draft,
    )
    mean = three_numbers(folder / PIXELS, values, "image_mean", recipe.mean)
    std = three_numbers(folder / PIXELS, values, "image_std", recipe.std)
    return replace(recipe, mean=mean, std=std)
