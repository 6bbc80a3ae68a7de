from __future__ import annotations

import io
import re
import sys
from html.parser import HTMLParser

import pytest
from PIL import Image
from query_tables import jpeg

from pipeline.errors import MissingExtra, QueryError
from pipeline.query.contact_sheet import Section, contact_sheet, page
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
    assert tags.seen.count("li") == 2
    assert tags.seen.count("img") == 1
    text = " ".join(tags.texts)
    for shown in ("red dress", "R&B coat", "1. score 0.900", "cluster 3", "no image", "query to image", "a note"):
        assert shown in text
    assert "Nothing was found." in text
    assert "release 1" in text
    addresses = [value for name, value in tags.attributes if name in ("src", "href", "action")]
    assert all(value.startswith("data:image/jpeg;base64,") for value in addresses)
    assert not re.search(r"https?:|@import|url\(|\bon\w+=|style=", path.read_text())
    contents = [value for name, value in tags.attributes if name == "content"]
    assert any(value.startswith("default-src 'none'; img-src data:; style-src 'sha256-") for value in contents)


@pytest.mark.parametrize("text", NASTY)
def test_no_text_becomes_markup(text):
    plain = parsed(page([Section("a", hits(["b"]))], query="c", thumbnails={}, note="d"))
    nasty = parsed(page([Section(text, hits([text]), text)], query=text, thumbnails={}, note=text))
    assert set(nasty.seen) - {"small"} == set(plain.seen)
    assert nasty.seen.count("p") == plain.seen.count("p")
    assert not [name for name, _ in nasty.attributes if name.startswith("on")]
    assert not any(character in "".join(nasty.texts) for character in "\x1b\x07\u202e")


def test_the_picture_has_a_tile_for_every_hit(tmp_path):
    titles = ["red dress", None, "word" * 80, "many words " * 40, "", "HeatTec® żółć 赤いドレス", *NASTY]
    thumbnails = {"p0": jpeg((200, 0, 0), (30, 120)), "p1": jpeg((0, 0, 200), (220, 20)), "p2": b"broken"}
    sections = [Section("diversified", hits(titles, cluster=1), "note " * 90), Section("empty", [])]
    path = contact_sheet(sections, tmp_path / "s.png", query="q " * 400, thumbnails=thumbnails, note="release 1")
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    assert image.width == 2 * 32 + 10 * 196 + 9 * 14
    assert image.height > 2 * 288
    colours = {colour for _, colour in image.getcolors(1 << 24)}
    assert any(red > 180 and green < 30 and blue < 30 for red, green, blue in colours)
    assert any(blue > 180 and red < 30 and green < 30 for red, green, blue in colours)


def test_visible_writes_control_characters_out():
    assert visible("a\x1b[31m\tb\nc\u202e é 😀") == "a\\x1b[31m b c\\u202e é 😀"


def test_other_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(QueryError, match=r"\.html or a \.png"):
        contact_sheet([], tmp_path / "s.gif", query="", thumbnails={})
    with pytest.raises(QueryError, match="cannot be written"):
        contact_sheet([], tmp_path / "none" / "s.html", query="", thumbnails={})
    monkeypatch.delitem(sys.modules, "pipeline.query.contact_picture", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"twotower\[search\]"):
        contact_sheet([], tmp_path / "s.png", query="", thumbnails={})
