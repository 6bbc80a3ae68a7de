"""Our towers beside other runtimes and libraries: ONNX Runtime, timm and sentence-transformers, `twotower[peers]`.

Each one computes what ours does, which is checked before anything is timed: the same weights, texts and images.
"""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.bench.runs import good_crops
from jobs.bench.timing import Row, in_turns
from jobs.bench.towers import PLAIN_BATCH, agree, config_of, padded_batches
from pipeline.errors import MissingExtra

if TYPE_CHECKING:
    from pipeline.model.model import Model

TIMM_NAME = "eva02_base_patch16_clip_224"
_TIMM_KEYS = {
    "q_bias": "q_proj.bias", "v_bias": "v_proj.bias", "inner_attn_ln": "norm",
    "mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.ffn_ln": "mlp.norm", "mlp.w3": "mlp.fc2",
}  # fmt: skip
"""What timm calls the parts of this architecture, where the published keys have other names."""
_CLIP_TEXT = {"vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_CLIP_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "patch_size": 16}
_LAYERS, _SIDE_PX = 12, 224
_CLIP_TOKENS, _TRAINED_TOKENS = 77, 5_000
_SMALL_BATCH = 8
_KEPT: list[object] = []


def beside_onnx(model: Model, texts: Sequence[str], images: Sequence[bytes], folder: Path) -> Iterator[Row]:
    """Both towers beside ONNX Runtime on their exports, as fastembed runs them, with as many threads.

    Texts go in batches of 32, padded to the longest: once in the order of the catalog, as fastembed takes them, and
    once sorted by length, which it does not do.
    """
    import torch

    runtime = _peer("onnxruntime", "onnx", "onnxscript")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def session(tower: torch.nn.Module, inputs: torch.Tensor, sizes: Sequence[int], name: str) -> Callable[..., Any]:
        path = folder / f"{name}.onnx"
        shapes = (dict.fromkeys(sizes, torch.export.Dim.DYNAMIC),)
        with warnings.catch_warnings():  # of torch's own exporter about itself
            warnings.simplefilter("ignore")
            torch.onnx.export(tower, (inputs,), path, input_names=["inputs"], dynamic_shapes=shapes, verbose=False)
        ready = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda array: _unit(ready.run(None, {"inputs": array})[0])

    tokens = model.tokenize(texts)
    pad = config_of(model.text_tower).pad_token_id
    sample = next(padded_batches(tokens.ids[:3], pad))
    text = session(model.text_tower, torch.from_numpy(sample), (0, 1), "text")
    order = sorted(range(len(tokens.ids)), key=lambda index: len(tokens.ids[index]))

    def ours() -> np.ndarray[Any, Any]:
        return model.embed_tokens(tokens)

    def as_they_come() -> np.ndarray[Any, Any]:
        return np.concatenate([text(batch) for batch in padded_batches(tokens.ids, pad)])

    def by_length() -> np.ndarray[Any, Any]:
        return np.concatenate([text(batch) for batch in padded_batches([tokens.ids[at] for at in order], pad)])

    agree(as_they_come(), ours())
    agree(by_length(), ours()[order])
    calls = {"ours": ours, "ONNX Runtime": as_they_come, "ONNX Runtime, sorted by length": by_length}
    timed = in_turns(calls, warm=False)
    for name in tuple(calls)[1:]:
        yield timed.row("peers", "ours", len(texts), "texts/s", beside=name, aim=1.0, what="text tower, float32")
        yield timed.row("peers", name, len(texts), "texts/s", what=f"{name}, texts")

    crops, step = good_crops(model, images), PLAIN_BATCH
    image = session(model.image_tower, model.pixels(crops[:2]), (0,), "image")

    def exported() -> np.ndarray[Any, Any]:
        return np.concatenate([image(model.pixels(crops[at : at + step]).numpy()) for at in range(0, len(crops), step)])

    yield from _images_beside(model, crops, {"ONNX Runtime": exported})


def beside_timm(model: Model, images: Sequence[bytes]) -> Iterator[Row]:
    """The image tower beside timm's of the same architecture with our weights, in two batch sizes.

    Raises:
        MissingExtra: timm is not installed.
    """
    import torch

    config = config_of(model.image_tower)
    _whole_torchvision()
    create = _peer("timm").create_model
    theirs = create(
        TIMM_NAME, pretrained=False, num_classes=0, img_size=config.image_size, patch_size=config.patch_size,
        embed_dim=config.width, depth=config.layers, num_heads=config.width // config.head_width,
        mlp_ratio=config.mlp_ratio, ref_feat_shape=(config.rope_grid, config.rope_grid),
    ).eval()  # fmt: skip
    theirs.load_state_dict({_timm_key(key): value for key, value in model.image_tower.state_dict().items()})
    crops = good_crops(model, images)

    def run(step: int) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            parts = [theirs(model.pixels(crops[at : at + step])).numpy() for at in range(0, len(crops), step)]
        return _unit(np.concatenate(parts))

    steps = (_SMALL_BATCH, PLAIN_BATCH)
    yield from _images_beside(model, crops, {f"timm, batch {step}": partial(run, step) for step in steps})


def beside_sentence_transformers(texts: Sequence[str], images: Sequence[bytes], folder: Path) -> Iterator[Row]:
    """A CLIP folder of the same size, from texts and encoded images to vectors: our loader beside theirs."""
    import torch
    from PIL import Image

    from pipeline.errors import ImageRejected
    from pipeline.model import load_model

    _whole_torchvision()
    library = _peer("sentence_transformers")
    write_clip(folder, texts)
    theirs = library.SentenceTransformer(str(folder), device="cpu")
    model = load_model(str(folder))
    good = []
    for data in images:
        try:
            model.prepare_image(data)
        except ImageRejected:
            continue
        good.append(data)

    def encode(inputs: Sequence[Any]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            found = theirs.encode(inputs, batch_size=PLAIN_BATCH, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)

    def opened() -> list[Any]:
        return [Image.open(io.BytesIO(data)).convert("RGB") for data in good]

    name = "sentence-transformers"
    agree(encode(texts), model.embed_texts(texts))
    # Its resize is torchvision's and ours Pillow's, as both libraries' own: pixels differ by a level here and there.
    agree(encode(opened()), model.embed_images(good), least=0.99)
    timed = in_turns({"ours": lambda: model.embed_texts(texts), name: lambda: encode(texts)}, warm=False)
    yield timed.row("peers", "ours", len(texts), "texts/s", beside=name, what="CLIP ViT-B/16, texts")
    yield timed.row("peers", name, len(texts), "texts/s", what=f"{name}, texts")
    timed = in_turns({"ours": lambda: model.embed_images(good), name: lambda: encode(opened())}, warm=False)
    yield timed.row("peers", "ours", len(good), "images/s", beside=name, what="CLIP ViT-B/16, images from bytes")
    yield timed.row("peers", name, len(good), "images/s", what=f"{name}, images")


def write_clip(folder: Path, texts: Sequence[str]) -> None:
    """A CLIP ViT-B/16 folder with seeded weights, and a tokenizer that is trained on the texts."""
    import torch
    import transformers

    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    untrained = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_CLIP_TOKENS)
    tokenizer = untrained.train_new_from_iterator(texts, _TRAINED_TOKENS)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.CLIPConfig(
        text_config=_CLIP_TEXT | ids | {"num_hidden_layers": _LAYERS},
        vision_config=_CLIP_VISION | {"num_hidden_layers": _LAYERS, "image_size": _SIDE_PX},
    )
    size = {"height": _SIDE_PX, "width": _SIDE_PX}
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": _SIDE_PX}, crop_size=size)
    for part in (transformers.CLIPModel(config), tokenizer, pixels):
        part.save_pretrained(folder)


def _images_beside(
    model: Model, crops: np.ndarray[Any, Any], peers: dict[str, Callable[[], np.ndarray[Any, Any]]]
) -> Iterator[Row]:
    vectors = model.embed_crops(crops)
    for peer in peers.values():
        agree(peer(), vectors)
    timed = in_turns({"ours": lambda: model.embed_crops(crops), **peers}, warm=False)
    for name in peers:
        yield timed.row("peers", "ours", len(crops), "images/s", beside=name, aim=1.0, what="image tower, float32")
        yield timed.row("peers", name, len(crops), "images/s", what=f"{name}, images")


def _unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _timm_key(key: str) -> str:
    for ours, theirs in _TIMM_KEYS.items():
        key = key.replace(ours, theirs)
    return key


def _peer(name: str, *needed: str) -> Any:
    """A peer's module.

    Raises:
        MissingExtra: it, or what it needs, is not installed.
    """
    try:
        for other in needed:
            importlib.import_module(other)
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(
            f"the peer {name} is not installed ({error.name}): pip install 'twotower[peers]' in an environment of its "
            "own, or leave its part out of --parts"
        ) from error


def _whole_torchvision() -> None:
    """Let torchvision be imported where its compiled half is of another build than torch, as beside a torch for CPUs.

    Its Python half registers shapes for two operators that the compiled half would have defined, and stops without.
    Neither peer calls them.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        operators: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        _KEPT.append(operators)  # a library that is collected takes its operators along
