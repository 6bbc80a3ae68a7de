"""Loading: a right folder works and keeps its identity; a wrong one is refused by a sentence that names the fault."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folder import TINY_IMAGE, config, tensors, tokenizer, write_folder
from safetensors.torch import load_file, save_file

from jobs import check_model
from pipeline.errors import ImageRejected, InputRejected, ModelError
from pipeline.model import canary, describe_model, load_model, weights
from pipeline.model.identity import read_json
from pipeline.model.image_tower import rope_table
from pipeline.model.tokens import MAX_PADDING, pack
from pipeline.records import Reason

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
TEXTS = ["red dress", "a", "hello world of wool", "Ärmel " * 30, "shirt, blue"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small folder with its canary; never changed by a test."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = write_folder(tmp_path_factory.mktemp("models") / "base")
    canary.write(load_model(str(folder), check_canary=False))
    return folder


@pytest.fixture
def own_log():
    """Take back what a job's command line does to the log."""
    logs = [logging.getLogger(name) for name in ("pipeline", "jobs")]
    before = [(log.handlers[:], log.propagate, log.level) for log in logs]
    yield
    for log, (handlers, propagate, level) in zip(logs, before, strict=True):
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def bare(folder: Path) -> Path:
    """A copy without a canary, so that the next line of defence is seen."""
    (folder / "canary.json").unlink()
    return folder


def refused(folder: Path, match: str) -> None:
    """The driver's check and the actor's loading both refuse."""
    with pytest.raises(ModelError, match=match):
        describe_model(str(folder))
    with pytest.raises(ModelError, match=match):
        load_model(str(folder))


def change_weights(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    path = folder / "model.safetensors"
    merged = {key: value.clone() for key, value in load_file(path).items()} | change
    save_file({key: value for key, value in merged.items() if value is not None}, path)


def record_digests(folder: Path) -> None:
    """What a hand that changes weights and knows of digests would do."""
    path = folder / "canary.json"
    content = read_json(path)
    content["files"] = {file: weights.file_digest(folder / file) for file in content["files"]}
    path.write_text(json.dumps(content))


def test_a_right_folder(base: Path):
    model, card = load_model(str(base)), describe_model(str(base))
    assert (model.dim, model.model_id, model.fingerprint) == (48, card.model_id, card.fingerprint)
    vectors = model.embed_texts(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 48)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    images = model.embed_images([canary.draw(name) for name in canary.IMAGES])
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    assert model.embed_texts([]).shape == model.embed_images([]).shape == (0, 48)
    assert card.n_parameters == sum(tensor.numel() for tensor in tensors().values())
    assert model.text_tower(torch.tensor([[2, 9, 3]])).shape == (1, 48)
    assert model.image_tower(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


def test_identity_is_of_the_content_alone(base: Path, folder: Path):
    one = describe_model(str(base))
    assert describe_model(str(folder)).fingerprint == one.fingerprint
    assert load_model(str(folder), towers=("text",)).fingerprint == one.fingerprint
    half = describe_model(str(folder), dtype="bfloat16")
    assert half.model_id == one.model_id
    assert half.fingerprint != one.fingerprint
    others = [{"preprocessing": "published"}, {"max_tokens": 77}, {"jpeg_draft": True}]
    ids = {describe_model(str(folder), **other).model_id for other in others} | {one.model_id}  # type: ignore[arg-type]
    assert len(ids) == 4


def test_one_tower_alone(base: Path):
    model = load_model(str(base), towers=("text",))
    assert model.embed_texts(["red"]).shape == (1, 48)
    with pytest.raises(ModelError, match="without its image tower"):
        model.embed_images([canary.draw("noise")])
    with pytest.raises(ModelError, match="towers"):
        load_model(str(base), towers=("sound",))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(base: Path, dtype: str):
    half, whole = load_model(str(base), dtype=dtype), load_model(str(base))
    cosines = (half.embed_texts(TEXTS) * whole.embed_texts(TEXTS)).sum(axis=1)
    assert cosines.min() >= canary.MIN_COSINE[dtype]


@pytest.mark.parametrize("is_padded", [False, True])
def test_batches_equal_one_by_one_and_little_is_padding(base: Path, is_padded: bool):
    model = load_model(str(base))
    if is_padded:  # as GPUs and compiled towers get them
        model.replace_forward("text", model.text_tower.forward)
    random = np.random.default_rng(3)
    texts = [" ".join(random.choice(["red", "wool", "coat", "xyz"], n)) for n in random.integers(1, 200, 64)]
    together, counts = model.embed_texts(texts), model.text_counts
    alone = np.concatenate([model.embed_texts([text]) for text in texts])
    assert np.abs(together - alone).max() <= 1e-5
    assert counts.n_texts == 64
    assert counts.n_padding / (counts.n_tokens + counts.n_padding) < 0.10
    assert (counts.n_padding > 0) is is_padded


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 600)).map(sorted), budget=st.integers(1, 5000))
def test_packing_without_padding_fills_its_budget(lengths: list[int], budget: int):
    batches = pack(lengths, budget, is_padded=False)
    assert [index for start, end in batches for index in range(start, end)] == list(range(len(lengths)))
    for start, end in batches:
        assert sum(lengths[start:end]) <= budget or end - start == 1
        assert end == len(lengths) or sum(lengths[start : end + 1]) > budget


@settings(max_examples=200)
@given(lengths=st.lists(st.integers(1, 600)).map(sorted), budget=st.integers(1, 5000))
def test_packing_covers_all_within_its_bounds(lengths: list[int], budget: int):
    batches = pack(lengths, budget)
    assert [index for start, end in batches for index in range(start, end)] == list(range(len(lengths)))
    for start, end in batches:
        cells = (end - start) * lengths[end - 1]
        assert cells <= budget or end - start == 1
        assert cells - sum(lengths[start:end]) <= MAX_PADDING * cells


def test_truncation_is_counted_and_keeps_the_end(base: Path):
    model = load_model(str(base), max_tokens=8)
    batch = model.tokenize(["red", "wool " * 50])
    assert batch.truncated == (False, True)
    assert [len(ids) for ids in batch.ids] == [3, 8]
    assert batch.ids[1][-1] == batch.ids[0][-1]
    model.embed_tokens(batch)
    assert (model.text_counts.n_truncated, model.text_counts.n_tokens) == (1, 11)
    with pytest.raises(ModelError, match="max_tokens"):
        load_model(str(base), max_tokens=9000)


def test_bad_inputs_are_rejected_with_their_reason(base: Path, tmp_path: Path):
    model = load_model(str(base))
    for text in ("", "  \n\t"):
        with pytest.raises(InputRejected) as caught:
            model.embed_texts(["red", text])
        assert caught.value.reason == Reason.TEXT_EMPTY
    with pytest.raises(ImageRejected, match="image 1") as image:
        model.embed_images([canary.draw("noise"), b"{}"])
    assert image.value.reason == Reason.IMAGE_NOT_AN_IMAGE
    assert pickle.loads(pickle.dumps(image.value)).reason == Reason.IMAGE_NOT_AN_IMAGE
    with pytest.raises(ImageRejected) as gone:
        model.embed_images([tmp_path / "gone.jpg"])
    assert gone.value.reason == Reason.IMAGE_NOT_FOUND


def test_odd_inputs_are_taken(base: Path):
    model = load_model(str(base))
    assert np.isfinite(model.embed_texts(["\ud800 red", "\u200b", "[PAD] [PAD]", "x\0y"])).all()
    crops = np.frombuffer(bytes(32 * 32 * 3), np.uint8).reshape(1, 32, 32, 3)  # read-only, as Arrow's memory is
    assert np.isfinite(model.embed_crops(crops)).all()
    for wrong in (crops[:, :31], crops.astype(np.float32)):
        with pytest.raises(ValueError, match="uint8"):
            model.embed_crops(wrong)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux's list of mapped files")
def test_float32_weights_are_mapped_and_not_copied(folder: Path):
    model = load_model(str(folder))
    lines = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(f"{folder}/model.safetensors")
    ]
    spans = [[int(part, 16) for part in line.split()[0].split("-")] for line in lines]
    for tower in (model.text_tower, model.image_tower):
        for parameter in tower.parameters():
            assert any(start <= parameter.data_ptr() < end for start, end in spans)


def test_threads_share_a_model(base: Path):
    model, images = load_model(str(base)), [canary.draw(name) for name in canary.IMAGES]
    alone = [model.prepare_image(image).crop for image in images], model.tokenize(TEXTS)
    with ThreadPoolExecutor(8) as threads:
        crops = list(threads.map(lambda index: model.prepare_image(images[index % 3]).crop, range(48)))
        tokens = list(threads.map(lambda _: model.tokenize(TEXTS), range(48)))
    assert all(np.array_equal(crop, alone[0][index % 3]) for index, crop in enumerate(crops))
    assert all(batch == alone[1] for batch in tokens)


def test_a_folder_without_canary_loads_with_one_warning(bare: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, logger="pipeline.model"):
        load_model(str(bare))
    assert ["--write-canary" in record.getMessage() for record in caplog.records] == [True]


def test_a_truncated_file(bare: Path):
    path = bare / "model.safetensors"
    whole = path.read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:keep])
        refused(bare, r"model\.safetensors is (truncated|no safetensors)")
    path.write_bytes(whole + b"\0")
    refused(bare, "longer than its header")


def test_a_renamed_key(bare: Path):
    key = "vision_model.blocks.1.norm1.weight"
    change_weights(bare, {key: None, "vision_model.blocks.1.norm9.weight": torch.ones(48)})
    refused(bare, r"1 missing: vision_model\.blocks\.1\.norm1\.weight; 1 unknown: vision_model\.blocks\.1\.norm9")


def test_a_wrong_shape(bare: Path):
    change_weights(bare, {"text_model.transformer.emb_ln.bias": torch.zeros(47)})
    refused(bare, r"1 misshapen: text_model\.transformer\.emb_ln\.bias \[47\] instead of \[48\]")


def test_a_pickle_under_another_name(bare: Path):
    torch.save(tensors(), bare / "model.safetensors")
    refused(bare, "is a pickle")
    (bare / "model.safetensors").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    refused(bare, "is a pickle")


def test_weights_that_are_not_numbers(bare: Path):
    change_weights(bare, {"text_model.transformer.emb_ln.bias": torch.full((48,), torch.nan)})
    with pytest.raises(ModelError, match=r"emb_ln\.bias holds NaN"):
        load_model(str(bare))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "bert"}, "model_type"),
        ({"add_projections": True}, "add_projections"),
        ({"projection_dim": 50}, "projection_dim"),
        ({"matryoshka_dimensions": [32, 64]}, "matryoshka"),
        ({"vision_config": TINY_IMAGE.to_config() | {"rope_embeddings": False}}, "rope_embeddings"),
        ({"text_config": {"hf_model_name_or_path": "jinaai/jina-embeddings-v3"}}, "hf_model_name_or_path"),
        ({"vision_config": None}, "vision_config"),
    ],
)
def test_an_unsupported_config(bare: Path, change: dict[str, object], match: str):
    (bare / "config.json").write_text(json.dumps(config() | change))
    refused(bare, match)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_missing_or_empty_file_is_named(bare: Path, file: str):
    (bare / file).write_bytes(b"")
    refused(bare, file.replace(".", r"\."))
    (bare / file).unlink()
    refused(bare, file.replace(".", r"\."))


def test_another_models_tokenizer(bare: Path, folder: Path):
    path = str(bare / "tokenizer.json")
    other = tokenizer()
    other.add_tokens([f"word{i}" for i in range(200)])
    other.save(path)
    refused(bare, "another model's tokenizer: its largest id")
    tokenizer(pad="[NOTHING]").save(path)
    refused(bare, "another model's tokenizer: it pads with")
    plain = tokenizer()
    plain.post_processor = None  # type: ignore[assignment]
    plain.save(path)
    refused(bare, "another model's tokenizer: it adds no start and end token")


def test_another_tokenizer_that_would_fit_is_known_by_its_digest(folder: Path):
    tokenizer(words=("green", "socks")).save(str(folder / "tokenizer.json"))
    refused(folder, r"tokenizer\.json is not the file that canary\.json records")


def test_one_flipped_bit(folder: Path):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    refused(folder, r"model\.safetensors is not the file that canary\.json records")


def test_one_flipped_bit_behind_the_back_of_the_clock(folder: Path):
    path = folder / "model.safetensors"
    describe_model(str(folder))
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    refused(folder, "is not the file that canary.json records")


def test_one_scaled_tensor_is_caught_by_the_digest_or_else_by_the_canary(folder: Path):
    key = "text_model.transformer.encoder.layers.1.mlp.wo.weight"
    change_weights(folder, {key: 1.01 * load_file(folder / "model.safetensors")[key]})
    refused(folder, r"model\.safetensors is not the file that canary\.json records")
    record_digests(folder)
    with pytest.raises(ModelError, match=r"does not compute the vectors .* is off by"):
        load_model(str(folder))
    with pytest.raises(ModelError, match="does not compute"):
        load_model(str(folder), dtype="float32", max_tokens=5, preprocessing="published")
    assert load_model(str(folder), check_canary=False).dim == 48


def test_stored_rope_tables_are_compared(bare: Path):
    cos, sin = rope_table(TINY_IMAGE)
    change_weights(bare, {"vision_model.rope.freqs_cos": cos, "vision_model.rope.freqs_sin": sin})
    assert load_model(str(bare)).dim == 48
    change_weights(bare, {"vision_model.rope.freqs_cos": cos.roll(1, 0)})
    refused(bare, "freqs_cos differs from the rotary table")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), claimed=st.integers(0, 400))
def test_headers_never_fail_in_another_way(tmp_path_factory: pytest.TempPathFactory, data: bytes, claimed: int):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", claimed) + data)
    with pytest.raises(ModelError):
        weights.read_header(path)


def test_digests_are_remembered_and_follow_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_SETTLED_S", -1.0)
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = weights.file_digest(path)
    memos = list((tmp_path / "cache" / "twotower" / "digests").iterdir())
    assert [memo.read_text() for memo in memos] == [first]
    memos[0].write_text("f" * 64)
    assert weights.file_digest(path) == "f" * 64
    path.write_bytes(b"two")
    assert weights.file_digest(path) not in (first, "f" * 64)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_SETTLED_S", -1.0)
    (tmp_path / "file").write_bytes(b"one")
    assert len(weights.file_digest(tmp_path / "file")) == 64


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ModelError, match="no model folder"):
        load_model(str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="pin a revision"):
        load_model("someone/some-model")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="give that folder as the model"):
        load_model("jinaai/jina-clip-v1")


def test_unknown_devices_and_options(base: Path):
    for options, match in (
        ({"device": "abacus"}, "device"),
        ({"device": "meta"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"preprocessing": "fancy"}, "preprocessing"),
    ):
        with pytest.raises(ModelError, match=match):
            load_model(str(base), **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no GPU"):
            load_model(str(base), device="cuda")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_towers_equal_plain_ones(base: Path):
    compiled, plain = load_model(str(base), compile=True), load_model(str(base))
    assert np.abs(compiled.embed_texts(TEXTS) - plain.embed_texts(TEXTS)).max() <= 1e-5


@pytest.mark.usefixtures("own_log")
def test_check_model_writes_a_canary_and_reports(bare: Path, capsys: pytest.CaptureFixture[str]):
    assert check_model.main([str(bare), "--write-canary", "--seconds", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["dim"], report["canary"]) == (48, "written")
    assert report["fingerprint"] == describe_model(str(bare)).fingerprint
    assert check_model.main([str(bare), "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert "canary       agrees" in out
    assert "'a crimson fruit' to 'a red apple'" in out
    (bare / "model.safetensors").write_bytes(b"")
    assert check_model.main([str(bare)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_importing_the_room_loads_nothing_heavy():
    heavy = "{'torch', 'PIL', 'transformers', 'tokenizers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys, pipeline.model; sys.exit(bool({heavy}))"], check=False)
    assert done.returncode == 0


DEMO = Path(canary.__file__).parent / "demo"


@pytest.mark.skipif(not (DEMO / "model.safetensors").is_file(), reason="the demo model is not in this checkout")
def test_the_demo_model_is_stopped_by_a_flipped_bit_and_by_a_scaled_tensor(tmp_path: Path):
    assert load_model("demo").card.has_canary
    copy = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    for place in (len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        refused(copy, r"model\.safetensors is not the file that canary\.json records")
    for key in ("text_model.transformer.encoder.layers.0.mlp.wo.weight", "vision_model.blocks.1.mlp.w3.weight"):
        path.write_bytes(whole)
        change_weights(copy, {key: 1.01 * load_file(path)[key]})
        refused(copy, r"model\.safetensors is not the file that canary\.json records")
        record_digests(copy)
        with pytest.raises(ModelError, match=r"does not compute the vectors .* is off by"):
            load_model(str(copy))
        shutil.copy(DEMO / "canary.json", copy)


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the fill rule is not beside this checkout")
def test_a_folder_of_the_published_shape(tmp_path: Path):
    sys.path.insert(0, str(REFERENCE))
    try:
        from fill_by_key import fill
    finally:
        sys.path.remove(str(REFERENCE))
    rows = (line.split("\t") for line in (REFERENCE / "keys_full.tsv").read_text().splitlines())
    shapes = {key: tuple(int(side) for side in shape.split(",") if side) for key, shape in rows}
    write_folder(tmp_path / "full", weights={key: torch.from_numpy(fill(key, shape)) for key, shape in shapes.items()})
    published = json.loads((REFERENCE / "configs.json").read_text())["full"]["clip"]
    (tmp_path / "full" / "config.json").write_text(json.dumps(published))
    (tmp_path / "full" / "preprocessor_config.json").write_text('{"size": 224}')
    canary.write(load_model(str(tmp_path / "full"), check_canary=False))
    model = load_model(str(tmp_path / "full"))
    assert model.dim == 768
    assert model.embed_texts(["red dress", "a blue coat"]).shape == (2, 768)
    assert model.embed_images([canary.draw("gradient")]).shape == (1, 768)
    for dtype in ("bfloat16", "float16"):
        half = load_model(str(tmp_path / "full"), dtype=dtype)
        cosines = (model.embed_texts(TEXTS) * half.embed_texts(TEXTS)).sum(axis=1)
        assert cosines.min() >= canary.MIN_COSINE[dtype]
