"""The page to search in, and the contact sheet, in a real Chromium: what people do, what a hostile catalog tries."""

from __future__ import annotations

import base64
import json
import re
from urllib.parse import parse_qs, urlsplit

import pytest
from browser import DROP, NAMELESS, OVERFLOWING, PASTE, REQUIRED, UNREADABLE, browsing, chromium, tab, until
from query_tables import jpeg
from served import COLOURS, catalog, serving

from pipeline.query import Searcher
from pipeline.query.contact_sheet import Section, contact_sheet

TOKEN = "a-token-of-twenty-signs"
RAN = "<script>window.ran = 1</script>"
NASTY = [
    RAN,
    '"><img src=x onerror="window.ran = 2">',
    "&lt;script&gt;window.ran = 3&lt;/script&gt;",
    "javascript:window.ran=4",
    "</title></style></script><svg onload=window.ran=5>",
    "\x1b]0;owned\x07\x1b[31mred\x1b]8;;http://evil.example/\x07link\x1b]8;;\x07",
    "\u202egpj.exe\u2066",
    '<a href="javascript:window.ran=6">here</a><iframe src="http://evil.example/"></iframe>',
    "<p>Made of <b>silk</b>.<img src='http://evil.example/pixel.gif'><style>*{display:none}</style></p>",
    "${window.ran = 7} {{constructor.constructor('window.ran = 8')()}}",
    "<meta http-equiv=refresh content='0;url=http://evil.example/'><base href='http://evil.example/'>",
]
HOSTILE_IDS = {0: "<img src=x onerror=window.ran=9>", 1: "../../schema?x=1#y", 2: "a/b c%2F&é"}


@pytest.fixture(scope="module")
def browser():
    with browsing() as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    chromium()  # before anything is built for it
    with serving(catalog(tmp_path_factory.mktemp("page") / "db")) as client:
        yield client


def titles(page):
    return page.locator("#hits h3").all_text_contents()


def settled(page):
    """Wait until the last search is shown."""
    page.wait_for_selector('#results[aria-busy="false"]')


def looked_for(page, words):
    page.fill("#words", words)
    page.press("#words", "Enter")
    until(page, "words => document.title.includes(words)", words)
    settled(page)


def test_words_are_searched_and_the_address_says_so(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(server.url)
        page.get_by_role("button", name="jackets", exact=True).wait_for()
        assert "release 1" in page.inner_text("#about")
        looked_for(page, "red midi dress")
        assert titles(page)[0] == "Red midi dress"
        assert page.locator("#hits li").count() == 24
        assert re.match("24 products for “red midi dress” · release 1 · ", page.inner_text("#status"))
        assert page.locator("#hits .category").first.inner_text() == "dresses › midi dress"
        page.get_by_role("radio", name="Description").check()
        page.wait_for_url("**mode=text**")
        settled(page)
        assert "Compared with titles" in page.inner_text("#hint")
        score = page.locator("#hits .line").first.inner_text()
        assert "score 1.000" in score
        address = page.url
        page.go_back()
        until(page, "document.querySelector('input[value=avg]').checked")
        settled(page)
        page.goto("about:blank")
        page.goto(address)  # as somebody else opens it
        page.wait_for_selector("#hits li")
        assert page.input_value("#words") == "red midi dress"
        assert page.locator("input[value=text]").is_checked()
        assert page.locator("#hits .line").first.inner_text() == score
        until(page, "[...document.images].slice(0, 8).every((image) => image.complete)")
        assert page.locator("#hits img").first.evaluate("image => image.naturalWidth") > 50
        assert watched.faults == []
        assert watched.violations() == []


def test_a_picture_is_dropped_pasted_chosen_and_mixed_with_words(browser, server, tmp_path):
    picture = jpeg(COLOURS["green"], (60, 120))
    data = base64.b64encode(picture).decode()
    wanted = Searcher.open(server.service._searcher.db).search(picture, k=24)
    with tab(browser) as watched:
        page = watched.page
        page.goto(server.url)
        page.get_by_role("button", name="jackets", exact=True).wait_for()
        page.evaluate(DROP, ["green.jpg", "image/jpeg", data])
        page.wait_for_selector("#hits li")
        assert page.evaluate("window.offered")
        assert titles(page) == [hit.fields["title"] for hit in wanted]
        assert "your picture" in page.inner_text("#status")
        assert page.locator("#example img").evaluate("image => image.complete && image.naturalWidth") == 60
        assert not page.locator("input[value=hybrid]").is_enabled()
        looked_for(page, "wool coat")
        assert "your picture and “wool coat”" in page.inner_text("#status")
        assert titles(page) != [hit.fields["title"] for hit in wanted]
        page.get_by_label("Remove the picture").click()
        until(page, "document.getElementById('status').textContent.includes('for “wool coat”')")
        page.evaluate(PASTE, [data])
        until(page, "document.getElementById('status').textContent.includes('your picture')")
        file = tmp_path / "green.jpg"
        file.write_bytes(picture)
        page.fill("#words", "")
        page.set_input_files("#file", file)
        until(page, "document.getElementById('status').textContent.includes('for your picture ·')")
        assert titles(page) == [hit.fields["title"] for hit in wanted]
        page.evaluate(DROP, ["page.html", "text/html", data])
        assert "Only a picture" in page.inner_text("#problem")
        assert watched.faults == []
        page.evaluate(DROP, ["broken.jpg", "image/jpeg", base64.b64encode(b"no picture").decode()])
        until(page, "document.getElementById('problem').textContent.includes('cannot be used')")
        assert page.locator("#hits li").count() == 0
        assert watched.violations() == []


def test_filters_come_from_the_release_and_are_conditions(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(f"{server.url}?q=red")
        page.wait_for_selector("#hits li")
        group = page.get_by_role("group", name="Broad category")
        group.get_by_label("dresses").check()
        settled(page)
        until(page, "document.querySelectorAll('#hits li').length === 8")
        assert all("dresses" in text for text in page.locator("#hits .category").all_inner_texts())
        group.get_by_label("jackets").check()
        until(page, "document.querySelectorAll('#hits li').length === 24")
        page.fill('[aria-label="Price to"]', "25")
        page.press('[aria-label="Price to"]', "Tab")
        until(page, "document.querySelectorAll('#hits li').length === 7")
        said = json.loads(parse_qs(urlsplit(page.url).query)["where"][0])
        assert said == {"broad_category": {"in": ["jackets", "dresses"]}, "price": {"le": 25}}
        assert page.locator("#applied li span").all_inner_texts() == [
            "Broad category: jackets or dresses",
            "Price: to 25",
        ]
        page.goto("about:blank")
        page.goto(page.url if "where" in page.url else f"{server.url}?q=red&where={json.dumps(said)}")
        page.wait_for_selector("#hits li")
        assert page.locator("#hits li").count() == 7
        assert group.get_by_label("dresses").is_checked()
        assert page.input_value('[aria-label="Price to"]') == "25"
        page.get_by_label("Remove the filter Price: to 25").click()
        until(page, "document.querySelectorAll('#hits li').length === 24")
        page.get_by_role("button", name="Clear all").click()
        until(page, "!location.search.includes('where')")
        assert watched.faults == []
        page.goto(f'{server.url}?q=red&where={{"nope":1}}')
        page.wait_for_selector("#problem:not([hidden])")
        assert page.inner_text("#problem").startswith("No column 'nope' to filter by")


def test_the_slider_shows_different_pictures_first(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(f"{server.url}?q=red+midi+dress")
        page.wait_for_selector("#hits li")
        plain = titles(page)
        assert page.inner_text("#varied").startswith("Off")
        page.focus("#variety")
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.wait_for_url("**variety=4**")
        page.wait_for_selector("#hits .badge.c3")
        assert "4 groups" in page.inner_text("#varied")
        assert page.get_attribute("#variety", "aria-valuetext") == "4 groups"
        badges = page.locator("#hits li .badge:not(.alike)").all_inner_texts()
        assert badges[:4] == ["group 1", "group 2", "group 3", "group 4"]
        assert titles(page) != plain
        assert titles(page)[0] == plain[0]
        assert "pictures differ by" in page.inner_text("#status")
        page.get_by_label("Show look-alikes once").check()
        page.wait_for_url("**once=1**")
        settled(page)
        assert watched.faults == []


def test_look_alikes_are_marked_and_shown_once(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(f"{server.url}?q=red+midi+dress&mode=image")
        page.wait_for_selector("#hits li")
        reply = server.get("/search", q="red midi dress", mode="image", k=24, mark_duplicates=0.02).json["hits"]
        marked = [hit["rank"] for hit in reply if hit["looks_like"]]
        assert page.locator("#hits .alike").count() == len(marked)
        page.get_by_label("Show look-alikes once").check()
        page.wait_for_url("**once=1**")
        settled(page)
        once = server.get("/search", q="red midi dress", mode="image", k=24, collapse_duplicates=0.02).json["hits"]
        named = [f"+{len(hit['duplicates'])} alike" for hit in once if hit["duplicates"]]
        assert page.locator("#hits .alike").all_inner_texts() == named
        assert watched.faults == []


def test_more_and_similar(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(f"{server.url}?q=blue")
        page.wait_for_selector("#hits li")
        page.get_by_role("button", name="Show more").click()
        until(page, "document.querySelectorAll('#hits li').length === 48")
        ranks = [int(line.split(" · ")[0]) for line in page.locator("#hits .line .soft").all_inner_texts()]
        assert ranks == list(range(1, 49))
        assert page.evaluate("document.activeElement.closest('li') === document.querySelectorAll('#hits li')[24]")
        assert not page.locator("#more").is_visible()
        page.get_by_label("Products similar to Green wool coat", exact=True).click()
        until(page, "location.search.includes('like=p')")
        settled(page)
        assert "Green wool coat" not in titles(page)
        assert "Like Green wool coat" in page.inner_text("#example")
        assert "products like Green wool coat" in page.inner_text("#status")
        assert all("Green" in title for title in titles(page)[:4])
        page.locator("#hits .frame").first.click()
        first = titles(page)[0]
        assert page.inner_text("#detail h2") == first
        assert f"A {first.lower()} for every day." in page.inner_text("#detail dl")
        page.get_by_role("button", name="Similar products").click()
        until(page, "title => document.title.includes(title)", first)
        assert not page.locator("#detail").is_visible()
        page.go_back()
        until(page, "document.title.includes('Green wool coat')")
        settled(page)
        assert watched.faults == []
        page.goto(f"{server.url}?like=gone")
        page.wait_for_selector("#problem:not([hidden])")
        assert page.inner_text("#problem") == "There is no product 'gone' in release 1."


def test_everything_can_be_done_with_the_keyboard(browser, server):
    with tab(browser) as watched:
        page, press = watched.page, watched.page.keyboard.press
        page.goto(server.url)
        page.get_by_role("button", name="jackets", exact=True).wait_for()

        def focused(what="id"):
            return page.evaluate(f"document.activeElement.{what}")

        def reach(wanted, what="id", most=80):
            for _ in range(most):
                press("Tab")
                if wanted in (focused(what) or ""):
                    style = "const s = getComputedStyle(document.activeElement);"
                    return page.evaluate(f"() => {{ {style} return s.outlineStyle + s.outlineWidth + s.boxShadow }}")
            raise AssertionError(f"{wanted} is not reached")

        press("Tab")
        assert focused("className") == "skip"
        assert page.locator(".skip").bounding_box()["y"] >= 0  # it is seen when it has the focus
        reach("words")
        page.keyboard.type("yellow skirt")
        press("Enter")
        page.wait_for_selector("#hits li")
        reach("file")
        reach("radio", "type")
        press("ArrowRight")
        page.wait_for_url("**mode=text**")
        assert "3px" in reach("variety")
        press("ArrowRight")
        press("ArrowRight")
        page.wait_for_url("**variety=3**")
        reach("once")
        press("Space")
        page.wait_for_url("**once=1**")
        reach("SUMMARY", "tagName")
        reach("checkbox", "type")
        press("Space")
        page.wait_for_url("**where=**")
        settled(page)
        count = page.locator("#hits li").count()
        assert 0 < count < 24
        reach("frame", "className")
        press("Enter")
        page.wait_for_selector("#detail[open]")
        press("Escape")
        assert not page.locator("#detail").is_visible()
        assert focused("className") == "frame"  # back where it was
        press("Tab")
        assert focused("textContent") == "Similar"
        press("Enter")
        page.wait_for_url("**like=**")
        settled(page)
        assert focused() == "results"
        assert watched.faults == []


def test_what_a_screen_reader_is_told(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(f"{server.url}?q=red+midi+dress&variety=3")
        page.wait_for_selector("#hits li")
        assert page.evaluate(NAMELESS) == []
        assert page.get_attribute("#status", "role") == "status"  # which is a polite live region
        assert page.get_attribute("html", "lang") == "en"
        levels = [
            int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((h) => h.tagName)")
        ]
        assert levels.count(1) == 1
        assert page.locator("main").count() == page.locator('form[role="search"]').count() == 1
        assert page.get_by_role("list").count() >= 1
        assert page.locator("#hits img:not([alt=''])").count() == 0  # the title stands beside the picture


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
def test_it_fits_and_can_be_read(browser, server, width, scheme):
    with tab(browser, width=width, height=780, scheme=scheme, reduced_motion="reduce") as watched:
        page = watched.page
        page.goto(f'{server.url}?q=red+midi+dress&variety=5&where={{"price":{{"le":100}}}}')
        page.wait_for_selector("#hits li")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOWING) == []
        if width == 360:
            page.locator("#panel > summary").click()
        for target in ("#words", "#variety", "#once", "#hits .frame", "#more"):
            if page.locator(target).first.is_visible():
                assert page.locator(target).first.bounding_box()["height"] >= 16
        assert page.locator("#variety").is_visible()
        assert page.evaluate(OVERFLOWING) == []
        assert page.evaluate(UNREADABLE) == []
        page.locator("#hits .frame").first.click()
        box = page.locator("#detail").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        duration = page.locator(".card").first.evaluate("card => getComputedStyle(card).transitionDuration")
        assert duration == "0s"
        assert watched.faults == []
        assert watched.violations() == []


def test_the_probes_find_what_they_look_for(browser, server):
    with tab(browser) as watched:
        page = watched.page
        page.goto(server.url)
        page.get_by_role("button", name="jackets", exact=True).wait_for()
        page.evaluate("document.querySelector('h1').style.color = '#bbb'")
        page.evaluate("document.querySelector('#about').style.width = '3000px'")
        page.evaluate("document.querySelector('#example button').setAttribute('aria-label', '')")
        page.evaluate("document.querySelector('#example button').textContent = ''")
        assert [name for _, _, name in page.evaluate(UNREADABLE)] == ["Twotower"]
        assert any("3000px" in element for element in page.evaluate(OVERFLOWING))
        assert len(page.evaluate(NAMELESS)) == 1
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.ran = 1\">')")
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=http://evil.example/x.gif>')")
        until(page, "window.violations.length === 2")  # the policy would stop what got through
        assert page.evaluate("window.ran") is None


def test_the_token_is_asked_for_and_never_part_of_an_address(browser, server):
    with serving(server.service._searcher.db, token=TOKEN) as locked, tab(browser) as watched:
        page = watched.page
        page.goto(f"{locked.url}?q=red+midi+dress")
        page.wait_for_selector("#door[open]")
        page.keyboard.press("Escape")
        assert page.locator("#door").is_visible()
        page.fill("#token", "not-the-right-token")
        page.press("#token", "Enter")
        until(page, "document.getElementById('door-problem').textContent === 'The token is not right.'")
        page.fill("#token", TOKEN)
        page.press("#token", "Enter")
        page.wait_for_selector("#hits li")
        assert not page.locator("#door").is_visible()
        until(page, "document.querySelector('#hits img').naturalWidth > 50")
        assert page.locator("#hits img").first.get_attribute("src").startswith("blob:")
        page.reload()
        page.wait_for_selector("#hits li")  # this tab knows it
        assert TOKEN not in page.url + page.content()
        assert not [address for address in watched.requests if TOKEN in address]
        assert page.evaluate("[document.cookie, localStorage.length]") == ["", 0]
        assert watched.violations() == []
        other = page.context.new_page()
        other.goto(locked.url)
        other.wait_for_selector("#door[open]")  # another one does not


def test_a_hostile_catalog_stays_text(browser, tmp_path):
    hostile = dict(enumerate(NASTY))
    db = catalog(tmp_path / "db", titles=hostile, ids=HOSTILE_IDS)
    with serving(db) as client, tab(browser) as watched:
        page = watched.page
        page.goto(f"{client.url}?q=red+midi+dress")
        for _ in range(2):
            page.wait_for_selector("#hits li")
            if page.locator("#more").is_visible():
                page.locator("#more").click()
                until(page, "document.querySelectorAll('#hits li').length > 24")
        seen = titles(page)
        assert RAN in seen
        assert NASTY[4] in seen
        assert r"\x1b]0;owned\x07\x1b[31mred\x1b]8;;http://evil.example/\x07link\x1b]8;;\x07" in seen
        assert r"\u202egpj.exe\u2066" in seen
        cards = page.locator("#hits li")
        for place, title in enumerate(seen):
            if title in (NASTY[1], NASTY[8], RAN):
                cards.nth(place).locator(".frame").click()
                assert page.locator("#detail dd").count() > 5
                page.keyboard.press("Escape")
        page.get_by_label(f"Products similar to {RAN}", exact=True).first.click()
        until(page, "location.search.includes('like=')")
        settled(page)
        assert page.locator("#hits li").count() == 24
        assert RAN in page.inner_text("#status")
        for words in (NASTY[1], NASTY[4], NASTY[9]):
            looked_for(page, visible_words(words))
        page.goto(
            f"{client.url}?q={RAN}&like=javascript:window.ran=1&mode=<b>&variety=x&where=%7B%22__proto__%22%3A1%7D"
        )
        page.wait_for_selector("#problem:not([hidden])")
        assert page.evaluate("window.ran") is None
        assert page.locator("iframe, svg:not(#choose svg), base, meta[http-equiv], a:not(.skip)").count() == 0
        assert watched.violations() == []
        assert [address for address in watched.requests if not address.startswith((client.url, "blob:"))] == []
        # The refused search above is one of our own errors in the console; nothing else is there.
        assert [fault for fault in watched.faults if "status of 40" not in fault] == []


def visible_words(text):
    """Words as a person could type them."""
    return "".join(character for character in text if character.isprintable())


def test_a_hostile_contact_sheet_stays_text(browser, tmp_path):
    db = catalog(tmp_path / "db", titles=dict(enumerate(NASTY)), ids=HOSTILE_IDS)
    searcher = Searcher.open(db)
    hits = searcher.search("red midi dress", k=48)
    sections = [Section(text, hits, text) for text in (NASTY[0], NASTY[1], NASTY[4])]
    thumbnails = searcher.thumbnails(hit.product_id for hit in hits)
    path = contact_sheet(sections, tmp_path / "sheet.html", query=NASTY[1], thumbnails=thumbnails, note=NASTY[4])
    for width, scheme in ((360, "dark"), (1600, "light")):
        with tab(browser, width=width, scheme=scheme) as watched:
            page = watched.page
            page.goto(path.as_uri())
            assert page.locator("figure").count() == 3 * 48
            assert page.evaluate("window.ran") is None
            assert page.inner_text("h1") == NASTY[1]
            assert page.locator("script, iframe, svg, a:not([href^='#']), base").count() == 0
            assert r"\u202egpj.exe" in page.inner_text("main")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert watched.violations() == []
            assert watched.faults == []
            assert [address for address in watched.requests if not address.startswith(("file:", "data:"))] == []


def test_a_missing_browser_is_said_and_can_be_a_failure(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nonexistent/chromium")
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="package `chromium`"):
        chromium()
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="package `chromium`"):
        chromium()
