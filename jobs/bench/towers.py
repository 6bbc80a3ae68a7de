"""The towers alone: by batch and dtype as a share of the machine's matrix rate, and beside a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.limits import matrix_product
from jobs.bench.timing import Row, in_turns

if TYPE_CHECKING:
    from pipeline.model.image_tower import ImageConfig
    from pipeline.model.model import Model
    from pipeline.model.text_tower import TextConfig

PLAIN_BATCH = 32
_BATCHES = {"cpu": (1, 4, 8), "cuda": (32, 128, 256, 512)}


def image_flops(config: ImageConfig) -> float:
    """Of one image: two per multiply-add in every matrix product, norms and softmax left out."""
    tokens, width, hidden = config.grid**2 + 1, config.width, config.hidden_size
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * hidden
    patches = config.grid**2 * 3 * config.patch_size**2 * width
    return 2.0 * (config.layers * layer + patches)


def text_flops(config: TextConfig, tokens: int) -> float:
    """Of one text of so many tokens, counted alike."""
    width, hidden = config.hidden_size, config.intermediate_size
    layer = 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * hidden
    return 2.0 * config.num_hidden_layers * layer


def towers(models: Mapping[str, Model], texts: Sequence[str]) -> Iterator[Row]:
    """Both towers of each dtype, in turns with a matrix product of that dtype, as a share of its rate.

    Args:
        models: by dtype.
        texts: of mixed lengths.
    """
    for dtype, model in models.items():
        if not hasattr(model.image_tower, "config"):
            return  # CLIP and SigLIP: their FLOPs are not counted here
        yield from _image(model, dtype)
        yield from _text(model, texts, dtype)


def _image(model: Model, dtype: str) -> Iterator[Row]:
    import torch

    size, batches = model.recipe.size, _BATCHES[model.device.type]
    count = max(batches) * (torch.get_num_threads() if model.device.type == "cpu" else 1)  # one for each lane
    crops = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    flops = image_flops(config_of(model.image_tower)) / 1e9

    calls = {
        f"image tower, {dtype}, batch {batch}": partial(model.embed_crops, crops, batch=batch) for batch in batches
    }
    yield from _shares(model, dtype, calls, count, "images/s", flops)


def _text(model: Model, texts: Sequence[str], dtype: str) -> Iterator[Row]:
    tokens = model.tokenize(texts)
    config = config_of(model.text_tower)
    flops = sum(text_flops(config, len(ids)) for ids in tokens.ids) / len(texts) / 1e9
    name = f"text tower, {dtype}, {np.mean([len(ids) for ids in tokens.ids]):.0f} tokens on average"
    yield from _shares(model, dtype, {name: lambda: model.embed_tokens(tokens)}, len(texts), "texts/s", flops)


def _shares(
    model: Model, dtype: str, calls: Mapping[str, Callable[[], object]], count: int, unit: str, gflop: float
) -> Iterator[Row]:
    """The rate of each call as a share of the matrix rate: `count` units of so many GFLOP each."""
    product, product_gflop = matrix_product(model.device.type, dtype)
    limit = "this machine's matrix product"
    timed = in_turns({limit: product, **calls})
    for name in calls:
        row = timed.row("towers", name, count, unit, beside=limit)
        # The turns' ratio is of times; per FLOP it is of rates.
        yield replace(row, ratio=timed.ratio(name, limit) * count * gflop / product_gflop)


def config_of(tower: Any) -> Any:
    """The sizes of a tower, `TextConfig` or `ImageConfig`."""
    return tower.config


def plain_loop(models: Mapping[str, Model], texts: Sequence[str], images: Sequence[bytes]) -> Iterator[Row]:
    """Our towers beside what a good engineer writes in an hour, on the same texts and images.

    The plain loop: one process, float32, batches of 32 in the order of the catalog, texts padded to the longest of
    their batch, attention in plain matrix products. The weights are the same.

    Args:
        models: one model by dtype, float32 among them.
        texts: of mixed lengths.
        images: encoded, all of them readable.
    """
    import torch

    from pipeline.model.image_tower import ImageTower
    from pipeline.model.text_tower import TextTower

    model = models["float32"]
    text, image = (
        kind(config_of(tower), attention="plain").eval().to(model.device)
        for kind, tower in ((TextTower, model.text_tower), (ImageTower, model.image_tower))
    )
    text.load_state_dict(model.text_tower.state_dict())
    image.load_state_dict(model.image_tower.state_dict())
    tokens = model.tokenize(texts)
    crops = np.stack([model.prepare_image(data).crop for data in images])
    batches = list(padded_batches(tokens.ids, config_of(model.text_tower).pad_token_id))

    def plain(tower: torch.nn.Module, inputs: Iterator[torch.Tensor]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return np.concatenate([torch.nn.functional.normalize(tower(one)).cpu().numpy() for one in inputs])

    def plain_texts() -> np.ndarray[Any, Any]:
        return plain(text, (torch.from_numpy(batch).to(model.device) for batch in batches))

    def plain_images() -> np.ndarray[Any, Any]:
        step = PLAIN_BATCH
        return plain(image, (model.pixels(crops[at : at + step]) for at in range(0, len(crops), step)))

    yield from _beside_plain(plain_texts, {d: partial(m.embed_tokens, tokens) for d, m in models.items()}, "text",
                             len(texts), {"float32": 2.0})  # fmt: skip
    yield from _beside_plain(plain_images, {d: partial(m.embed_crops, crops) for d, m in models.items()}, "image",
                             len(crops), {"float32": 1.08, "bfloat16": 3.3})  # fmt: skip


def _beside_plain(
    plain: Callable[[], np.ndarray[Any, Any]],
    ours: Mapping[str, Callable[[], np.ndarray[Any, Any]]],
    kind: str,
    count: int,
    aims: Mapping[str, float],
) -> Iterator[Row]:
    vectors = plain()
    for dtype, embed in ours.items():
        agree(vectors, embed(), least=0.9999 if dtype == "float32" else 0.99)
    loop, unit = "plain loop, float32", f"{kind}s/s"
    timed = in_turns({loop: plain, **ours}, warm=False)
    for dtype in ours:
        what = f"{kind} tower, {dtype}"
        yield timed.row("peers", dtype, count, unit, beside=loop, aim=aims.get(dtype), what=what)
    yield timed.row("peers", loop, count, unit, what=f"{loop}, {kind}s")


def padded_batches(ids: Sequence[Sequence[int]], pad: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Token ids in batches of 32 in their order, each int64 (B, T) padded to its longest text."""
    for at in range(0, len(ids), PLAIN_BATCH):
        rows = ids[at : at + PLAIN_BATCH]
        padded = np.full((len(rows), max(map(len, rows))), pad, np.int64)
        for row, own in zip(padded, rows, strict=True):
            row[: len(own)] = own
        yield padded


def agree(theirs: np.ndarray[Any, Any], ours: np.ndarray[Any, Any], *, least: float = 0.9999) -> None:
    """See that both compute the same, or the comparison means nothing.

    Args:
        theirs: unit vectors (N, D).
        ours: the same inputs'.
        least: the lowest cosine of a pair.

    Raises:
        RuntimeError: they do not.
    """
    worst = float((theirs * ours).sum(axis=1).min())
    if not worst >= least:
        raise RuntimeError(f"the peer and the towers give other vectors: cosine {worst}")
