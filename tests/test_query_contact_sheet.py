from __future__ import annotations

import io
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image
from query_tables import jpeg

from pipeline.errors import MissingExtra, QueryError
from pipeline.query.contact_page import page
from pipeline.query.contact_sheet import Section, caption, contact_sheet
from pipeline.records import Hit
from pipeline.shown import visible

NASTY = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "javascript:alert(1)",
    "</title></style><svg onload=alert(1)>",
    "\x1b]0;owned\x07\x1b[31mred",
    "\u202egpj.exe",
    "{policy} {0}",
]


def hits(titles, cluster=None):
    return [
        Hit(f"p{i}", 0.9 - i / 100, i + 1, {"title": title, "broad_category": title, "fine_category": "y"}, cluster)
        for i, title in enumerate(titles)
    ]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text):
    tags = Tags()
    tags.feed(text)
    return tags


def test_the_page_shows_hits_and_needs_nothing_else(tmp_path):
    sections = [
        Section("query to image", hits(["red dress", "R&amp;B coat"], cluster=2), "a note"),
        Section("nothing", []),
    ]
    path = contact_sheet(
        sections, tmp_path / "s.html", query="red", thumbnails={"p0": jpeg((9, 9, 9))}, note="release 1"
    )
    tags = parsed(path.read_text())
    assert tags.seen.count("figure") == 2
    assert tags.seen.count("img") == 1
    text = " ".join(tags.texts)
    for shown in ("red dress", "R&B coat", "1. score 0.900", "cluster 3", "no image", "query to image", "a note"):
        assert shown in text
    assert "Nothing was found." in text
    assert "release 1" in text
    addresses = [value for name, value in tags.attributes if name in ("src", "href", "action")]
    assert all(value.startswith(("data:image/jpeg;base64,", "#")) for value in addresses)
    assert not re.search(r"https?:|@import|url\(|\bon\w+=|style=", path.read_text())
    contents = [value for name, value in tags.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'; img-src data:; style-src 'sha256-") for value in contents)


def test_what_looks_the_same_is_marked_and_what_was_left_out_named():
    shown = [replace(hit, duplicates=("p7", "<b>8") if hit.rank == 2 else ()) for hit in hits(["a", "b", "c", "d"])]
    text = page([Section("one", shown, "n", {2: 0, 3: 1}), Section("two", shown)], query="q", thumbnails={})
    tiles = re.findall("<li id=.*?</figure></li>", text)
    assert len(tiles) == 8
    marks = [re.findall('<a class="same" href="(.*?)">(.*?)</a>', tile) for tile in tiles]
    assert marks[:4] == [[], [], [("#s0-1", "looks like no. 1")], [("#s0-2", "looks like no. 2")]]
    assert not any(marks[4:])
    assert "<summary>+2 alike</summary>" in tiles[1]
    assert "<li>p7</li><li>&lt;b&gt;8</li>" in tiles[1]


def test_the_page_can_be_used_without_seeing_it_and_without_a_mouse():
    long = "a title that no tile of a narrow page can show on three lines"
    thumbnails = {f"p{i}": jpeg((9, 9, 9)) for i in range(2)}
    better = hits(["red dress", long, "x"])
    tags = parsed(
        page([Section("one", better, "a note", {1: 0}), Section("two", [])], query="q", thumbnails=thumbnails)
    )
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value for name, value in tags.attributes if name in ("aria-labelledby", "aria-describedby")]
    links = [value[1:] for name, value in tags.attributes if name == "href"]
    assert set(named) | set(links) <= set(ids)
    assert {"results", "s0", "s1", "s0-1"} == set(links)
    assert [tags.seen.count(tag) for tag in ("h1", "h2", "main", "header", "nav", "ol")] == [1, 2, 1, 1, 1, 1]
    alts = [value for name, value in tags.attributes if name == "alt"]
    assert alts == ["picture of product p0", "picture of product p1"]
    assert ("lang", "en") in tags.attributes
    assert tags.attributes.count(("role", "list")) == 2  # the navigation's, and one list of hits
    assert tags.attributes.count(("tabindex", "0")) == 1  # the title that may be cut


def test_both_schemes_and_all_media_are_styled():
    text = page([], query="q", thumbnails={})
    for part in (
        "prefers-color-scheme: dark",
        "forced-colors: active",
        "@media print",
        "prefers-contrast: more",
        "color-scheme: light dark",
    ):
        assert part in text


@pytest.mark.parametrize("title", [None, "x"])
def test_small_scores_have_the_digits_that_differ(title):
    assert caption(Hit("p", 0.03279, 2, {"title": title})).score == "2. score 0.0328"
    assert caption(Hit("p", -0.5, 1, {"title": title})).score == "1. score -0.500"
    assert caption(Hit("p", 0.5, 1, {"title": title})).title == (title or "p")


@pytest.mark.parametrize("text", NASTY)
def test_no_text_becomes_markup(text):
    plain = parsed(page([Section("a", hits(["b"]))], query="c", thumbnails={}, note="d"))
    nasty = parsed(page([Section(text, hits([text]), text)], query=text, thumbnails={}, note=text))
    assert set(nasty.seen) == set(plain.seen)
    assert nasty.seen.count("p") == plain.seen.count("p") + 1  # its note
    assert not [name for name, _ in nasty.attributes if name.startswith("on")]
    assert not any(character in "".join(nasty.texts) for character in "\x1b\x07\u202e")


def test_the_picture_has_a_tile_for_every_hit(tmp_path):
    titles = ["red dress", None, "word" * 80, "many words " * 40, "", "HeatTec® żółć 赤いドレス", *NASTY]
    thumbnails = {"p0": jpeg((200, 0, 0), (30, 120)), "p1": jpeg((0, 0, 200), (220, 20)), "p2": b"broken"}
    shown = [replace(hit, duplicates=("p98", "p99")) for hit in hits(titles, cluster=1)]
    sections = [Section("diversified", shown, "note " * 90, {1: 0}), Section("empty", [])]
    path = contact_sheet(sections, tmp_path / "s.png", query="q " * 400, thumbnails=thumbnails, note="release 1")
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    assert image.width == 2 * 32 + 10 * 196 + 9 * 14
    assert image.height > 2 * 288
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert any(red > 180 and green < 30 and blue < 30 for red, green, blue in colours)
    assert not any(blue > 180 and red < 30 and green < 30 for red, green, blue in colours)  # p1 is fainter
    assert any(blue > 200 and 90 < red < 120 and 90 < green < 120 for red, green, blue in colours)
    assert image.getpixel((32 + 196 + 14 + 4, 32 + 44 + 26 + 78 + 196 - 5)) == (255, 243, 205)  # and marked so


def test_visible_writes_control_characters_out():
    assert visible("a\x1b[31m\tb\nc\u202e é 😀") == "a\\x1b[31m b c\\u202e é 😀"


def test_other_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(QueryError, match=r"\.html or a \.png"):
        contact_sheet([], tmp_path / "s.gif", query="", thumbnails={})
    with pytest.raises(QueryError, match="cannot be written"):
        contact_sheet([], tmp_path / "none" / "s.html", query="", thumbnails={})
    with pytest.raises(QueryError, match=r"nu\\x00l.html cannot be written"):
        contact_sheet([], tmp_path / "nu\0l.html", query="", thumbnails={})
    with pytest.raises(QueryError, match=r"not 's\\\\x1b\[31m'") as error:
        contact_sheet([], tmp_path / "s\x1b[31m", query="", thumbnails={})
    assert str(error.value).isprintable()
    monkeypatch.delitem(sys.modules, "pipeline.query.contact_picture", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"twotower\[search\]"):
        contact_sheet([], tmp_path / "s.png", query="", thumbnails={})
