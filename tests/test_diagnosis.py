"""Where the time went: measured by a real embedder whose stages are slowed down, and by hand-made figures."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_catalog import items, write_products

from pipeline.catalog.partitions import open_catalog
from pipeline.config import Config, load_config
from pipeline.run.diagnosis import PARTS, Diagnosis, diagnose, shares_of
from pipeline.run.embed import Embedder, EmbedSettings
from pipeline.run.partition import PartitionResult, Work, stage_partition
from pipeline.run.plan import plan_rows
from pipeline.run.progress import STAGES, WAITS, Progress, stage_waits
from pipeline.run.schedule import Unit
from pipeline.run.usage import ActorUsage, Sample, Samples, Usage, rows_per_s

SECONDS = st.floats(0, 1e6, allow_nan=False)


def actor(
    busy: Mapping[str, float], waits: Mapping[str, float], *, held: float = 100.0, start: float = 0.0, **more: Any
) -> ActorUsage:
    """An actor that had a partition in hand all the time, if nothing else is said."""
    return ActorUsage(
        actor=more.get("number", 0), node="node", node_id="node", gpus=more.get("gpus", 1.0), node_cpus=4.0,
        decode_threads=4, held_s=held, start_s=start, working_s=more.get("working", held - start),
        seconds=dict.fromkeys(STAGES, 0.0) | dict(busy), waits=dict.fromkeys(WAITS, 0.0) | dict(waits), counts={},
    )  # fmt: skip


def usage(*actors: ActorUsage, fetch_threads: int = 0) -> Usage:
    return Usage(actors, len(actors), sum(a.gpus for a in actors), fetch_threads, 1.0, 100.0)


def said(busy: Mapping[str, float], waits: Mapping[str, float], *sets: str, **more: Any) -> Diagnosis:
    fetch_threads = more.pop("fetch_threads", 0)
    return diagnose(usage(actor(busy, waits, **more), fetch_threads=fetch_threads), load_config(None, sets))


def test_towers_that_wait_for_decoding() -> None:
    found = said({"towers": 35, "decode": 390, "read": 9, "fetch": 1}, {"decoded": 61, "batch": 2, "fetched": 91})
    assert found.bottleneck == "decode"
    assert found.towers_busy_share == pytest.approx(0.35)
    assert found.vcpus_per_gpu == 4
    assert found.share == pytest.approx(0.61)
    assert found.sentence.startswith("the towers waited 61% of the time for decoded images; decoding used 3.9 of 4 ")
    assert "4 vCPUs per GPU" in found.sentence
    for knob in ("pool.decode_threads", "images.jpeg_draft=true", "smaller images"):
        assert knob in found.sentence
    turned = said({"towers": 35, "decode": 390}, {"decoded": 60}, "images.jpeg_draft=true")
    assert "jpeg_draft" not in turned.sentence, "a setting that is turned is not named"
    beside = said({"towers": 35, "decode": 100}, {"decoded": 60}, gpus=0.0)
    assert "more cores" in beside.sentence, "threads are shared with the towers"
    assert "decode_threads" not in beside.sentence


def test_decode_threads_that_are_not_fed() -> None:
    found = said({"towers": 35, "decode": 60}, {"decoded": 60})
    assert found.bottleneck == "decode"
    assert "used 0.6 of 4 threads" in found.sentence
    assert "catalog.partition_bytes" in found.sentence


def test_towers_that_are_busy() -> None:
    found = said({"towers": 94}, {"decoded": 3})
    assert (found.bottleneck, found.sentence) == (
        "towers",
        "the towers were busy 94% of the time: that is the GPU's own speed; model.dtype=bfloat16 (other vectors: all "
        "is embedded anew), model.compile=true or more GPUs (pool.actors) would help",
    )
    turned = said({"towers": 94}, {}, "model.dtype=bfloat16", "model.compile=true")
    assert turned.sentence.endswith("more GPUs (pool.actors) would help")
    assert "dtype" not in turned.sentence
    assert "CPU's own speed" in said({"towers": 94}, {}, gpus=0.0).sentence
    assert said({"towers": 94}, {}, gpus=0.0).vcpus_per_gpu is None


def test_towers_that_are_half_busy_name_what_comes_next() -> None:
    found = said({"towers": 55, "decode": 380}, {"decoded": 40})
    assert found.bottleneck == "towers"
    assert "; after that the towers waited 40% of the time for decoded images" in found.sentence


@pytest.mark.parametrize(
    ("busy", "waits", "more", "bottleneck", "words"),
    [
        ({"towers": 20, "fetch": 1500, "read": 5}, {"batch": 70, "fetched": 95}, {"fetch_threads": 16}, "fetch",
         "fetching used 15.0 of 16 threads of each actor: fetch.threads over 16 or workers nearer"),
        ({"towers": 20, "fetch": 90, "read": 5}, {"batch": 70, "fetched": 95}, {}, "fetch", "pool.decode_threads"),
        ({"towers": 20, "read": 98}, {"batch": 70, "fetched": 2}, {"fetch_threads": 16}, "read", "rows of the catalog"),
        ({"towers": 20, "write": 60}, {}, {}, "write", "staging.path"),
        ({"towers": 20, "tokenise": 60}, {}, {}, "tokenise", "model.max_tokens"),
        ({"towers": 20}, {}, {}, "other", "pool.gpus_per_actor=0.5"),
        ({"towers": 20}, {}, {"working": 21.0}, "idle", "catalog.partition_bytes"),
        ({"towers": 9}, {}, {"held": 100.0, "start": 90.0}, "start", "starting the actors took 90% of the time"),
    ],
)  # fmt: skip
def test_other_bottlenecks(
    busy: dict[str, float], waits: dict[str, float], more: dict[str, Any], bottleneck: str, words: str
) -> None:
    found = said(busy, waits, **more)
    assert found.bottleneck == bottleneck
    assert words in found.sentence


def test_requests_to_one_host_are_named_where_there_are_hosts() -> None:
    sets = ("fetch.http=true", "fetch.allow_hosts=['img.shop.example']")
    busy, waits = {"towers": 20, "fetch": 700}, {"batch": 70, "fetched": 95}
    assert "fetch.per_host over 8" in said(busy, waits, *sets, fetch_threads=16).sentence


def test_without_actors_nothing_is_said_of_them() -> None:
    found = diagnose(Usage(), Config())
    assert (found.bottleneck, found.share, found.vcpus_per_gpu) == ("none", 0.0, None)
    assert found.sentence == "no actor embedded anything: nothing had to be embedded"


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[SECONDS] * len(STAGES)), min_size=1, max_size=3),
    st.tuples(*[SECONDS] * len(WAITS)),
    st.tuples(SECONDS, SECONDS, SECONDS),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_every_diagnosis_is_a_sentence_with_settings_that_exist(
    stages: list[tuple[float, ...]],
    waits: tuple[float, ...],
    times: tuple[float, float, float],
    gpus: float,
    has_fetch_threads: bool,
    is_turned: bool,
) -> None:
    start, working, idle = times
    actors = [
        actor(dict(zip(STAGES, busy, strict=True)), dict(zip(WAITS, waits, strict=True)), gpus=gpus, start=start,
              held=start + working + idle, working=working, number=number)
        for number, busy in enumerate(stages)
    ]  # fmt: skip
    turned = ("model.dtype=bfloat16", "model.compile=true", "images.jpeg_draft=true", "columns.carried=['price']",
              "fetch.http=true", "fetch.allow_hosts=['img.shop.example']")  # fmt: skip
    config = load_config(None, turned if is_turned else ())
    found = diagnose(usage(*actors, fetch_threads=16 * has_fetch_threads), config)
    assert set(found.shares) == set(PARTS)
    assert all(0 <= share <= 1 for share in found.shares.values())
    assert sum(found.shares.values()) == pytest.approx(1) or found.bottleneck == "none"
    assert 0 <= found.share <= 1
    assert found.towers_busy_share == found.shares["towers"]
    if found.bottleneck in PARTS:
        assert found.share == max(found.shares.values())
    assert "\n" not in found.sentence
    assert not found.sentence.endswith(".")
    names = re.findall(r"\b([a-z_]+)\.([a-z_]+)\b", found.sentence)
    assert names or found.bottleneck in ("none", "towers")
    for section, key in names:
        assert hasattr(getattr(config, section), key), (section, key)


@settings(deadline=None)
@given(st.tuples(*[st.floats(0.1, 1e3)] * len(STAGES)), st.tuples(*[st.floats(0.1, 1e3)] * len(WAITS)))
def test_shares_do_not_depend_on_how_long_a_run_is(busy: tuple[float, ...], waits: tuple[float, ...]) -> None:
    def of(factor: float) -> dict[str, float]:
        one = actor(
            {stage: factor * spent for stage, spent in zip(STAGES, busy, strict=True)},
            {cause: factor * waited for cause, waited in zip(WAITS, waits, strict=True)},
            held=factor * 100.0,
        )
        return shares_of(usage(one))

    assert of(7.0) == pytest.approx(of(1.0))


def test_pools_after_each_other_are_numbered_on() -> None:
    first = usage(actor({"towers": 1}, {}), actor({"towers": 2}, {}, number=1))
    both = first.joined(usage(actor({"towers": 4}, {})))
    assert [a.actor for a in both.actors] == [0, 1, 2]
    assert (both.seconds["towers"], both.start_s, both.embedding_s, both.at_once) == (7, 2.0, 200.0, 1)
    assert Usage().joined(first) == first


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 50), st.integers(0, 1000)), min_size=1, max_size=1500))
def test_samples_are_bounded_in_order_and_end_with_the_last(steps: list[tuple[float, int]]) -> None:
    samples, at, progress = Samples(), 0.0, Progress()
    for seconds, rows in steps:
        at += seconds
        progress.rows += rows
        samples.add(at, progress)
        assert len(samples.kept) < 300
    series = samples.series()
    assert [sample.seconds for sample in series] == sorted({sample.seconds for sample in series})
    assert (series[-1].seconds, series[-1].rows) == (at, progress.rows)
    rates = rows_per_s(series)
    assert len(rates) <= 60
    assert all(rate >= 0 for _, rate in rates)
    if rates:
        each = (series[-1].seconds - series[0].seconds) / len(rates)
        assert sum(rate * each for _, rate in rates) == pytest.approx(series[-1].rows - series[0].rows, abs=1e-3)


def test_samples_go_on_with_another_pool() -> None:
    samples = Samples()
    samples.add(1.0, Progress(rows=100, embedded=90))
    samples.add(2.0, Progress(rows=10, embedded=5))
    samples.add(3.0, Progress(rows=30, embedded=20))
    assert [sample.rows for sample in samples.series()] == [100, 110, 130]
    assert samples.series()[-1] == Sample(3.0, 130, 0, 110, 0)


def test_rows_that_are_told_in_lumps_give_an_even_rate() -> None:
    series = [Sample(0.5 * at, 100 * (at // 4), 0, 0, 0) for at in range(61)]
    series.append(Sample(30.001, 1550, 0, 0, 0))  # the last moment comes right after the one before
    rates = rows_per_s(series)
    assert len(rates) == 10
    assert all(30 <= rate <= 90 for _, rate in rates)
    assert rows_per_s(series[:4]) == rows_per_s([]) == []


@pytest.fixture(scope="module")
def lanes_s() -> list[float]:
    """What towers took of the threads that decode, in the last call of `staged`."""
    return []


@pytest.fixture(scope="module")
def staged(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, lanes_s: list[float]
) -> Callable[..., PartitionResult]:
    """Stages a small partition with an embedder of which some calls are slowed down."""
    folder = tmp_path_factory.mktemp("slow")
    catalog = open_catalog(
        str(write_products(folder / "catalog", [items(24, images=2)])), Config().catalog, Config().columns
    )
    (partition,) = catalog.partitions
    plan = plan_rows(catalog)
    embedder = Embedder(EmbedSettings(tiny_model, decode_threads=2), catalog.root)

    def stage(patch: pytest.MonkeyPatch, slow: Mapping[str, float]) -> PartitionResult:
        places = {"decode": "prepare_image", "towers": "_run", "tokenise": "tokenize"}
        for name, seconds in slow.items():
            owner: Any = embedder._loads._loader._fetcher if name == "fetch" else embedder.model
            patch.setattr(owner, places.get(name, "fetch"), slowed(getattr(owner, places.get(name, "fetch")), seconds))
        unit = replace(Unit(partition.name, 0, 24), batch_rows=4)
        work = Work(partition, plan.rows_of(partition.name), unit, str(folder / f"{time.monotonic_ns()}.parquet"))
        result = stage_partition(embedder, catalog, work)
        lanes_s[:] = [embedder.lanes_s]
        return result

    with pytest.MonkeyPatch.context() as patch:
        stage(patch, {})  # the first call of a tower takes long
    return stage


def slowed(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **kwargs)

    return slow


@pytest.mark.parametrize(("stage", "seconds"), [("decode", 0.2), ("towers", 0.2), ("tokenise", 0.4)])
def test_the_slow_stage_of_a_real_partition_is_found(
    staged: Callable[..., PartitionResult],
    lanes_s: list[float],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    seconds: float,
) -> None:
    result = staged(monkeypatch, {stage: seconds})
    alone = ActorUsage(
        0, "", "", 1.0, 4.0, 2, result.wall_s, 0.0, result.wall_s, result.seconds, result.waits, result.counts
    )
    found = diagnose(usage(alone), Config())
    assert found.bottleneck == stage, found
    assert found.share > 0.4
    # The towers' thread is accounted for, and nothing is counted twice.
    told = result.seconds["towers"] + result.seconds["tokenise"] + result.seconds["write"]
    told += stage_waits(result.waits)["towers"]
    assert 0.7 * result.wall_s < told <= result.wall_s * 1.01
    threads = result.seconds["decode"] + result.seconds["fetch"] + result.waits["decode_idle"]
    assert threads + lanes_s[0] == pytest.approx(2 * result.wall_s, rel=0.02)


def test_counts_and_reasons_of_a_partition(
    staged: Callable[..., PartitionResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = staged(monkeypatch, {})
    assert (result.counts["texts"], result.counts["images"], result.counts["rows"]) == (24, 48, 24)
    assert set(result.waits) == set(WAITS)
    assert min(result.waits.values()) >= 0
    assert "ready_batches" not in result.counts
