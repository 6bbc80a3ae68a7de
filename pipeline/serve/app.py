"""The routes: a JSON API described by /openapi.json, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

import pipeline
from pipeline.errors import MissingExtra, ModelError, TwotowerError, first_line
from pipeline.serve.answers import NotFound
from pipeline.serve.guard import Bounded, Guard, Limits, refusal
from pipeline.serve.messages import (
    ErrorAnswer,
    HealthAnswer,
    Parameters,
    SchemaAnswer,
    SearchAnswer,
    SearchRequest,
    TextParameters,
    described_fault,
    first_fault,
)
from pipeline.serve.metrics import Measured
from pipeline.serve.page_files import page_file
from pipeline.serve.searches import Busy
from pipeline.serve.service import Service

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.types import ASGIApp

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": said}
    for status, said in (
        (400, "the query or an option has no defined answer"),
        (401, "no token, or a wrong one"),
        (408, "the request was not sent in time"),
        (413, "the request is too large"),
        (422, "the request is not of the described shape"),
        (503, "too many requests at once, or the release cannot be read: come again"),
        (504, "the search took too long"),
    )
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "no such product"}}
_SCHEMAS = "#/components/schemas/{model}"
_JSON_OR_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": _SCHEMAS.format(model=SearchRequest.__name__)}},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_DAY_S = 86_400

router = APIRouter(responses=_REFUSALS)


class _Api(FastAPI):
    """Describes the body of POST /search too, which FastAPI does not read itself."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            _, bodies = models_json_schema([(SearchRequest, "validation")], ref_template=_SCHEMAS)
            super().openapi()["components"]["schemas"].update(bodies["$defs"])
        return super().openapi()


def application(
    service: Service, *, limits: Limits, token: str = "", hosts: Collection[str] = (), refresh_s: float = 5.0
) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        service: answers.
        limits: of each request.
        token: which a request has to bring; empty: none.
        hosts: which `Host` may name; empty: any.
        refresh_s: how often new releases are looked for; 0: never.
    """

    @contextlib.asynccontextmanager
    async def following(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.follow(refresh_s))
        yield
        following.cancel()

    app = _Api(
        title="Twotower",
        version=pipeline.__version__,
        description="Search in the newest release of a product catalog.",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=following,
        exception_handlers={
            TwotowerError: _refused,
            HTTPException: _http_error,
            RequestValidationError: _misshapen,
            ValidationError: _misshapen,
            Busy: _busy,
            NotFound: _not_found,
            Exception: _failed,
        },
    )
    app.state.service = service
    app.include_router(router)
    return Measured(Guard(Bounded(app, limits), token=token, hosts=hosts), service.metrics)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.get("/search", response_model=SearchAnswer, summary="Search by a text")
async def search_text(request: Request, parameters: Annotated[TextParameters, Query()]) -> Response:
    """The products nearest to a text, best first."""
    found = _service(request).search(parameters.query(), parameters.chosen(), parameters.mark_duplicates)
    return _json(await found)


@router.post("/search", response_model=SearchAnswer, summary="Search by anything", openapi_extra=_JSON_OR_IMAGE)
async def search(request: Request, parameters: Annotated[Parameters, Query()]) -> Response:
    """The products nearest to a text, an image, a vector or a mixture of them.

    The body is JSON; or an image file with its own content type, and the options in the query string.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return _json(await _service(request).search(body, parameters.chosen(), parameters.mark_duplicates))
    if kind != "application/json":
        raise HTTPException(422, "The body is application/json, or an image with its content type.")
    if parameters.model_fields_set:
        raise HTTPException(422, "With a JSON body the options are in the body, not in the query string.")
    asked = SearchRequest.model_validate_json(body)
    return _json(await _service(request).search(asked.query(), asked.chosen(), asked.mark_duplicates))


@router.get("/similar/{product_id:path}", response_model=SearchAnswer, responses=_MISSING, summary="Products like one")
async def similar(request: Request, product_id: str, parameters: Annotated[Parameters, Query()]) -> Response:
    """The products nearest to a product, which is left out itself; `mode` says by which of its vectors."""
    found = _service(request).similar(product_id, parameters.chosen(), parameters.mark_duplicates)
    return _json(await found)


@router.get(
    "/thumbnail/{product_id:path}", response_class=Response, summary="A product's picture",
    responses=_MISSING | {200: {"content": {"image/jpeg": {}}, "description": "a small JPEG"}},
)  # fmt: skip
async def thumbnail(request: Request, product_id: str, release: int | None = None) -> Response:
    """A small JPEG of a product's first image; with `release`, as answers name it, it may be kept for a day."""
    current, jpeg = await _service(request).thumbnail(product_id)
    if jpeg is None:
        raise HTTPException(404, f"There is no picture of this product in release {current}.")
    etag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
    fresh = f"max-age={_DAY_S}, immutable" if release == current else "max-age=60"
    headers = {"etag": etag, "cache-control": f"private, {fresh}"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(jpeg, media_type="image/jpeg", headers=headers)


@router.get("/schema", response_model=SchemaAnswer, summary="What can be asked")
async def schema(request: Request) -> Response:
    """Modes, and the columns that `where` may name, with their commonest values and ranges."""
    return _json(await _service(request).schema())


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Whether searches are answered")
async def healthz(request: Request) -> HealthAnswer:
    """Answered once the server is ready; needs no token."""
    release = _service(request).searcher.release
    return HealthAnswer(ready=True, release=release.release, model_id=release.model_id)


@router.get("/metrics", response_class=Response, summary="For Prometheus")
async def metrics(request: Request) -> Response:
    """Requests, latencies, batch sizes and the release, in Prometheus' text format."""
    return Response(_service(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page to search in."""
    return page_file(request, "index.html")


@router.get("/page/{name}", include_in_schema=False)
async def page_part(request: Request, name: str) -> Response:
    """Its script, style and icon."""
    return page_file(request, name)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


async def _refused(_: Request, error: Exception) -> JSONResponse:
    is_ours = isinstance(error, ModelError | MissingExtra)
    return refusal(503 if is_ours else 400, str(error))


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {404: "There is nothing at this address.", 405: "This address does not take this method."}
    detail = said.get(error.status_code, "") if error.detail in ("Not Found", "Method Not Allowed") else error.detail
    return refusal(error.status_code, detail, dict(error.headers or {}))


async def _misshapen(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, ValidationError):
        is_json = error.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid"
        return refusal(422 if is_json else 400, f"The request cannot be read: {first_fault(error)}.")
    assert isinstance(error, RequestValidationError)
    return refusal(422, f"The request cannot be read: {described_fault(error.errors()[0])}.")


async def _busy(_: Request, __: Exception) -> JSONResponse:
    return refusal(503, "Too many searches wait already; come again in a second.", {"retry-after": "1"})


async def _not_found(_: Request, error: Exception) -> JSONResponse:
    return refusal(404, str(error))


async def _failed(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError | RuntimeError):  # what Lance raises where a file or a store is gone
        return refusal(503, f"The release cannot be read: {first_line(error)}", {"retry-after": "5"})
    return refusal(500, "Something is wrong in the server; its log says what.")
