"""The report: what got slower, the page whatever stands in it, its files, and a run that writes all of them."""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_catalog import Item, items, table, write_products

from jobs import status
from jobs.backfill import summary
from pipeline.config import load_config
from pipeline.errors import RunError
from pipeline.run.compare import earlier_reports, sentence, slower
from pipeline.run.diagnosis import PARTS
from pipeline.run.metrics import METRICS
from pipeline.run.progress import STAGES, Progress
from pipeline.run.report import Run, settings
from pipeline.run.report_files import page_path, write_report
from pipeline.run.report_page import page
from pipeline.run.usage import Sample
from pipeline.shown import redacted, redacted_tree
from pipeline.store.releases import newest_release, now
from pipeline.store.tables import Database

NASTY = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>\u202e{policy}"
SERIES = [Sample(float(at), 100 * at, 300 * at, 290 * at, at) for at in range(1, 40)]


def told(**more: Any) -> dict[str, Any]:
    """A run's report as `report` makes it."""
    actors = [{"actor": 0, "node": "node-1", "gpus": 1.0, "held_s": 50.0, "start_s": 5.0, "working_s": 44.0,
               "embedded": 9000, "towers_busy_share": 0.4}]  # fmt: skip
    result: dict[str, Any] = {
        "run_id": "abc", "job": "backfill", "status": "released", "error": None, "started_at": "2026-11-23 01:00:00",
        "seconds": 60.0, "release": 2, "released": True, "db": "/db", "catalog": "/catalog", "model": "demo",
        "inputs": 10_000, "texts": 4000, "images": 6000, "embedded": 9000, "reused": 900, "rejected": 100,
        "rejected_rows": 3, "deleted": 0, "truncated_texts": 5, "changes": {}, "reasons": {"image_null": 100},
        "before": {"products": 3000, "images": 5000, "rejects": 50},
        "after": {"products": 4000, "images": 5900, "rejects": 100},
        "run_seconds": {"plan": 1.0, "ray": 4.0, "embed": 50.0, "reduce": 2.0, "release": 2.0},
        "stage_seconds": dict.fromkeys(STAGES, 10.0), "stage_wait_seconds": dict.fromkeys(STAGES, 5.0),
        "rates": {"embedded_per_s": 200.0, "overhead_s": 15.0, "actors": 1, "gpus": 1.0},
        "usage": {"start_s": 5.0, "embedding_s": 45.0, "inputs": 10_000, "embedded": 9000, "actors": actors},
        "cost": {"actor_seconds": 50.0, "gpu_seconds": 50.0, "gpu_hours": 0.0139},
        "diagnosis": {"sentence": "the towers waited", "bottleneck": "decode", "vcpus_per_gpu": 4.0,
                      "shares": {"towers": 0.4, "decode": 0.6, "fetch": 0.0, "read": 0.0, "tokenise": 0.0,
                                 "write": 0.0, "idle": 0.0, "other": 0.0}},
        "slower": [], "slower_sentence": None, "settings": {"pool.actors": "2"},
    }  # fmt: skip
    return result | more


def test_nothing_got_slower_beside_nothing_or_the_same() -> None:
    assert slower(told(), []) == []
    assert slower(told(), [told()] * 5) == []
    assert sentence([], 5) is None


def test_what_got_slower_is_named_with_its_ratio() -> None:
    now = told(stage_seconds=dict.fromkeys(STAGES, 10.0) | {"decode": 50.0, "towers": 14.0, "write": 12.0})
    found = slower(now, [told()] * 5)
    assert [(item.what, item.ratio, item.seconds) for item in found] == [("decode", 5.0, 40.0), ("towers", 1.4, 4.0)]
    assert (found[0].now, found[0].before) == (5.556, 1.111)
    assert sentence(found, 5) == (
        "decode took 5 times as long as in the median of the 5 runs before (5.56 instead of 1.11 s per 1,000 embedded "
        "inputs, 40.0 s in all); slower too: towers (1.4 times)"
    )


def test_what_costs_too_little_to_matter_is_not_named() -> None:
    fast = dict.fromkeys(STAGES, 0.1)
    assert slower(told(stage_seconds=fast | {"write": 1.9}), [told(stage_seconds=fast)]) == []
    hours = told(seconds=36_000.0, stage_seconds=dict.fromkeys(STAGES, 10.0) | {"read": 60.0})
    assert slower(hours, [told()]) == [], "50 s of ten hours"


def test_a_larger_run_is_not_a_slower_one() -> None:
    large = told(
        stage_seconds=dict.fromkeys(STAGES, 100.0), inputs=100_000, after={"products": 40_000},
        run_seconds={"plan": 10.0, "reduce": 20.0, "release": 20.0},
        usage={"start_s": 5.0, "inputs": 100_000, "embedded": 90_000, "actors": [1]},
    )  # fmt: skip
    assert slower(large, [told()]) == []


def test_the_median_of_earlier_runs_counts_and_odd_ones_do_not() -> None:
    odd = told(stage_seconds=dict.fromkeys(STAGES, 0.001))
    assert slower(told(), [told(), odd, told()]) == []
    started = slower(told(usage=told()["usage"] | {"start_s": 60.0}), [told()])
    assert [(item.what, item.unit, item.ratio) for item in started] == [("starting the actors", "s", 12.0)]
    nothing = told(usage={"start_s": 0.0, "inputs": 0, "embedded": 0, "actors": []}, after=None, inputs=0)
    assert slower(nothing, [told()]) == []
    assert slower(told(), [nothing]) == []


class Checked(HTMLParser):
    """Sees that tags are closed in order, and collects what a page holds."""

    VOID = ("meta", "rect", "line", "polyline", "polygon")

    def __init__(self, written: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(written)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_a_page_has_its_sections_tables_and_descriptions() -> None:
    slow = {"what": "decode", "unit": "s per 1,000 embedded inputs", "now": 5.0, "before": 1.0, "ratio": 5.0,
            "seconds": 40.0}  # fmt: skip
    report = told(slower=[slow], slower_sentence="decode took 5 times as long", changes={"to embed": 9000})
    seen = Checked(page(report, SERIES))
    headings = [attributes.get("id") for tag, attributes in seen.tags if tag == "h2"]
    assert headings == [
        "what-happened", "what-changed", "where-the-actors-time-went", "time-by-stage", "gpu-busy-share",
        "rows-a-second", "the-runs-time", "rejects-by-reason", "what-got-slower", "what-it-cost", "settings",
    ]  # fmt: skip
    labels = [attributes["aria-labelledby"] for tag, attributes in seen.tags if tag == "section"]
    assert labels == headings
    tables = sum(tag == "table" for tag, _ in seen.tags)
    assert tables == sum(tag == "caption" for tag, _ in seen.tags) >= 10
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in seen.tags if tag == "th")
    for tag, attributes in seen.tags:
        assert tag not in ("script", "img", "link", "iframe", "form")
        assert not any(name.startswith("on") or name in ("style", "src", "href") for name in attributes)
        assert tag != "svg" or "aria-hidden" in attributes or attributes["aria-label"]
    (chart,) = (a["aria-label"] for t, a in seen.tags if t == "svg" and a.get("role") == "img")
    assert chart == "Rows a second over 38 seconds: 100.0 on average, 100.0 in the best 3.2 seconds"
    words = " ".join(seen.words)
    for said in ("the towers waited.", "decode took 5 times as long.", "+1,000", "4 vCPUs per GPU", "0.0139"):
        assert said in words
    assert "default-src 'none'" in next(a["content"] or "" for t, a in seen.tags if "http-equiv" in a)


def test_a_page_escapes_whatever_stands_in_it() -> None:
    nasty = told(
        error=NASTY, catalog=NASTY, db=NASTY, model=NASTY, job=NASTY, status=NASTY, started_at=NASTY,
        reasons={NASTY: 3}, changes={NASTY: 4}, run_seconds={NASTY: 1.0}, settings={NASTY: NASTY},
        slower_sentence=NASTY, diagnosis=told()["diagnosis"] | {"sentence": NASTY},
        slower=[{"what": NASTY, "unit": NASTY, "now": 5.0, "before": 1.0, "ratio": 5.0, "seconds": 40.0}],
        usage=told()["usage"] | {"actors": [told()["usage"]["actors"][0] | {"node": NASTY}]},
    )  # fmt: skip
    written = page(nasty, SERIES)
    seen = Checked(written)
    assert not any(tag in ("script", "img") for tag, _ in seen.tags)
    assert "<script" not in written
    assert "\u202e" not in written
    assert "\\u202e{policy}" in written


def test_a_page_of_a_run_that_did_nothing() -> None:
    nothing = told(
        before=None, after=None, release=None, released=False, status="failed", error="it broke", reasons={},
        run_seconds={}, usage=told()["usage"] | {"actors": []}, stage_seconds=dict.fromkeys(STAGES, 0.0),
        stage_wait_seconds=dict.fromkeys(STAGES, 0.0), settings={},
        diagnosis={"sentence": "no actor", "vcpus_per_gpu": None, "shares": dict.fromkeys(PARTS, 0.0)},
    )  # fmt: skip
    words = " ".join(Checked(page(nothing, [])).words)
    for said in ("it broke", "none, as before", "No actor was started.", "too short to draw", "Nothing was rejected."):
        assert said in words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:se/cret@bucket/x", "s3://key:se/cret@bucket/x"),  # no user part: the slash ends the host
        ("s3://AKIA:secret@bucket/a@b.parquet", "s3://…@bucket/a@b.parquet"),
        ("s3://bucket/x?access_key=A&secret_key=B&region=eu", "s3://bucket/x?access_key=…&secret_key=…&region=eu"),
        ("cannot read 's3://a:b@c/d': gone", "cannot read 's3://…@c/d': gone"),
        ("https://img.example/a.jpg?X-Amz-Signature=ab#x", "https://img.example/a.jpg?X-Amz-Signature=…#x"),
        ("/local/path?x=y user@host", "/local/path?x=y user@host"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted_tree({"a": [text, 1, None]}) == {"a": [shown, 1, None]}


@hypothesis_settings(deadline=None)
@given(st.text("xyz0189", min_size=8, max_size=12), st.text("abc/?&=.-", max_size=10))
def test_no_password_of_a_uri_survives(password: str, rest: str) -> None:
    assert password not in redacted(f"see s3://user:{password}@bucket/{rest} and s3://b/x?secret_key={password}")


def test_settings_that_differ() -> None:
    config = load_config(None, ["pool.actors=2", "columns.carried=['price']"], catalog_uri="c", db="d", model_name="m")
    assert settings(config) == {
        "catalog_uri": "c", "db": "d", "model_name": "m", "columns.carried": "['price']", "pool.actors": "2",
    }  # fmt: skip


def test_the_newest_fifty_pages_are_kept_and_a_failure_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    db = Database(str(tmp_path / "db"))
    with_secret = told(catalog="s3://key:secret@bucket/x")
    for number in range(53):
        assert write_report(db, with_secret | {"run_id": f"run{number}"}, SERIES)
    files = {path.name for path in (tmp_path / "db" / "_reports").iterdir()}
    assert files == {f"run{number}.{suffix}" for number in range(3, 53) for suffix in ("html", "json")}
    written = json.loads((tmp_path / "db" / "_reports" / "run52.json").read_text())
    assert written["samples"][0] == {"seconds": 1.0, "rows": 100, "inputs": 300, "embedded": 290, "rejected": 1}
    assert "secret" not in (tmp_path / "db" / "_reports" / "run52.json").read_text()
    assert "secret" not in Path(page_path(db, "run52")).read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "_reports").write_text("a file")
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert not write_report(Database(str(tmp_path / "other")), told(), SERIES)
        assert not write_report(db, {"run_id": "odd"}, SERIES), "nor does a report that cannot be drawn end a run"
    assert len([record for record in caplog.records if "could not be written" in record.message]) == 2


@pytest.fixture(scope="module")
def ran(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: str, ray_session: None
) -> tuple[Path, list[dict[str, Any]]]:
    """A database with two runs, of two actors and of one, and a run that failed."""
    from pipeline.model import describe_model
    from pipeline.run.backfill import backfill, recorded

    folder = tmp_path_factory.mktemp("ran")
    products = items(12)
    write_products(folder / "catalog", [products[:5], [*products[5:], Item("bad", "half", None, [b"no image"])]])

    given = {"catalog_uri": str(folder / "catalog"), "db": str(folder / "db"), "model_name": tiny_model}

    def run(*sets: str) -> dict[str, Any]:
        return backfill(load_config(None, ["pool.gpus_per_actor=0.5", "max_reject_share=0.2", *sets], **given))

    reports = [run()]
    products[3].title = "<script>alert(1)</script>"
    write_products(folder / "catalog", [products[:5], [*products[5:], Item("bad", "half", None, [b"no image"])]])
    reports.append(run("pool.actors=1"))
    db = Database(given["db"])
    failing = Run(load_config(None, [], **given), "backfill", "failing", now(), describe_model(tiny_model))
    failing.base = newest_release(db)
    with pytest.raises(RunError, match="it broke"), recorded(db, failing):
        raise RunError("it broke")
    return folder / "db", reports


@pytest.mark.ray
def test_a_run_reports_its_time_cost_and_counts(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    db, (first, second) = ran
    assert first["before"] is None
    assert first["after"] == second["before"] == {"products": 13, "images": 24, "rejects": 1}
    assert (first["status"], first["rejected"], second["embedded"]) == ("released", 1, 1)
    for report in (first, second):
        assert set(report["stage_seconds"]) == set(report["stage_wait_seconds"]) == set(STAGES)
        actors = report["usage"]["actors"]
        assert len(actors) == report["rates"]["actors"] == 2 * report["rates"]["gpus"] == (2 if report is first else 1)
        for actor in actors:
            assert 0 < actor["start_s"] <= actor["held_s"]
            assert actor["working_s"] <= actor["held_s"] - actor["start_s"] + 0.05
        assert report["cost"]["gpu_seconds"] == pytest.approx(report["cost"]["actor_seconds"] / 2, abs=0.01)
        assert report["diagnosis"]["vcpus_per_gpu"] == (2.0 if report is first else 4.0)
        rates = report["rates"]
        told_s = rates["overhead_s"] + report["embedded"] / rates["embedded_per_s"]
        assert told_s == pytest.approx(report["seconds"], rel=0.02), "the estimate of the same run is the run"
        assert sum(report["diagnosis"]["shares"].values()) == pytest.approx(1, abs=0.01)
        assert f"bottleneck {report['diagnosis']['sentence']}" in summary(report)
        assert f"report     {report['report']}" in summary(report)
        assert report["report"] == str(db / "_reports" / f"{report['run_id']}.html")
        Checked(Path(report["report"]).read_text())
    assert first["usage"]["embedded"] == first["embedded"]


@pytest.mark.ray
def test_the_row_and_the_files_say_the_same(
    ran: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    db, reports = ran
    rows = {row["run_id"]: row for row in table(db, "runs").to_pylist()}
    (failed,) = (row for row in rows.values() if row["status"] == "failed")
    assert json.loads(failed["report"])["error"] == "it broke"
    assert (db / "_reports" / f"{failed['run_id']}.html").exists(), "a run that failed has its page too"
    for report in reports:
        stored = json.loads(rows[report["run_id"]]["report"])
        written = json.loads((db / "_reports" / f"{report['run_id']}.json").read_text())
        for name in ("diagnosis", "stage_seconds", "before", "after", "slower", "usage", "report"):
            assert stored[name] == written[name] == json.loads(json.dumps(report[name])), name
        assert written["samples"][-1]["rows"] == (13 if report is reports[0] else report["embedded"])
        assert json.loads(rows[report["run_id"]]["rates"])["embedded_per_s"] == report["rates"]["embedded_per_s"]
    earlier = earlier_reports(Database(str(db)), "backfill", reports[0]["fingerprint"])
    assert [report["run_id"] for report in earlier] == [reports[1]["run_id"], reports[0]["run_id"]]
    assert status.main(["--db", str(db), "--run", reports[1]["run_id"]]) == 0
    said = capsys.readouterr().out
    assert reports[1]["diagnosis"]["sentence"] in said
    assert reports[1]["report"] in said
    assert status.main(["--db", str(db), "--run", "none"]) == 2
    assert "there is no run 'none'" in capsys.readouterr().err


def test_metrics_are_named_once_with_units_and_known_tags() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("twotower_")
        assert metric.kind in ("counter", "gauge")
        assert metric.exported.endswith("_total") == (metric.kind == "counter")
        assert metric.description
        assert set(metric.tags) <= {"actor", "outcome", "reason", "stage"}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_real_ray_exports_the_metrics() -> None:
    """Ten seconds: Ray's processes send theirs that often."""
    import ray

    from pipeline.run.metrics import ActorMetrics, RunMetrics

    class Teller:
        def __init__(self) -> None:
            self.metrics = ActorMetrics("teller")

        def tell(self, progress: Progress) -> bool:
            self.metrics.update(progress)
            return True

    progress = Progress(embedded=3, reused=2, rejected=1, ready_batches=2)
    progress.reasons["image_null"] = 1
    progress.seconds["towers"] = 1.5
    progress.waits["batch"] = 0.5
    actor = ray.remote(Teller).options(num_cpus=0).remote()
    for embedded in (3, 5):
        progress.embedded = embedded
        assert ray.get(actor.tell.remote(progress))
    driver = RunMetrics()
    driver.update(1, 4)
    driver.reject("worker_crashed")
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {
        ("ray_twotower_inputs_total", "outcome", "embedded"): 5,
        ("ray_twotower_inputs_total", "outcome", "reused"): 2,
        ("ray_twotower_rejects_total", "reason", "image_null"): 1,
        ("ray_twotower_stage_seconds_total", "stage", "towers"): 1.5,
        ("ray_twotower_stage_wait_seconds_total", "stage", "towers"): 0.5,
        ("ray_twotower_queue_depth", "actor", "teller"): 2,
        ("ray_twotower_partitions_pending", "", ""): 3,
        ("ray_twotower_partitions_done", "", ""): 1,
    }
    deadline = time.monotonic() + 60
    found: Mapping[tuple[str, str, str], float] = {}
    while found != wanted and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = urllib.request.urlopen(address, timeout=10).read().decode().splitlines()
        found = {key: value for key in wanted for value in _values(lines, *key)}
    assert found == wanted
    assert {name for name, _, _ in wanted} == {metric.exported for metric in METRICS}
    ray.kill(actor)


def _values(lines: list[str], name: str, tag: str, value: str) -> list[float]:
    """The value of a sample of the test's own actor, or of the driver."""
    is_ours = [f'{tag}="{value}"' if tag else "", "" if "partitions" in name else 'actor="teller"']
    hits = [line for line in lines if line.startswith(name + "{") and all(part in line for part in is_ours)]
    return [float(hits[-1].rsplit(" ", 1)[1])] if hits else []
