"""CLIP and SigLIP folders with random weights made by transformers, against transformers itself on the same inputs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import InputRejected, ModelError
from pipeline.model import canary, describe_model, load_model

transformers = pytest.importorskip("transformers", reason="CLIP folders need the extra `embed`")

TEXTS = ["a red dress", "blue", "shirt of wool " * 40]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def quiet_transformers():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def clip_tokenizer() -> Any:
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    merges = [("r", "e"), ("re", "d</w>")]
    return transformers.CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def siglip_tokenizer() -> Any:
    from model_folder import tokenizer

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]", model_max_length=64
    )


def write(folder: Path, kind: str) -> Path:
    torch.manual_seed(7)
    vision = SIZE | {"image_size": 32, "patch_size": 8}
    tokenizer = clip_tokenizer() if kind == "clip" else siglip_tokenizer()
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": 77 if kind == "clip" else 64}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = transformers.CLIPModel(config)
        pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        pixels = transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for part in (model, tokenizer, pixels):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    transformers.logging.set_verbosity_error()
    return request.param, write(tmp_path_factory.mktemp("clip") / request.param, request.param)


def by_transformers(kind: str, path: Path) -> tuple[np.ndarray, np.ndarray]:
    model = (transformers.CLIPModel if kind == "clip" else transformers.SiglipModel).from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    padding = {"padding": True, "max_length": 77} if kind == "clip" else {"padding": "max_length", "max_length": 64}
    ids = tokenizer(TEXTS, truncation=True, return_tensors="pt", **padding)
    mask = {"attention_mask": ids["attention_mask"]} if kind == "clip" else {}
    pixels = transformers.AutoImageProcessor.from_pretrained(path, backend="pil")(
        [canary.draw(name) for name in canary.IMAGES], return_tensors="pt"
    )
    with torch.inference_mode():
        outputs = [
            model.get_text_features(input_ids=ids["input_ids"], **mask),
            model.get_image_features(pixel_values=pixels["pixel_values"]),
        ]
    vectors = [output if isinstance(output, torch.Tensor) else output.pooler_output for output in outputs]
    text, image = (torch.nn.functional.normalize(vector).numpy() for vector in vectors)
    return text, image


def test_same_inputs_through_transformers_itself(folder: tuple[str, Path]):
    kind, path = folder
    model = load_model(str(path))
    text, image = by_transformers(kind, path)
    assert np.abs(model.embed_texts(TEXTS) - text).max() <= 1e-5
    assert np.abs(model.embed_images([canary.draw(name) for name in canary.IMAGES]) - image).max() <= 1e-5
    assert model.dim == text.shape[1] == (24 if kind == "clip" else 32)
    assert model.text_counts.n_truncated == 1
    assert model.tokenize([TEXTS[2]]).truncated == (True,)
    assert np.abs(np.concatenate([model.embed_texts([one]) for one in TEXTS]) - text).max() <= 1e-5


def test_identity_towers_and_rejects(folder: tuple[str, Path]):
    kind, path = folder
    card = describe_model(str(path))
    assert card.kind == kind
    alone = load_model(str(path), towers=("image",))
    assert (alone.fingerprint, alone.model_id) == (card.fingerprint, card.model_id)
    assert alone.embed_images([canary.draw("noise")]).shape == (1, card.dim)
    with pytest.raises(ModelError, match="without its text tower"):
        alone.embed_texts(["red"])
    with pytest.raises(InputRejected):
        load_model(str(path), towers=("text",)).embed_texts([" "])


def test_canary_of_a_clip_folder(tmp_path: Path):
    path = write(tmp_path / "clip", "clip")
    canary.write(load_model(str(path), check_canary=False))
    assert load_model(str(path)).card.has_canary
    load_model(str(path), dtype="bfloat16")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen", "pickle", "pixels", "tokenizer"])
def test_damaged_folders_are_refused(tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture):
    path = write(tmp_path / "clip", "clip")
    weights, key = load_file(path / "model.safetensors"), "text_projection.weight"
    match = key
    if fault == "missing":
        del weights[key]
    elif fault == "unexpected":
        weights["surprise"], match = torch.zeros(1), "surprise"
    elif fault == "misshapen":
        weights[key] = torch.zeros(23, 32)
    save_file(weights, path / "model.safetensors")
    if fault == "pickle":
        torch.save(weights, path / "model.safetensors")
        match = "is a pickle"
    elif fault == "pixels":
        (path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 99}}))
        match = r"preprocessor_config\.json"
    elif fault == "tokenizer":
        other = clip_tokenizer()
        other.add_tokens([f"word{index}" for index in range(9)])
        other.save_pretrained(path)
        match = "another model's tokenizer"
    with caplog.at_level(logging.CRITICAL), pytest.raises(ModelError, match=match):
        describe_model(str(path))
    with pytest.raises(ModelError, match=match):
        load_model(str(path))
