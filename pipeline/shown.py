"""Text as it may be shown: control characters made visible, credentials left out, markup inert, also as a page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping
from html import escape
from typing import Any

_URI = re.compile(r"\w[\w+.-]*://[^\s'\"<>]+")
_PARAMETER = re.compile(r"(?<=[?&])([^=&#]+)=([^&#]*)")
_HARMLESS = ("region", "scheme", "endpoint_override")


def visible(text: object) -> str:
    r"""Text on one line, with control and direction characters written out as \x1b or \u202e."""
    words = " ".join(str(text).split(" "))
    return "".join(
        character
        if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
        else " "
        if character in "\n\t\r"
        else character.encode("unicode_escape").decode("ascii")
        for character in words
    )


def escaped(text: object) -> str:
    """`visible` text as a part of HTML."""
    return escape(visible(text))


def html_page(title: str, style: str, body: str, *, sources: str = "") -> str:
    """A whole page without a script: its one style is named by hash in the content security policy.

    Args:
        title: as text.
        style: CSS.
        body: as markup.
        sources: directives of the policy beside that, such as `img-src data:`; nothing else may load.
    """
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = "; ".join(
        part
        for part in (
            "default-src 'none'", sources, f"style-src 'sha256-{digest}'", "base-uri 'none'", "form-action 'none'"
        )
        if part
    )  # fmt: skip
    return _PAGE.format(policy=escape(policy), title=escaped(title), style=style, body=body)


def redacted(text: str) -> str:
    """Text with the credentials of the URIs in it cut out: `s3://key:secret@bucket/x` is `s3://…@bucket/x`."""
    return _URI.sub(lambda match: _without_credentials(match[0]), text)


def redacted_tree(value: Any) -> Any:
    """What JSON can hold, with every text in it redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(str(key)): redacted_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item) for item in value]
    return value


def as_json(document: Any) -> bytes:
    """A document as JSON, which knows neither NaN nor infinities: they become null."""
    try:
        return json.dumps(document, default=_plain, allow_nan=False).encode()
    except ValueError:
        return json.dumps(_finite(document), default=_plain, allow_nan=False).encode()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _without_credentials(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    rest = "…" + rest[len(user) :] if at else rest
    return f"{scheme}://" + _PARAMETER.sub(
        lambda match: match[0] if match[1].lower() in _HARMLESS else f"{match[1]}=…", rest
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
