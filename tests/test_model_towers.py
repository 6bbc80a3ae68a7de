"""Both towers against the golden outputs of the published architecture, and against their own plain form."""

from __future__ import annotations

import importlib.util
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import TINY_IMAGE, TINY_TEXT, fill
from safetensors.torch import load_file

from pipeline.errors import ModelError
from pipeline.model import attention
from pipeline.model.attention import alibi_slopes
from pipeline.model.image_tower import ImageConfig, ImageTower, rope_table
from pipeline.model.text_tower import TextConfig, TextTower

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
TOLERANCE = 1e-5  # of the unit vector, in any coordinate; two right float32 implementations differ by under 1e-6

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the golden outputs are not beside this checkout")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def reference_fill() -> Any:
    spec = importlib.util.spec_from_file_location("fill_by_key", REFERENCE / "fill_by_key.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


def configs(name: str) -> tuple[TextConfig, ImageConfig]:
    entry = json.loads((REFERENCE / "configs.json").read_text())[name]
    text = entry["clip"]["text_config"] | {"hf_model_config_kwargs": entry["text_hf"]}
    return TextConfig.from_config(text), ImageConfig.from_config(entry["clip"]["vision_config"])


@cache
def filled(name: str, kind: str, attention_kind: str = "sdpa", scale: float = 1.0) -> torch.nn.Module:
    text, image = configs(name)
    prefix = "text_model.transformer." if kind == "text" else "vision_model."
    with torch.device("meta"):
        tower = TextTower(text, attention_kind) if kind == "text" else ImageTower(image, attention_kind)
    tensors = {}
    for key, shape in ((key, tuple(tensor.shape)) for key, tensor in tower.state_dict().items()):
        tensors[key] = torch.from_numpy(reference_fill()(prefix + key, shape))
        if any(part in prefix + key for part in ("embeddings.", "patch_embed.", "cls_token", "pos_embed")):
            tensors[key] = tensors[key] * scale
    tower.load_state_dict(tensors, strict=True, assign=True)
    return tower.eval()


def run(tower: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return F.normalize(tower(inputs))


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    assert torch.isfinite(got).all()
    return float((got - want).abs().max())


def cases(name: str, kind: str) -> list[tuple[str, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
    path = REFERENCE / "goldens" / f"{name}_{'vision' if kind == 'image' else kind}.safetensors"
    golden = load_file(path)
    out = []
    for case in sorted({key.split(".")[0] for key in golden}):
        own = {key.split(".", 1)[1]: tensor for key, tensor in golden.items() if key.startswith(case + ".")}
        inputs = own["input_ids"] if kind == "text" else own["pixel_q"].float() / 32
        out.append((case, inputs, own["embeds_normalized"], own))
    return out


@needs_reference
def test_full_size_towers_have_the_published_keys_and_shapes():
    text, image = configs("full")
    assert (text, image) == (TextConfig(), ImageConfig())
    with torch.device("meta"):
        got = {"text_model.transformer." + k: tuple(v.shape) for k, v in TextTower(text).state_dict().items()}
        got |= {"vision_model." + k: tuple(v.shape) for k, v in ImageTower(image).state_dict().items()}
    rows = (line.split("\t") for line in (REFERENCE / "keys_full.tsv").read_text().splitlines())
    want = {key: tuple(int(side) for side in shape.split(",") if side) for key, shape in rows}
    assert got | {"logit_scale": ()} == want


@needs_reference
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("tiny_a", "tiny_b", "full") for kind in ("text", "image")] + [("full_pt16", "image")],
)
def test_goldens_in_their_batches(name: str, kind: str):
    for case, inputs, want, _ in cases(name, kind):
        if name == "full" and inputs.shape[1] > 200:
            continue  # the slow test below has them
        assert difference(run(filled(name, kind), inputs), want) <= TOLERANCE, case


@needs_reference
@pytest.mark.slow
def test_full_size_batch_of_mixed_lengths_and_1500_tokens():
    for case, inputs, want, _ in cases("full", "text"):
        assert difference(run(filled("full", "text"), inputs), want) <= TOLERANCE, case


@needs_reference
@pytest.mark.parametrize(
    ("name", "kind"),
    [("tiny_a", "text"), ("tiny_b", "text"), ("full", "text"), ("tiny_a", "image"), ("tiny_b", "image")],
)
def test_goldens_alone_and_padded(name: str, kind: str):
    for case, inputs, want, _ in cases(name, kind):
        for row, target in zip(inputs, want, strict=True):
            if kind == "image":
                assert difference(run(filled(name, kind), row[None])[0], target) <= TOLERANCE, case
                continue
            ids = row[row != 0][None]
            if name == "full" and ids.shape[1] > 200:
                continue
            padded = F.pad(ids, (0, 37))
            assert difference(run(filled(name, kind), ids)[0], target) <= TOLERANCE, case
            assert difference(run(filled(name, kind), padded)[0], target) <= TOLERANCE, case


@needs_reference
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_every_layer_of_the_small_goldens(name: str, kind: str):
    tower = filled(name, kind)
    blocks = tower.encoder["layers"] if kind == "text" else tower.blocks
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in blocks]
    try:
        for case, inputs, _, golden in cases(name, kind):
            seen.clear()
            run(tower, inputs)
            for index, got in enumerate(seen):
                want = golden.get(f"layer{index}" if kind == "text" else f"block{index}")
                if want is None:
                    continue
                got = got.reshape(len(inputs), -1, got.shape[-1])  # the text tower's tokens are one row after another
                keep = (inputs[:, : want.shape[1]] != 0) if kind == "text" else torch.ones(want.shape[:2], dtype=bool)
                assert difference(got[:, : want.shape[1]][keep], want[keep]) <= 1e-4, (case, index)
    finally:
        for hook in hooks:
            hook.remove()


@needs_reference
def test_small_activations_prove_the_epsilon_of_the_norms():
    golden = load_file(REFERENCE / "goldens" / "tiny_b_small_activations.safetensors")
    text = run(filled("tiny_b", "text", scale=1e-3), golden["input_ids"])
    image = run(filled("tiny_b", "image", scale=1e-3), golden["pixel_q"].float() / 32)
    assert difference(text, golden["text_embeds_normalized"]) <= TOLERANCE
    assert difference(image, golden["image_embeds_normalized"]) <= TOLERANCE


@needs_reference
def test_logits_of_the_contrastive_forward():
    golden = load_file(REFERENCE / "goldens" / "tiny_a_logits.safetensors")
    text, image = (
        run(filled("tiny_a", "text"), golden["input_ids"]),
        run(filled("tiny_a", "image"), golden["pixel_values"]),
    )
    logits = math.exp(2.6592) * text @ image.T
    assert difference(logits, golden["logits_per_text"]) <= 1e-4


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_full_size(dtype: torch.dtype):
    least = {torch.bfloat16: (0.999, 0.9995), torch.float16: (0.9999, 0.9999)}[dtype]
    text, image = configs("full")
    for kind, floor, tower in (("text", least[0], TextTower), ("image", least[1], ImageTower)):
        wide = filled("full", kind)
        with torch.device("meta"):
            half = tower(text if kind == "text" else image)
        half.load_state_dict({k: v.to(dtype) for k, v in wide.state_dict().items()}, strict=True, assign=True)
        for case, inputs, want, _ in cases("full", kind):
            if kind == "text" and case in ("long", "batch"):
                continue
            got = run(half.eval(), inputs if kind == "text" else inputs.to(dtype))
            assert float((got * want).sum(dim=1).min()) >= floor, (kind, case)


def seeded(tower: torch.nn.Module) -> torch.nn.Module:
    tower.load_state_dict({key: fill(key, tuple(tensor.shape)) for key, tensor in tower.state_dict().items()})
    return tower.eval()


def test_plain_and_fused_attention_agree():
    ids = torch.randint(1, TINY_TEXT.vocab_size, (5, 60), generator=torch.Generator().manual_seed(1))
    ids[1, 20:], ids[3, 1:] = 0, 0
    texts = [run(seeded(TextTower(TINY_TEXT, kind)), ids) for kind in ("sdpa", "plain")]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = [run(seeded(ImageTower(TINY_IMAGE, kind)), pixels) for kind in ("sdpa", "plain")]
    assert difference(*texts) <= 1e-6
    assert difference(*images) <= 1e-6


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), mask_bytes=st.integers(1, 60_000))
def test_blocks_of_queries_and_padding_change_nothing(lengths: list[int], mask_bytes: int):
    tower = seeded(TextTower(TINY_TEXT))
    rows = [torch.arange(1, n + 1) * 7 % (TINY_TEXT.vocab_size - 1) + 1 for n in lengths]
    alone = torch.cat([run(tower, row[None]) for row in rows])
    whole, attention.MASK_BYTES = attention.MASK_BYTES, mask_bytes
    try:
        together = run(tower, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    finally:
        attention.MASK_BYTES = whole
    assert difference(together, alone) <= TOLERANCE


@settings(max_examples=30, deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(1, 3), st.integers(2, 30)), min_size=1, max_size=5), seed=st.integers(0, 99)
)
def test_groups_of_several_lengths_equal_texts_alone(groups: list[tuple[int, int]], seed: int):
    tower, random = seeded(TextTower(TINY_TEXT)), torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 9, shape, generator=random) for shape in groups]  # an id within a text may be padding's
    for own in ids:
        own[:, 0] = 5
    alone = torch.cat([run(tower, row[None]) for own in ids for row in own])
    with torch.inference_mode():
        assert difference(F.normalize(tower.embed_groups(ids)), alone) <= TOLERANCE


@pytest.mark.parametrize("length", [3, 77, 512, 1500, 8192])
def test_long_texts_against_an_independent_computation(length: int):
    config = TextConfig(vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8)
    tower = seeded(TextTower(config))
    ids = torch.from_numpy(np.random.default_rng(length).integers(1, 50, (1, length)))
    got = run(tower, ids)[0].numpy()
    assert np.abs(got - by_hand(tower, ids[0].numpy(), config)).max() <= TOLERANCE


def by_hand(tower: torch.nn.Module, ids: np.ndarray, config: TextConfig) -> np.ndarray:
    """One layer of the text tower in float64 numpy, query by query, from the fact sheet."""
    w = {key: tensor.double().numpy() for key, tensor in tower.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * w[name + ".weight"] + w[name + ".bias"]

    at = "encoder.layers.0."
    x = norm(w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0], "emb_ln")
    q, k, v = np.split(x @ w[at + "mixer.Wqkv.weight"].T + w[at + "mixer.Wqkv.bias"], 3, axis=1)
    mixed, size = np.empty_like(x), config.hidden_size // config.num_attention_heads
    places = np.arange(len(ids))
    for head, slope in enumerate([2.0**-4, 2.0**-8, 2.0**-2]):  # of three heads: two of the 2-series, then the 4-series
        own = slice(head * size, (head + 1) * size)
        for start in range(0, len(ids), 1024):
            rows = slice(start, start + 1024)
            scores = q[rows, own] @ k[:, own].T / np.sqrt(size) - slope * abs(places[rows, None] - places)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed[rows, own] = weights @ v[:, own] / weights.sum(1, keepdims=True)
    x = norm(x + mixed @ w[at + "mixer.out_proj.weight"].T + w[at + "mixer.out_proj.bias"], at + "norm1")
    gate, value = np.split(x @ w[at + "mlp.gated_layers.weight"].T, 2, axis=1)
    gelu = gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2)))
    x = norm(x + (gelu * value) @ w[at + "mlp.wo.weight"].T + w[at + "mlp.wo.bias"], at + "norm2")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_slopes_are_in_head_order_and_not_sorted():
    assert alibi_slopes(12) == [2.0**-i for i in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    assert alibi_slopes(1) == [2.0**-8]


@given(n_heads=st.integers(1, 64))
def test_every_head_has_its_own_slope(n_heads: int):
    slopes = alibi_slopes(n_heads)
    assert len(set(slopes)) == n_heads
    assert all(0 < slope <= 1 for slope in slopes)


def test_rope_turns_and_keeps_length():
    cos, sin = rope_table(TINY_IMAGE)
    assert cos.shape == sin.shape == (16, 8)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(16, 8))
    assert torch.equal(cos[0], torch.ones(8))


def test_towers_hold_no_buffers():
    assert not list(TextTower(TINY_TEXT).buffers())
    assert not list(ImageTower(TINY_IMAGE).buffers())


def test_a_row_of_padding_is_refused():
    with pytest.raises(ValueError, match="padding only"):
        TextTower(TINY_TEXT)(torch.tensor([[5, 6], [0, 0]]))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="32"):
        ImageTower(TINY_IMAGE)(torch.zeros(1, 3, 40, 32))


TEXT_FAULTS = {
    "hf_model_name_or_path": "jinaai/jina-embeddings-v3",
    "pooler_type": "cls_pooler",
    "proj_type": "linear",
    "embed_dim": 47,
    "hf_model_config_kwargs": {"hidden_act": "gelu_new"},
    "hf_model_config_kwargs ": {"use_qk_norm": True},
    "hf_model_config_kwargs  ": {"surprise": 1},
    "hf_model_config_kwargs   ": {"num_attention_heads": 0},
    "hf_model_config_kwargs    ": {"hidden_size": "48"},
}


@pytest.mark.parametrize("key", TEXT_FAULTS)
def test_unsupported_text_settings_are_refused(key: str):
    with pytest.raises(ModelError, match=r"config\.json"):
        TextConfig.from_config(TINY_TEXT.to_config() | {key.strip(): TEXT_FAULTS[key]})


@pytest.mark.parametrize(
    ("key", "value"),
    {
        "rope_embeddings": False,
        "post_norm": True,
        "ls_init_value": 1e-5,
        "intp_freq": None,
        "layers": True,
        "patch_size": 7,
        "head_width": 7,
        "pt_hw_seq_len": 16,
        "subln": False,
        "embed_dim": 1,
    }.items(),
)
def test_unsupported_image_settings_are_refused(key: str, value: object):
    with pytest.raises(ModelError, match=r"config\.json"):
        ImageConfig.from_config(TINY_IMAGE.to_config() | {key: value})


def test_configurations_survive_their_own_layout():
    assert TextConfig.from_config(json.loads(json.dumps(TINY_TEXT.to_config()))) == TINY_TEXT
    assert ImageConfig.from_config(json.loads(json.dumps(TINY_IMAGE.to_config()))) == TINY_IMAGE
