"""What an evaluation shows: the table, the plots, the page in a real browser, and the files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import OVERFLOWING, UNREADABLE, Watched, browsing, tab
from query_tables import jpeg

from pipeline.errors import RunError
from pipeline.evaluate.files import figures_of, times_of, write_report
from pipeline.evaluate.page import page
from pipeline.evaluate.plots import described, plots
from pipeline.evaluate.results import (
    CUTOFFS,
    PUBLISHED,
    CategoryFigure,
    Comparison,
    DiversityFigure,
    Evaluation,
    Example,
    Figure,
    Interval,
)  # fmt: skip
from pipeline.evaluate.summary import sentences
from pipeline.evaluate.table import lines
from pipeline.records import Hit

MODES = ("text", "image", "avg")
THUMBNAILS = {"p1": jpeg((200, 10, 10)), "p2": jpeg((10, 10, 200))}
QUERIES = pa.table({"query_id": ["q1"], "text": ["red dress"]})


def spread(mean: float) -> Interval:
    return Interval(mean, mean - 0.01, mean + 0.01)


def figure(level: str, mode: str, measure: str, k: int, index: float | None) -> Figure:
    mean = {"text": 0.7, "image": 0.6, "avg": 0.8}[mode] - k / 1000
    return Figure(level, mode, measure, k, spread(mean), mean - 0.05, 0.95, 0.05, index)


def made(*, levels: tuple[str, ...] = ("broad", "fine"), index: bool = False, **more: Any) -> Evaluation:
    figures = [
        figure(level, mode, measure, k, 0.77 if index else None)
        for level in levels
        for mode in MODES
        for measure in ("precision", "recall", "ndcg", "mrr")
        for k in (CUTOFFS if measure != "mrr" else CUTOFFS[-1:])
    ]
    compared = [
        Comparison(level, k, "avg", other, spread(difference), p, p)
        for level in levels
        for k in CUTOFFS
        for other, difference, p in (("text", 0.1, 0.001), ("image", -0.2, 0.6))
    ]
    orders = [
        DiversityFigure(
            method, spread(0.3), spread(0.9), spread(1.5), spread(2.0), spread(3.0), dict.fromkeys(levels, spread(0.7)),
            dict.fromkeys(levels, spread(0.99)), None if method in ("text", "avg") else 1.25,
        )
        for method in ("text", "avg", "kmeans-3", "kmeans-5", "kmeans-8", "mmr")
    ]  # fmt: skip
    hits = [Hit("p1", 0.9, 1, {"title": "Red dress"}), Hit("p2", 0.8, 2, {"title": "Blue dress"}, 1)]
    values: dict[str, Any] = {
        "facts": {"release": "3", "queries": "1,000"}, "notes": ["Of 5 no other text holds all the words."],
        "figures": figures, "comparisons": compared, "diversity": orders,
        "categories": [CategoryFigure(level, "gowns", 9, 80, dict.fromkeys(MODES, 0.1)) for level in levels],
        "examples": [Example("red dress", "dresses", [("query to description", hits)], frozenset({"p1"}))],
        "seconds": {"exact search": 1.5},
    }  # fmt: skip
    return Evaluation(**{**values, **more})


def test_the_table_has_every_number_once_and_the_headline_first():
    told = lines(made())
    assert told.startswith("By broad category, precision@10: average 0.7900, description 0.6900, image 0.5900.")
    for text in ("0.680 to 0.700", "fine recall@100", "gowns", "k-means, 5 clusters", "1.2", "exact search 1.5",
                 "broad @10: average - description", "+0.1000"):  # fmt: skip
        assert text in told, text
    assert "index" not in told
    assert "article" not in told
    assert max(map(len, told.splitlines())) <= 120


def test_the_headline_says_what_is_sure_and_what_is_not():
    by_level, _, diversity = sentences(made())
    assert "beats description by 0.1000 (95% +0.0900 to +0.1100)" in by_level
    assert "cannot be told from image (-0.2000, p = 0.60)" in by_level
    assert "99.0% (broad) and 99.0% (fine) is kept" in diversity
    assert len(sentences(made(diversity=[]))) == 2


def test_index_and_article_are_columns_where_they_are_there():
    told = lines(made(index=True, is_fashion200k=True))
    assert "0.7700" in told
    for (level, mode, k), value in PUBLISHED.items():
        assert f"{value:.4f}" in told, (level, mode, k)
    assert "0.9026" not in lines(made(index=True))


@pytest.mark.parametrize("levels", [("broad",), ("judged",), ("broad", "fine", "judged")])
def test_any_levels_are_told_drawn_and_shown(levels):
    evaluation = made(levels=levels, is_fashion200k=True)
    assert f"{levels[-1]} precision" in lines(evaluation)
    drawn = plots(evaluation)
    assert set(drawn) == {f"{kind}-{level}" for kind in ("precision", "diversity") for level in levels}
    assert set(described(evaluation)) == set(drawn)
    assert page(evaluation, drawn, described(evaluation), {}).count('class="plot"') == len(drawn)


def test_an_evaluation_of_little_is_shown():
    bare = made(levels=("broad",), comparisons=[], categories=[], diversity=[], examples=[], notes=[], facts={})
    assert "broad precision" in lines(bare)
    assert set(plots(bare)) == {"precision-broad"}
    assert "Precision, broad" in page(bare, plots(bare), described(bare), {})
    no_kinds = dataclasses.replace(made().diversity[0], fine_categories=None)
    assert "-" in lines(made(diversity=[no_kinds, *made().diversity[1:]]))


def test_plots_are_svg_of_the_same_bytes_and_hold_no_date():
    first, second = plots(made(is_fashion200k=True)), plots(made(is_fashion200k=True))
    assert first == second
    for svg in first.values():
        ElementTree.fromstring(svg)
        assert "date" not in svg.lower().replace("update", "")
    assert plots(made())["precision-fine"] != first["precision-fine"]  # the article's points


def test_an_interval_without_width_is_drawn():
    flat = Interval(0.1 + 0.2, 0.3, 0.3)  # rounding puts the mean beyond its bounds
    orders = [
        dataclasses.replace(o, distance=flat, precision=dict.fromkeys(o.precision, flat)) for o in made().diversity
    ]
    assert "diversity-fine" in plots(made(diversity=orders))


def test_what_a_plot_shows_is_said_in_words():
    said = described(made())
    assert "average 0.790 at 10, 0.780 at 20" in said["precision-fine"]
    assert "k-means, 5 clusters: distance 0.30, precision 0.700" in said["diversity-fine"]


def test_files_are_equal_to_the_byte_but_for_times(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        written = write_report(
            made(seconds={"exact search": seconds}), tmp_path / name, thumbnails=THUMBNAILS, per_query=QUERIES
        )
        assert set(written) >= {"report", "figures", "queries", "times", "precision-broad", "diversity-fine"}
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    differing = [str(f) for f in files if (tmp_path / "a" / f).read_bytes() != (tmp_path / "b" / f).read_bytes()]
    assert differing == ["times.json"]
    assert len(files) == 9
    assert pq.read_table(tmp_path / "a" / "queries.parquet").to_pylist() == QUERIES.to_pylist()
    lines_ = (tmp_path / "a" / "queries.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines_] == QUERIES.to_pylist()


def test_figures_hold_all_but_times(tmp_path):
    write_report(made(), tmp_path, thumbnails={}, per_query=QUERIES)
    told = json.loads((tmp_path / "figures.json").read_text())
    assert told == json.loads(json.dumps(figures_of(made())))
    assert told["figures"][0]["micro"] == {"mean": 0.69, "low": 0.6799999999999999, "high": 0.7}
    assert "seconds" not in json.dumps(told)
    assert times_of(made())["diversity_milliseconds"]["mmr"] == 1.25


def test_an_older_report_is_replaced_and_a_folder_that_is_none_is_said(tmp_path):
    write_report(made(), tmp_path / "r", thumbnails={}, per_query=QUERIES)
    write_report(made(levels=("broad",)), tmp_path / "r", thumbnails={}, per_query=QUERIES)
    assert {path.stem for path in (tmp_path / "r" / "plots").iterdir()} == {"precision-broad", "diversity-broad"}
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written to .*--out"):
        write_report(made(), tmp_path / "file", thumbnails={}, per_query=QUERIES)


def test_the_page_in_a_browser(tmp_path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e javascript:alert(3) " + "x" * 200
    hits = [Hit("p1", 0.9, 1, {"title": hostile, "broad_category": hostile}), Hit("<b>p2", 0.8, 2, {})]
    evaluation = made(
        facts={"model": hostile}, notes=[hostile],
        categories=[CategoryFigure("broad", hostile, 1, 1, dict.fromkeys(MODES, 0.5))],
        examples=[Example(hostile, hostile, [("query to description", hits)], frozenset({"p1"}))],
    )  # fmt: skip
    path = write_report(evaluation, tmp_path, thumbnails=THUMBNAILS, per_query=QUERIES)["report"]
    with browsing() as browser:
        for width, scheme in ((360, "light"), (1600, "dark")):
            with tab(browser, width=width, scheme=scheme) as watched:
                shown = watched.page
                shown.goto(path.as_uri())
                check(watched)


def check(watched: Watched) -> None:
    """Nothing ran and nothing was stopped; every picture is there; it fits, is readable, and its headings descend."""
    shown = watched.page
    assert watched.faults == []
    assert watched.violations() == []
    assert shown.evaluate("document.scripts.length") == 0
    assert shown.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    assert shown.locator("text=✓ relevant").count() == 1
    overflowing = [element for element in shown.evaluate(OVERFLOWING) if not element.startswith(("<t", "<caption"))]
    assert overflowing == []  # but for tables, which scroll
    assert shown.evaluate(UNREADABLE) == []
    levels = shown.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(lower <= upper + 1 for upper, lower in itertools.pairwise(levels))
