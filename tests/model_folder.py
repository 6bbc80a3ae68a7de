"""Small model folders in the published layout, for tests: seeded weights, a tokenizer of letters, no network."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pipeline.model.image_tower import ImageConfig, ImageTower
from pipeline.model.text_tower import TextConfig, TextTower

TINY_TEXT = TextConfig(vocab_size=160, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=64)
TINY_IMAGE = ImageConfig(width=48, layers=2, head_width=8, image_size=32, patch_size=8, rope_grid=4)
WORDS = ("red", "blue", "dress", "shirt", "wool", "a", "of", "hello", "world", "apple", "coat", "##s", "##ed")


def fill(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values from a key's name: norms near one, biases near zero, matrices by their fan-in."""
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape or (1,)).astype(np.float32).reshape(shape)
    if key.endswith("weight") and len(shape) == 1:
        z = 1 + 0.1 * z
    elif len(shape) == 1:
        z = 0.1 * z
    elif "embed" in key or "token" in key:
        z = 0.5 * z
    elif shape:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(z, np.float32))


def tensors(text: TextConfig = TINY_TEXT, image: ImageConfig = TINY_IMAGE) -> dict[str, torch.Tensor]:
    """The whole weights file."""
    with torch.device("meta"):
        shapes = {"text_model.transformer." + k: tuple(v.shape) for k, v in TextTower(text).state_dict().items()}
        shapes |= {"vision_model." + k: tuple(v.shape) for k, v in ImageTower(image).state_dict().items()}
    return {key: fill(key, shape) for key, shape in shapes.items()} | {"logit_scale": torch.tensor(2.6592)}


def tokenizer(pad: str = "[PAD]", words: tuple[str, ...] = WORDS) -> Tokenizer:
    """A WordPiece tokenizer that knows ASCII letter by letter and a few words; pad is id 0."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [pad, "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"), *words]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return made


def config(text: TextConfig = TINY_TEXT, image: ImageConfig = TINY_IMAGE) -> dict[str, object]:
    """A `config.json` in the published layout."""
    return {
        "model_type": "jina_clip",
        "add_projections": False,
        "projection_dim": image.width,
        "logit_scale_init_value": 2.6592,
        "text_config": text.to_config(),
        "vision_config": image.to_config(),
    }


def write_folder(
    folder: Path,
    *,
    text: TextConfig = TINY_TEXT,
    image: ImageConfig = TINY_IMAGE,
    weights: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a whole folder, without a canary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(text, image), indent=1))
    pixels = {"size": image.image_size, "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file(weights or tensors(text, image), folder / "model.safetensors")
    return folder
