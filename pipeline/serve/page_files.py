"""The page's own files, which are part of the package: nothing of it comes from anywhere else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response

if TYPE_CHECKING:
    from starlette.requests import Request

KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_file(request: Request, name: str) -> Response:
    """One of the files; a browser asks each time whether it changed."""
    known = _files()
    if name not in known:
        raise HTTPException(404)
    content, etag = known[name]
    headers = {"etag": etag, "cache-control": "no-cache", "content-security-policy": POLICY}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=KINDS[name.rpartition(".")[2]], headers=headers)


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """Content and ETag by name: only what is listed here can be asked for, whatever an address says."""
    found = {}
    for file in files("pipeline.serve").joinpath("page").iterdir():
        if file.name.rpartition(".")[2] in KINDS:
            content = file.read_bytes()
            found[file.name] = content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return found
