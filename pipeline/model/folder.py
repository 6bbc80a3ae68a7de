"""A model by name: its folder, here, from a store or from the hub, read and checked without building a tower."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import MissingExtra, ModelError
from pipeline.model import weights
from pipeline.model.config import Section
from pipeline.model.identity import (
    CANARY,
    CONFIG,
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
from pipeline.model.image_tower import ImageConfig, ImageTower
from pipeline.model.preprocess import PixelRecipe, read_recipe
from pipeline.model.remote import fetch_folder
from pipeline.model.text_tower import TextConfig, TextTower
from pipeline.model.tokens import TextTokenizer
from pipeline.paths import is_uri

PUBLISHED_NAME = "jinaai/jina-clip-v1"
PUBLISHED_REVISION = "06150c7c382d7a4faedc7d5a0d8cdb59308968f4"
"""The revision that public benchmark results name."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class JinaParts:
    """What a jina-clip folder says, read and checked."""

    text: TextConfig
    image: ImageConfig
    recipe: PixelRecipe
    tokenizer: TextTokenizer


def resolve(name: str, revision: str | None = None) -> Path:
    """Find the folder of a model: `demo`, a local folder, an object-store prefix, or a hub id at a pinned revision.

    Raises:
        ModelError: no such folder or prefix, an unpinned hub id, or a store or hub that cannot be reached.
    """
    if is_uri(name):
        return fetch_folder(name)
    folder = Path(__file__).parent / "demo" if name == "demo" else Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name == "demo" or not _HUB_ID.fullmatch(name):
        raise ModelError(f"There is no model folder {folder}; give a folder that holds {', '.join(FILES)}.")
    if revision is None and name == PUBLISHED_NAME:
        revision = PUBLISHED_REVISION
    if revision is None:
        raise ModelError(f"{name} is no folder here; to fetch it from the hub, pin a revision (a commit hash).")
    return _fetch(name, revision)


def _fetch(name: str, revision: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise MissingExtra("The hub needs huggingface_hub; install it with: pip install 'twotower[search]'.") from error
    folder = Path()
    # The published revision holds no canary.json; asking for it would cost every actor a request.
    is_published = (name, revision) == (PUBLISHED_NAME, PUBLISHED_REVISION)
    for file in FILES if is_published else (*FILES, CANARY):
        try:
            folder = Path(hf_hub_download(name, file, revision=revision)).parent
        except Exception as error:  # the boundary to the hub: HTTP, offline mode, authentication, disk
            absent = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if file == CANARY and (absent or folder != Path()):
                continue
            reason = "the repository has no such file" if absent else f"{type(error).__name__}"
            raise ModelError(
                f"{file} of {name} at revision {revision[:12]} cannot be had from the hub ({reason}); copy the model's "
                f"files ({', '.join(FILES)}) into a folder and give that folder as the model."
            ) from error
    return folder


def kind_of(folder: Path) -> Kind:
    """Which architecture `config.json` names.

    jina-clip-v2 (XLM-RoBERTa with rotary positions, EVA02-L/14 at 512 px, matryoshka) shares v1's model_type; it would
    become a kind of its own here, told apart by its text tower's name, which v1's config reader refuses.

    Raises:
        ModelError: none that is supported.
    """
    model_type = read_json(folder / CONFIG).get("model_type")
    kinds: dict[object, Kind] = {"jina_clip": "jina-clip", "clip": "clip", "siglip": "siglip"}
    if model_type not in kinds:
        raise ModelError(f"{folder / CONFIG}: model_type {model_type!r} is none of {', '.join(map(str, kinds))}.")
    return kinds[model_type]


def read_jina(folder: Path, options: ModelOptions) -> JinaParts:
    """Read a jina-clip folder without its weights.

    Raises:
        ModelError: a missing file or an unsupported setting.
    """
    for file in FILES:
        if not (folder / file).is_file():
            raise ModelError(f"{folder / file} is missing; a model folder holds {', '.join(FILES)}.")
    top = Section("config", read_json(folder / CONFIG))
    top.only("add_projections", False)
    top.only("truncate_dim", None)
    top.only("matryoshka_dimensions", None)
    text = TextConfig.from_config(top.values.get("text_config"))
    image = ImageConfig.from_config(top.values.get("vision_config"))
    if not text.hidden_size == image.width == top.positive_int("projection_dim", text.hidden_size):
        raise ModelError(
            f"{folder / CONFIG}: the towers have {text.hidden_size} and {image.width} dimensions and projection_dim is "
            f"{top.values.get('projection_dim')}; all three must be equal."
        )
    recipe = read_recipe(
        folder / PIXELS,
        image.image_size,
        style=options.preprocessing,
        jpeg_draft=options.jpeg_draft,
    )
    tokenizer = TextTokenizer(
        folder / TOKENIZER,
        pad_token_id=text.pad_token_id,
        vocab_size=text.vocab_size,
        max_tokens=options.max_tokens,
    )
    return JinaParts(text, image, recipe, tokenizer)


def describe_jina(name: str, folder: Path, options: ModelOptions, parts: JinaParts, *, check_canary: bool) -> ModelCard:
    """Check the weights' header against the towers' own keys and shapes, and say who the model is.

    Raises:
        ModelError: the weights do not fit, or a file is not the one that `canary.json` records.
    """
    with weights.without_storage():
        expected = weights.shapes_of(TextTower(parts.text), weights.TEXT_PREFIX)
        expected |= weights.shapes_of(ImageTower(parts.image), weights.IMAGE_PREFIX)
    expected["logit_scale"] = ()
    path = folder / WEIGHTS
    header = weights.read_header(path)
    weights.check_tensors(path, {key: at for key, at in header.items() if not weights.is_rope_table(key)}, expected)
    weights.check_rope_tables(path, header, parts.image)
    settings = {**parts.recipe.settings(), "max_tokens": options.max_tokens}
    dim = parts.text.hidden_size
    return make_card(name, folder, "jina-clip", dim, options, settings, header, check_canary=check_canary)
