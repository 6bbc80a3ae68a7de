"""Train the embedded demo model on drawn products: `python -m jobs.train_demo --out FOLDER`; then `jobs.measure_demo`.

The recipe: contrastive learning of both towers from pairs of a drawn photo and a wording, with a second term between
two wordings of a product. What a text leaves out is not held against it: a photo that shows all that the text states,
or a text that agrees with it, is no negative. Some combinations of colour, category and pattern are never trained on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from jobs.cli import add_log_level, run_job, start_log
from pipeline.catalog.demo_garments import draw_photo
from pipeline.catalog.demo_products import TRAIN_SEED, DemoProduct, is_held_out, product
from pipeline.catalog.demo_words import FACTS, Wording, training_wordings
from pipeline.model.image_tower import ImageConfig, ImageTower
from pipeline.model.preprocess import PUBLISHED_MEAN, PUBLISHED_STD
from pipeline.model.text_tower import TextConfig, TextTower

log = logging.getLogger(__name__)

DIM = 128
VOCABULARY = 900
SIZE_PX = 64
DRAWN_PX = 128


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. Steps are fixed, not minutes, so that a run can be repeated."""

    seed: int = 7
    products: int = 12_000
    photos: int = 2
    steps: int = 600
    batch: int = 192
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 40
    text_text: float = 0.5
    clip_norm: float = 1.0
    first_scale: float = 14.0


@dataclass(frozen=True)
class Photos:
    """Drawn training photos: uint8 (N, 64, 64, 3), and the index into `products` of each."""

    pixels: np.ndarray
    product: np.ndarray
    products: Sequence[DemoProduct]


class Pair(torch.nn.Module):
    """Both towers and the learnt scale, under the published names."""

    def __init__(self, text: TextConfig, image: ImageConfig, scale: float) -> None:
        super().__init__()
        self.text_tower = TextTower(text, "plain")
        self.image_tower = ImageTower(image, "plain")
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(scale)))

    def tensors(self) -> dict[str, Tensor]:
        """The weights as `model.safetensors` names them."""
        text = {f"text_model.transformer.{name}": t for name, t in self.text_tower.state_dict().items()}
        image = {f"vision_model.{name}": t for name, t in self.image_tower.state_dict().items()}
        return {**text, **image, "logit_scale": self.logit_scale.detach()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the model folder goes")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps")
    parser.add_argument("--threads", type=int, default=2, help="cores to use")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on standard output")
    add_log_level(parser)
    arguments = parser.parse_args(argv)
    start_log(arguments.log_level)
    torch.set_num_threads(arguments.threads)
    recipe = Recipe(steps=arguments.steps)
    return run_job(lambda: train(recipe, arguments.out, workers=arguments.threads), as_json=arguments.json)


def train(recipe: Recipe, folder: Path, *, workers: int) -> dict[str, Any]:
    """Draw, train, and write the folder in the published layout; returns times and the last loss."""
    start = time.monotonic()
    photos = draw(recipe, workers=workers)
    drawn = time.monotonic()
    log.info("drew %d photos of %d products in %.0f s", len(photos.pixels), len(photos.products), drawn - start)
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(photos.products, recipe.seed)
    text = TextConfig(tokenizer.get_vocab_size(), DIM, 3, 4, 256)
    image = ImageConfig(DIM, 4, 32, SIZE_PX, 16, 2.6875, SIZE_PX // 16)
    pair = Pair(text, image, recipe.first_scale)
    initialise(pair)
    loss = optimise(recipe, pair, photos, tokenizer)
    write_folder(folder, pair, text, image, tokenizer)
    result = {"loss": loss, "draw_seconds": drawn - start, "train_seconds": time.monotonic() - drawn, **vars(recipe)}
    log.info("%s", result)
    return result


def draw(recipe: Recipe, *, workers: int) -> Photos:
    """Draw the training photos; held-out combinations are left out."""
    indices = [i for i in range(recipe.products * 2) if not is_held_out(product(TRAIN_SEED, i))][: recipe.products]
    chunks = [indices[i : i + 200] for i in range(0, len(indices), 200)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        drawn = list(chain.from_iterable(pool.map(_draw_chunk, chunks, [recipe.photos] * len(chunks))))
    pixels = np.stack([p for photos in drawn for p in photos])
    owner = np.repeat(np.arange(len(drawn)), [len(photos) for photos in drawn])
    return Photos(pixels, owner, [product(TRAIN_SEED, i) for i in indices])


def shrink(image: Image.Image) -> np.ndarray:
    """uint8 (64, 64, 3), by the filter that the preprocessing uses."""
    return np.asarray(image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC), dtype=np.uint8)


def _draw_chunk(indices: Sequence[int], photos: int) -> list[list[np.ndarray]]:
    found = [product(TRAIN_SEED, i) for i in indices]
    return [
        [shrink(draw_photo(item, TRAIN_SEED, n, DRAWN_PX)) for n in range(min(photos, item.n_images))] for item in found
    ]


def train_tokenizer(products: Sequence[DemoProduct], seed: int) -> Tokenizer:
    """A lower-casing WordPiece of the wordings; every letter is a token, so that no word is wholly unknown."""
    rng = random.Random(seed)
    texts = [wording.text for item in products[:6000] for wording in training_wordings(item, rng)]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=list(letters), show_progress=False
    )
    spelled = [" ".join([letter, letter * 2]) for letter in letters] * 50  # each letter at a word's start and within
    tokenizer.train_from_iterator(chain(texts, spelled), trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def initialise(pair: Pair) -> None:
    """Normal weights of deviation 0.02 (ViT's and BERT's), projections by fan-in, biases zero, norms one."""
    for name, parameter in pair.named_parameters():
        if parameter.dim() < 2:
            continue
        if "embeddings" in name or "embed" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(math.prod(parameter.shape[1:])))


def optimise(recipe: Recipe, pair: Pair, photos: Photos, tokenizer: Tokenizer) -> float:
    """AdamW with warm-up and cosine decay; returns the mean loss of the last fifty steps."""
    decayed = [p for p in pair.parameters() if p.dim() >= 2]
    others = [p for p in pair.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))
    losses: list[float] = []
    start = time.monotonic()
    for step, (pixels, wordings, items) in enumerate(batches(recipe, photos)):
        share = min(1.0, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * share
        loss = contrast(recipe, pair, pixels, wordings, items, tokenizer)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(pair.parameters(), recipe.clip_norm)
        optimiser.step()
        with torch.no_grad():
            pair.logit_scale.clamp_(max=math.log(100.0))
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            rate = (time.monotonic() - start) / (step + 1)
            log.info("step %d loss %.3f scale %.1f %.2f s/step", step, losses[-1], pair.logit_scale.exp().item(), rate)
    return float(np.mean(losses[-50:]))


def batches(
    recipe: Recipe, photos: Photos
) -> Iterator[tuple[Tensor, list[tuple[Wording, Wording]], list[DemoProduct]]]:
    """`steps` batches of photos, with fresh wordings each time; a product is in a batch once."""
    rng = np.random.default_rng(recipe.seed)
    words = random.Random(recipe.seed)
    of_product = np.split(np.arange(len(photos.product)), np.flatnonzero(np.diff(photos.product)) + 1)
    order = np.empty(0, dtype=np.int64)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = rng.permutation(len(photos.products))
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        items = [photos.products[i] for i in chosen]
        pixels = np.stack([photos.pixels[rng.choice(of_product[i])] for i in chosen])
        yield augment(pixels, rng), [training_wordings(item, words) for item in items], items


def augment(pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
    """uint8 (B, 64, 64, 3) to normalised (B, 3, 64, 64): mirrored, shifted by up to 3 pixels, brighter or darker."""
    shifted = np.empty_like(pixels)
    padded = np.pad(pixels, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    for i, (y, x) in enumerate(rng.integers(0, 7, (len(pixels), 2))):
        shifted[i] = padded[i, y : y + SIZE_PX, x : x + SIZE_PX]
        if rng.random() < 0.5:
            shifted[i] = shifted[i, :, ::-1]
    values = torch.from_numpy(shifted).permute(0, 3, 1, 2).float() / 255
    values = values * torch.from_numpy(rng.uniform(0.92, 1.08, (len(pixels), 1, 1, 1))).float()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PUBLISHED_MEAN, PUBLISHED_STD))
    return (values.clamp(0, 1) - mean) / std


def contrast(
    recipe: Recipe,
    pair: Pair,
    pixels: Tensor,
    wordings: Sequence[tuple[Wording, Wording]],
    items: Sequence[DemoProduct],
    tokenizer: Tokenizer,
) -> Tensor:
    """loss(image, first wording) + text_text * loss(first, second wording), false negatives masked.

    The second term takes half of the batch: it needs fewer negatives, and texts are the dearer half of a step.
    """
    half = len(items) // 2
    wanted = [first.text for first, _ in wordings] + [second.text for _, second in wordings[:half]]
    texts = F.normalize(embed_texts(pair.text_tower, wanted, tokenizer), dim=1)
    images = F.normalize(pair.image_tower(pixels), dim=1)
    first, second = texts[: len(items)], texts[len(items) :]
    scale = pair.logit_scale.exp()
    agrees = agreement([first for first, _ in wordings], items)
    agrees_second = agreement([second for _, second in wordings[:half]], items[:half])
    loss = _symmetric(scale * first @ images.T, agrees)
    both = agrees[:half, :half] | agrees_second.T
    return loss + recipe.text_text * _symmetric(scale * first[:half] @ second.T, both)


def embed_texts(tower: TextTower, texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """(B, D) in input order; shorter and longer texts apart, so that little is spent on padding."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    for start in range(0, len(order), 128):
        chunk = [torch.tensor(ids[i]) for i in order[start : start + 128]]
        parts.append(tower(torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True)))
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return torch.cat(parts)[back]


def agreement(wordings: Sequence[Wording], items: Sequence[DemoProduct]) -> Tensor:
    """Bool (texts, products): whether the product has every fact that the text states."""
    values = np.array([[hash(getattr(item, fact)) for fact in FACTS] for item in items])
    states = np.array([[fact in wording.states for fact in FACTS] for wording in wordings])
    same = values[:, None, :] == values[None, :, :]  # a text states facts of its own product
    return torch.from_numpy((same | ~states[:, None, :]).all(axis=2))


def _symmetric(logits: Tensor, agrees: Tensor) -> Tensor:
    """Cross entropy both ways; off the diagonal, pairs that agree are left out."""
    target = torch.arange(len(logits))
    masked = logits.masked_fill(agrees & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
    return 0.5 * (F.cross_entropy(masked, target) + F.cross_entropy(masked.T, target))


def write_folder(folder: Path, pair: Pair, text: TextConfig, image: ImageConfig, tokenizer: Tokenizer) -> None:
    """Write config, weights, tokenizer and preprocessing in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "jina_clip", "architectures": ["JinaCLIPModel"], "add_projections": False,
        "projection_dim": text.hidden_size, "logit_scale_init_value": 2.6592, "torch_dtype": "float32",
        "text_config": text.to_config(), "vision_config": image.to_config(),
    }  # fmt: skip
    pixels = {
        "size": image.image_size, "resize_mode": "shortest", "interpolation": "bicubic", "fill_color": 0,
        "mean": list(PUBLISHED_MEAN), "std": list(PUBLISHED_STD),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(
        {name: t.contiguous() for name, t in pair.tensors().items()}, folder / "model.safetensors", {"format": "pt"}
    )


if __name__ == "__main__":
    raise SystemExit(main())
