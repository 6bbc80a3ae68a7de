"""What the API takes and gives, as pydantic models: checked on the way in, described in /openapi.json."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from pipeline.errors import QueryError
from pipeline.query import Diversify, Mixture

MAX_K = 1_000
"""The most hits of one answer; `offset` reaches further."""

_Number = Annotated[float, Field(allow_inf_nan=False)]


class DiversifyOptions(BaseModel):
    """How the result is reordered so that different pictures come first."""

    model_config = ConfigDict(extra="forbid", strict=True)

    candidates: int = Field(50, description="how many of the best hits are reordered; at least offset + k are")
    clusters: int = Field(5, description="into how many groups of similar pictures they fall, at most")
    method: str = Field("kmeans", description="`kmeans`: one hit of each group in turn; `mmr`: marginal relevance")
    trade_off: _Number = Field(0.5, description="of `mmr`: from 0, only different pictures, to 1, only the query")
    seed: int = Field(0, description="of the k-means")


class Options(BaseModel):
    """What every search takes beside its query."""

    mode: str = Field("avg", description="`text`, `image`, `avg` or `hybrid`: what of the products is compared")
    k: int = Field(10, description=f"how many hits, up to {MAX_K}")
    offset: int = Field(0, description="how many better hits to leave out, for paging")
    exact: bool = Field(False, description="compare with every vector instead of using the index")
    collapse_duplicates: _Number | None = Field(
        None, description="cosine distance, 0.02 for instance: hits whose images are that close are shown once"
    )
    mark_duplicates: _Number | None = Field(
        None, description="cosine distance: `looks_like` of a hit names the better one of this page that looks the same"
    )

    def chosen(self) -> dict[str, Any]:
        """Arguments of `Searcher.search`.

        Raises:
            QueryError: one has no defined answer.
        """
        if self.k > MAX_K:
            raise QueryError(f"k is at most {MAX_K} in one request, not {self.k}; use offset for the next ones.")
        return {
            "mode": self.mode,
            "k": self.k,
            "offset": self.offset,
            "exact": self.exact,
            "collapse_duplicates": self.collapse_duplicates,
        }


class Parameters(Options):
    """Options in the query string of an address."""

    model_config = ConfigDict(extra="forbid")

    where: str | None = Field(
        None, description='conditions as JSON: {"broad_category": "dresses", "price": {"ge": 20, "lt": 80}}'
    )
    columns: list[str] | None = Field(None, description="which columns the hits carry; may be repeated")
    diversify: bool = Field(False, description="different pictures first; each option below says so too")
    candidates: int | None = Field(None, description="of diversify: how many of the best hits are reordered")
    clusters: int | None = Field(None, description="of diversify: into how many groups")
    method: str | None = Field(None, description="of diversify: `kmeans` or `mmr`")
    trade_off: _Number | None = Field(None, description="of diversify: of `mmr`, from 0 to 1")

    def chosen(self) -> dict[str, Any]:
        """Arguments of `Searcher.search`."""
        given = {name: getattr(self, name) for name in ("candidates", "clusters", "method", "trade_off")}
        given = {name: value for name, value in given.items() if value is not None}
        diversify = Diversify(**given) if self.diversify or given else None
        return super().chosen() | {"where": self._where(), "columns": self.columns, "diversify": diversify}

    def _where(self) -> object:
        if self.where is None:
            return None
        try:
            return _CONDITIONS.validate_json(self.where)
        except ValidationError as error:
            raise QueryError(f"`where` is no JSON object: {first_fault(error)}.") from error


class TextParameters(Parameters):
    """A text and its options in the query string of an address."""

    q: str = Field(description="what to look for, in words")

    def query(self) -> object:
        """What `Searcher.search` takes."""
        return self.q


_CONDITIONS = TypeAdapter(dict[str, JsonValue])


class Part(BaseModel):
    """One query of a mixture: a text, an image or a vector."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = Field(None, description="words")
    image: str | None = Field(None, description="an image file, base64")
    vector: list[float] | None = Field(None, description="a vector of the model's size", max_length=65_536)
    weight: float = Field(1.0, description="how much it counts; negative: less like this")

    def query(self) -> object:
        """What `Searcher.search` takes."""
        given = [value for value in (self.text, self.image, self.vector) if value is not None]
        if len(given) != 1:
            raise QueryError("Each part of a mixture has one of text, image and vector.")
        return given[0] if self.image is None else decoded(self.image)


class SearchRequest(Options):
    """A search as JSON: one of text, image, vector and mixture, and options."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str | None = Field(None, description="what to look for, in words")
    image: str | None = Field(None, description="an image file, base64")
    vector: list[float] | None = Field(None, description="a vector of the model's size", max_length=65_536)
    mixture: list[Part] | None = Field(None, description="several of them, weighted: like this photo, but red")
    where: dict[str, JsonValue] | None = Field(
        None, description="conditions on columns; operators: eq, ne, lt, le, gt, ge, in, contains, between, is_null"
    )
    columns: list[str] | None = Field(None, description="which columns the hits carry; by default all but vectors")
    diversify: DiversifyOptions | None = Field(None, description="different pictures first")

    def query(self) -> object:
        """What `Searcher.search` takes."""
        given = [value for value in (self.text, self.image, self.vector, self.mixture) if value is not None]
        if len(given) != 1:
            raise QueryError("A search has one of text, image, vector and mixture.")
        if self.mixture is not None:
            return Mixture([(part.query(), part.weight) for part in self.mixture])
        return given[0] if self.image is None else decoded(self.image)

    def chosen(self) -> dict[str, Any]:
        """Arguments of `Searcher.search`."""
        diversify = None if self.diversify is None else Diversify(**self.diversify.model_dump())
        return super().chosen() | {"where": self.where, "columns": self.columns, "diversify": diversify}


class Caption(BaseModel):
    """Texts as a page may show them: entities decoded, control characters written out. They are text, never markup."""

    title: str
    category: str


class HitAnswer(BaseModel):
    """One hit."""

    product_id: str
    score: float = Field(description="cosine similarity, -1 to 1; of `hybrid` a sum of 1 / (60 + rank)")
    rank: int = Field(description="from 1, over all pages")
    cluster: int | None = Field(description="group of similar pictures, from 0, where the result was diversified so")
    duplicates: list[str] = Field(description="products that look the same and were left out for this one")
    looks_like: str | None = Field(description="a better hit of this page that looks the same, where that was asked")
    caption: Caption
    fields: dict[str, JsonValue] = Field(description="columns; decimals and times as text, not-a-number as null")


class SearchAnswer(BaseModel):
    """What a search found."""

    release: int = Field(description="which release was searched")
    hits: list[HitAnswer]
    diversity: float | None = Field(description="mean cosine distance of two images, where the result was reordered")
    rank_correlation: float | None = Field(description="Kendall's tau with the order before, where it was reordered")
    seconds: float = Field(description="how long the search took, its wait for a thread not counted")


class ColumnAnswer(BaseModel):
    """A column that `where` may name."""

    name: str
    kind: Literal["text", "bool", "integer", "float", "decimal", "date", "timestamp"]
    values: list[tuple[str, int]] = Field(description="commonest values of a category, and how many products have each")
    distinct: int | None = Field(description="how many different values a category has")
    low: JsonValue = Field(description="least value of a number or time")
    high: JsonValue = Field(description="greatest value of a number or time")


class SchemaAnswer(BaseModel):
    """What can be asked of the release."""

    release: int
    products: int | None
    model: str
    modes: list[str]
    columns: list[ColumnAnswer]


class HealthAnswer(BaseModel):
    """Whether searches are answered."""

    ready: bool
    release: int
    model_id: str


class ErrorAnswer(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one sentence")


def decoded(image: str) -> bytes:
    """The bytes of a base64 image."""
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise QueryError(f"The image is not base64: {error}.") from error


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong with a message, as a part of a sentence."""
    return described_fault(error.errors(include_url=False, include_input=False)[0])


def described_fault(fault: Any) -> str:
    """A fault of pydantic's, with the name of the field."""
    place = ".".join(str(part) for part in fault["loc"] if part not in ("query", "body", "path"))
    said = str(fault["msg"])
    said = said[:1].lower() + said[1:]
    return f"{place}: {said}" if place else said
