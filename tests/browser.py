"""Debian's Chromium, driven by playwright: where it is, and what a page did that it should not have done."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

REQUIRED = "TWOTOWER_REQUIRE_BROWSER"
"""Set to 1 where the tests must run, as in CI: then a missing browser is a failure."""

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip
_NOTES_VIOLATIONS = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`);
});
"""

DROP = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    const event = new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.getElementById("results").dispatchEvent(event);
    if (kind === "dragover") {
      window.offered = document.body.classList.contains("dragging") && event.defaultPrevented;
    }
  }
}"""
PASTE = """([data]) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "pasted.jpg", { type: "image/jpeg" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
}"""
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width > 0 && box.right > innerWidth + 1 && !element.closest(".unseen, .skip");
}).map((element) => element.outerHTML.slice(0, 100))"""
"""Elements that reach beyond the right edge."""

NAMELESS = """() => [...document.querySelectorAll("button, input, select, a, dialog, fieldset")].filter((element) => {
  const label = element.labels?.length ? element.labels[0].textContent : "";
  const by = document.getElementById(element.getAttribute("aria-labelledby"))?.textContent;
  const legend = element.querySelector(":scope > legend")?.textContent;
  return !(element.getAttribute("aria-label") || by || label || legend || element.textContent).trim();
}).map((element) => element.outerHTML)"""
"""Controls that a screen reader could not name."""

UNREADABLE = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.9) return colour;
    }
  };
  const ratio = (element) => {
    const pair = [light(channels(getComputedStyle(element).color)), light(behind(element))].sort((x, y) => y - x);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  };
  const passive = ".unseen, .unseen *, :disabled + *, option, noscript";
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.checkVisibility() && !element.disabled && !element.matches(passive))
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .map((element) => [Math.round(100 * ratio(element)) / 100, element.className, element.textContent.slice(0, 40)])
    .filter(([found]) => found < 4.5);
}"""
"""Texts whose contrast with what is behind them is under WCAG's 4.5."""


def chromium() -> str:
    """Path of the browser; the test is skipped, or fails where a browser is required, when there is none."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path and os.access(path, os.X_OK):
        return path
    said = "no Chromium was found: install Debian's package `chromium`, or name another one in CHROMIUM"
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{said} ({REQUIRED}=1)", pytrace=False)
    pytest.skip(said)


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser, for as long as the block runs."""
    path = chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        if os.environ.get(REQUIRED) == "1":
            raise
        pytest.skip("playwright is not installed: pip install 'twotower[dev]'")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@dataclass
class Watched:
    """A tab, and what happened in it.

    Attributes:
        page: playwright's.
        requests: addresses that it asked for.
        faults: dialogs, errors of scripts, errors in the console, other tabs.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def violations(self) -> list[str]:
        """What the content security policy stopped."""
        stopped: list[str] = self.page.evaluate("window.violations")
        return stopped


def until(page: Any, expression: str, argument: object = None, within_s: float = 10) -> None:
    """Wait for an expression; playwright's own waiting evaluates text in the page, which its policy forbids."""
    deadline = time.monotonic() + within_s
    while not page.evaluate(expression, argument):
        assert time.monotonic() < deadline, f"never: {expression}"
        page.wait_for_timeout(20)


@contextmanager
def tab(
    browser: Any, *, width: int = 1600, height: int = 1000, scheme: str = "light", **options: Any
) -> Iterator[Watched]:
    """A tab of its own, with nothing kept from others."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
    context.set_default_timeout(10_000)
    context.add_init_script(_NOTES_VIOLATIONS)
    page = context.new_page()
    watched = Watched(page)
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.faults.append(f"error {error}"))
    page.on("popup", lambda other: watched.faults.append(f"tab {other.url}"))

    def closed(dialog: Any) -> None:
        watched.faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    page.on("dialog", closed)
    # What a server refuses is an error to the console too; tests of refusals expect those.
    page.on("console", lambda message: message.type == "error" and watched.faults.append(f"console {message.text}"))
    try:
        yield watched
    finally:
        context.close()
