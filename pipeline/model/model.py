"""A loaded model: texts and images in, unit vectors out.

The path is one for all devices: uint8 crops go to the device and are normalised there. Nothing here is for GPUs alone,
since no GPU has run it yet; pinned memory and overlapped copies come with the first measurement on one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import ImageRejected, InputRejected, ModelError
from pipeline.model.identity import DTYPES, ModelCard
from pipeline.model.lanes import Lanes
from pipeline.model.preprocess import PixelRecipe, PreparedImage
from pipeline.model.text_tower import TextTower
from pipeline.model.tokens import TokenBatch, pack
from pipeline.records import ImageLimits, Reason

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
T = TypeVar("T")
ImageSource = bytes | Image.Image | os.PathLike[str]

TOKEN_BUDGET = {"cpu": 2_048, "cuda": 65_536}
"""Tokens in one batch of texts, padding included."""

IMAGE_BATCH = {"cpu": 4, "cuda": 256}
"""Images of 224 pixels in one batch; as many more of smaller ones as have the same pixels."""

_BATCH_SIDE_PX = 224
_LEAST_SHARE = 4  # of a batch: what is less is not shared out further, since every batch has a price of its own


class Tokenizer(Protocol):
    """What a model needs of a tokenizer."""

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> TokenBatch:
        """Texts to ids; raises InputRejected for a blank one."""


@dataclass(frozen=True, slots=True)
class TextCounts:
    """What went through the text tower since loading; `n_tokens` holds no padding."""

    n_texts: int = 0
    n_truncated: int = 0
    n_tokens: int = 0
    n_padding: int = 0


class Model:
    """Two towers behind four methods, all of them safe on threads.

    Made by `load_model`. On a CPU, several batches run beside each other, each on one core (`pipeline.model.lanes`).

    Attributes:
        card: who the model is.
        name: as it was asked for.
        dim: D, the length of a vector.
        model_id: identity of weights, config, tokenizer and preprocessing.
        fingerprint: identity of the vectors: `model_id`, compute dtype and numerics.
        n_batches: how many went through a tower; it tells a slow model from one that hangs.
    """

    def __init__(
        self,
        card: ModelCard,
        *,
        text_tower: nn.Module | None,
        image_tower: nn.Module | None,
        tokenizer: Tokenizer,
        pad_token_id: int,
        recipe: PixelRecipe,
        limits: ImageLimits,
        device: torch.device,
    ) -> None:
        self.card, self.name, self.dim = card, card.name, card.dim
        self.model_id, self.fingerprint = card.model_id, card.fingerprint
        self.device, self.dtype = device, DTYPES[card.options.dtype]
        self._towers = {"text": text_tower, "image": image_tower}
        self._forward: dict[str, Callable[[Tensor], Tensor]] = {k: t for k, t in self._towers.items() if t is not None}
        self._tokenizer, self._pad_token_id = tokenizer, pad_token_id
        self.recipe, self._limits = recipe, limits
        self._mean = torch.tensor(recipe.mean, device=device)[:, None, None]  # (3, 1, 1)
        self._std = torch.tensor(recipe.std, device=device)[:, None, None]
        self._counts, self._lock = TextCounts(), threading.Lock()
        self._lanes: Lanes | None = None
        self._all_in_lanes = False
        self.n_batches = 0

    @property
    def text_tower(self) -> nn.Module:
        """(B, T) int64 ids to (B, D) float32, before normalisation."""
        return self._tower("text")

    @property
    def image_tower(self) -> nn.Module:
        """(B, 3, H, W) pixels to (B, D) float32, before normalisation."""
        return self._tower("image")

    @property
    def text_counts(self) -> TextCounts:
        """Running counts since loading."""
        return self._counts

    def run_in_lanes(self, around: AbstractContextManager[None] | None = None) -> Lanes | None:
        """Run all batches in lanes from now on, single ones too, as suits whoever embeds many inputs at a time.

        Args:
            around: a context that each batch runs in; safe for threads.

        Returns:
            The lanes, as many as torch has threads, or None where batches do not run beside each other: on other
            devices than a CPU, and compiled.
        """
        if not all(map(self._is_plain, self._forward)):
            return None
        self._lanes, self._all_in_lanes = Lanes(around), True
        return self._lanes

    def has_tower(self, kind: str) -> bool:
        """Whether the `text` or `image` tower was loaded."""
        return self._towers[kind] is not None

    def embed_texts(self, texts: Sequence[str]) -> FloatArray:
        """Embed texts.

        Returns:
            float32 (B, D), unit L2 norm, rows in input order.

        Raises:
            InputRejected: `text_empty` for an empty or blank text; `vector_not_finite` where arithmetic overflowed.
        """
        return _finite(self.embed_tokens(self.tokenize(texts)), "text", InputRejected)

    def embed_images(self, images: Sequence[ImageSource]) -> FloatArray:
        """Embed encoded images, Pillow images or paths of image files.

        Returns:
            float32 (B, D), unit L2 norm, rows in input order.

        Raises:
            ImageRejected: an image that cannot or should not be embedded, with its place in the list.
        """
        crops = np.empty((len(images), self.recipe.size, self.recipe.size, 3), np.uint8)
        for index, image in enumerate(images):
            try:
                crops[index] = self.prepare_image(_read(image)).crop
            except ImageRejected as error:
                raise ImageRejected(error.reason, f"image {index}: {error.detail}") from error
        return _finite(self.embed_crops(crops), "image", ImageRejected)

    def tokenize(self, texts: Sequence[str], *, max_tokens: int | None = None) -> TokenBatch:
        """Texts to token ids, cut at `max_tokens`, by default the model's.

        Raises:
            InputRejected: `text_empty` for an empty or blank text.
        """
        return self._tokenizer.tokenize(texts, max_tokens=max_tokens)

    def prepare_image(self, data: bytes | Image.Image, *, thumbnail: bool = False) -> PreparedImage:
        """Decode, resize and crop one image.

        Raises:
            ImageRejected: with the reason.
        """
        return self.recipe.prepare(data, limits=self._limits, thumbnail=thumbnail)

    def embed_tokens(self, batch: TokenBatch) -> FloatArray:
        """Embed token ids, sorted by length and packed by a token budget.

        On a CPU nothing is padded. Compiled towers, and GPUs, get padded batches: few shapes, little padding.

        Returns:
            float32 (B, D), unit L2 norm, rows in input order. A row whose numbers overflowed is NaN.
        """
        self._tower("text")
        forward = self._forward["text"]
        grouped = forward.embed_groups if isinstance(forward, TextTower) and self.device.type == "cpu" else None
        lengths = [len(ids) for ids in batch.ids]
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        embed = grouped or (lambda groups: forward(groups[0]))
        budget = TOKEN_BUDGET[self.device.type]
        if grouped:
            budget = -(-sum(lengths) // self._shares("text", sum(lengths), budget))
        batches = []
        for start, end in pack([lengths[index] for index in order], budget, is_padded=grouped is None):
            rows = [batch.ids[index] for index in order[start:end]]
            batches.append(_by_length(rows) if grouped else [self._padded(rows)])
        vectors = self._gather(self._each("text", lambda groups: self._run(embed, groups), batches))
        self._count(batch, sum(ids.numel() for groups in batches for ids in groups))
        in_order = np.empty_like(vectors)
        in_order[order] = vectors
        return in_order

    def embed_crops(self, crops: np.ndarray[Any, np.dtype[np.uint8]], *, batch: int | None = None) -> FloatArray:
        """Embed prepared images; they travel to the device as bytes and are normalised there, in float32.

        Args:
            crops: uint8 (B, size, size, 3).
            batch: how many images at once; None: what suits the device.

        Returns:
            float32 (B, D), unit L2 norm, rows in input order. A row whose numbers overflowed is NaN.
        """
        self._tower("image")
        forward = self._forward["image"]
        if batch is None:
            batch = max(1, IMAGE_BATCH[self.device.type] * _BATCH_SIDE_PX**2 // self.recipe.size**2)
            batch = -(-len(crops) // self._shares("image", len(crops), batch)) or 1
        parts = [crops[at : at + batch] for at in range(0, len(crops), batch)]
        return self._gather(self._each("image", lambda part: self._run(forward, self.pixels(part)), parts))

    def pixels(self, crops: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Normalise uint8 (B, H, W, 3) to (B, 3, H, W) in the model's dtype, on its device."""
        if crops.dtype != np.uint8 or crops.shape[1:] != (self.recipe.size, self.recipe.size, 3):
            size = self.recipe.size
            raise ValueError(f"crops must be uint8 (B, {size}, {size}, 3), not {crops.dtype} {crops.shape}")
        # A copy, because torch refuses to share memory that is read-only, as Arrow's is.
        raw = self._to_device(np.array(crops, order="C")).permute(0, 3, 1, 2)  # (B, 3, H, W)
        return ((raw.float() / 255 - self._mean) / self._std).to(self.dtype)

    def reset_counts(self) -> None:
        """Begin counting anew."""
        with self._lock:
            self._counts = TextCounts()

    def replace_forward(self, kind: str, forward: Callable[[Tensor], Tensor]) -> None:
        """Run another callable in a tower's place, such as its compiled form."""
        self._forward[kind] = forward

    def _tower(self, kind: str) -> nn.Module:
        tower = self._towers[kind]
        if tower is None:
            raise ModelError(f"{self.name} was loaded without its {kind} tower; name it in load_model's towers.")
        return tower

    def _is_plain(self, kind: str) -> bool:
        """Whether batches of a tower may run beside each other. A compiled one has its number of threads built in."""
        return self.device.type == "cpu" and self._forward[kind] is self._towers[kind]

    def _shares(self, kind: str, total: int, most: int) -> int:
        """In how many batches of at most `most` a total goes: a multiple of the lanes, unless they become too small."""
        fewest, lanes = -(-total // most), torch.get_num_threads() if self._is_plain(kind) else 1
        return max(1, min(-(-fewest // lanes) * lanes, max(fewest, total * _LEAST_SHARE // most)))

    def _each(self, kind: str, run: Callable[[T], Tensor], batches: Sequence[T]) -> list[Tensor]:
        is_shared = self._is_plain(kind) and len(batches) > 1 and torch.get_num_threads() > 1
        if not is_shared and not self._all_in_lanes:
            return [run(batch) for batch in batches]
        with self._lock:
            self._lanes = lanes = self._lanes or Lanes()
        return lanes.map(run, batches)

    def _run(self, forward: Callable[[T], Tensor], inputs: T) -> Tensor:
        with torch.inference_mode():
            vectors = forward(inputs).float()  # (B, D)
            with self._lock:
                self.n_batches += 1
            # A zero or overflowing vector becomes NaN, never a plausible row.
            return torch.div(vectors, vectors.norm(dim=1, keepdim=True))

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Token ids, the longest row last, as int64 (B, T) on the device."""
        padded = np.full((len(rows), len(rows[-1])), self._pad_token_id, np.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = ids
        return self._to_device(padded)

    def _to_device(self, array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _gather(self, parts: list[Tensor]) -> FloatArray:
        if not parts:
            return np.empty((0, self.dim), np.float32)
        return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.float32)

    def _count(self, batch: TokenBatch, n_cells: int) -> None:
        n_tokens = sum(map(len, batch.ids))
        with self._lock:
            old = self._counts
            self._counts = TextCounts(
                old.n_texts + len(batch),
                old.n_truncated + sum(batch.truncated),
                old.n_tokens + n_tokens,
                old.n_padding + n_cells - n_tokens,
            )


def _by_length(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Token ids sorted by length, as int64 (B, T) for each length."""
    return [torch.tensor(list(group)) for _, group in groupby(rows, key=len)]


def _read(image: ImageSource) -> bytes | Image.Image:
    if not isinstance(image, os.PathLike):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ImageRejected(Reason.IMAGE_NOT_FOUND, f"{os.fspath(image)} cannot be read ({error.strerror})") from error


def _finite(vectors: FloatArray, kind: str, rejected: type[InputRejected]) -> FloatArray:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise rejected(Reason.VECTOR_NOT_FINITE, f"{kind} {bad[0]} gave a vector that is not finite")
    return vectors
