"""Search in one release: three modes over texts, images and vectors, with filters, paging and diversity."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipeline.errors import QueryError, first_line
from pipeline.query.encoder import Encoder, words_of
from pipeline.query.filter_values import shown
from pipeline.query.filters import Where
from pipeline.query.nearest import Pinned, nearest, rows_of
from pipeline.query.request import MODES, VECTOR_MODES, Request, check
from pipeline.query.rerank import Diversify
from pipeline.query.results import Hits
from pipeline.shown import visible

if TYPE_CHECKING:
    from pipeline.query.encoder import Vector
    from pipeline.query.explain import Explanation
    from pipeline.query.products import Facet
    from pipeline.store.releases import Release


class Searcher:
    """Searches one release of a database; safe for threads. `Searcher.open` makes one."""

    def __init__(self, db: str, pinned: Pinned, *, model: str | None, device: str, follows: bool) -> None:
        self.db = db
        self._pinned = pinned
        self._model = model
        self._device = device
        self._follows = follows

    @classmethod
    def open(
        cls,
        db: str | os.PathLike[str],
        *,
        release: int | None = None,
        model: str | os.PathLike[str] | None = None,
        device: str = "cpu",
    ) -> Searcher:
        """Open the newest release of a database, or a certain one.

        Args:
            db: folder or URI of the database.
            release: number of the release to stay on.
            model: a folder, when the release's own model is not at hand; its model_id must match.
            device: where query texts and images are embedded.

        Raises:
            QueryError: nothing is released, or not this number.
        """
        db, model = os.fspath(db), None if model is None else os.fspath(model)
        _reach(db)
        pinned = _pin(db, _find(db, release), model, device)
        return cls(db, pinned, model=model, device=device, follows=release is None)

    @property
    def release(self) -> Release:
        """The release that is searched."""
        return self._pinned.release

    @property
    def schema(self) -> pa.Schema:
        """Columns of `products`: what `columns` and `where` may name."""
        return self._pinned.schema

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that this release can be searched in: `hybrid` needs its full-text index."""
        return MODES if self._pinned.text_columns else VECTOR_MODES

    def refresh(self) -> bool:
        """Move to the newest release, for all threads at once; a searcher opened on a number stays.

        Returns:
            Whether the release changed.
        """
        if not self._follows:
            return False
        newest, old = _find(self.db, None), self._pinned
        if newest.release == old.release.release:
            return False
        encoder = old.encoder if newest.model_id == old.encoder.model_id else None
        self._pinned = _pin(self.db, newest, self._model, self._device, encoder)
        return True

    def held(self) -> Searcher:
        """A searcher that stays on the release of this moment, for the several steps of one answer."""
        return Searcher(self.db, self._pinned, model=self._model, device=self._device, follows=False)

    def encode(self, queries: Sequence[object]) -> list[Vector]:
        """Unit vectors (D,) of queries, in order; all texts in one batch, remembered for the searches that follow."""
        return self._pinned.encoder.encode(queries)

    def knows(self, text: str) -> bool:
        """Whether a text's vector is remembered, so that a search for it needs no tower."""
        return self._pinned.encoder.knows(text)

    def search(
        self,
        query: object,
        *,
        mode: str = "avg",
        k: int = 10,
        offset: int = 0,
        columns: Sequence[str] | None = None,
        where: Where | None = None,
        exact: bool = False,
        diversify: Diversify | None = None,
        collapse_duplicates: float | None = None,
    ) -> Hits:
        """The k best products after `offset`, best first; equal scores in order of product_id.

        Args:
            query: a text; an image as bytes, path or PIL image; a vector (D,), which is normalised; or a `Mixture`.
            mode: `text`, `image` or `avg`: which vector of the products is compared; or `hybrid`, which fuses `avg`
                with a full-text search of title and description by reciprocal rank: scores are sums of 1 / (60 + rank).
            k: how many hits.
            offset: how many better hits to leave out, for paging.
            columns: which columns the hits carry; by default all but vectors and bookkeeping.
            where: conditions on columns, see `pipeline.query.filters`.
            exact: compare with every vector instead of using the index.
            diversify: reorder the best candidates so that different pictures come first; max(candidates, offset + k)
                are reordered, so pages agree with each other as far as `candidates` reaches.
            collapse_duplicates: cosine distance, 0.02 for instance: of hits whose image vectors are that close only the
                best is shown, with the others' ids in its `duplicates`.

        Returns:
            A list of hits that also tells its `diversity` and, where it was reordered, its `rank_correlation`.

        Raises:
            QueryError: the query, or an option, has no defined answer.
        """
        found = self.search_many(
            [query],
            mode=mode,
            k=k,
            offset=offset,
            columns=columns,
            where=where,
            exact=exact,
            diversify=diversify,
            collapse_duplicates=collapse_duplicates,
        )
        return found[0]

    def search_many(
        self,
        queries: Sequence[object],
        *,
        mode: str = "avg",
        k: int = 10,
        offset: int = 0,
        columns: Sequence[str] | None = None,
        where: Where | None = None,
        exact: bool = False,
        diversify: Diversify | None = None,
        collapse_duplicates: float | None = None,
    ) -> list[Hits]:
        """`search` for several queries at once, with the same options; results are in the order of the queries."""
        pinned = self._pinned
        request = _request(
            pinned,
            mode=mode,
            k=k,
            offset=offset,
            columns=columns,
            where=where,
            exact=exact,
            diversify=diversify,
            collapse_duplicates=collapse_duplicates,
        )
        if isinstance(queries, str | bytes) or not isinstance(queries, Iterable):
            raise QueryError(f"`search_many` takes a list of queries, not a {type(queries).__name__}.")
        queries = list(queries)
        vectors = pinned.encoder.encode(queries)
        words = [words_of(query) for query in queries]
        _check_words(request, words)
        with _reading(pinned):
            if len(vectors) == 1:
                return [nearest(pinned, vectors[0], words[0], request)]
            with ThreadPoolExecutor(max(1, min(len(vectors), os.cpu_count() or 1))) as pool:
                return list(pool.map(lambda vector, words: nearest(pinned, vector, words, request), vectors, words))

    def explain(self, query: object, **options: Any) -> Explanation:
        """How `search` answers a query, which is done once for it.

        Args:
            query: as in `search`.
            options: of `search`.
        """
        from pipeline.query.explain import explain

        pinned = self._pinned
        request = _request(pinned, **options)
        _check_words(request, [words_of(query)])
        with _reading(pinned):
            return explain(pinned, query, request)

    def products(self, product_ids: Iterable[str], columns: Sequence[str]) -> dict[str, dict[str, object]]:
        """The asked columns of products, by product_id; products that the release does not have are left out.

        Raises:
            QueryError: it has no such column.
        """
        from pipeline.query.products import read_products

        if unknown := [name for name in columns if name not in self.schema.names]:
            raise QueryError(f"No column {shown(unknown[0])}; there are {visible(', '.join(self.schema.names))}.")
        with _reading(self._pinned):
            return read_products(self._pinned, product_ids, columns)

    def facets(self) -> list[Facet]:
        """What each column that a person may filter by holds; reads those columns of the whole release."""
        from pipeline.query.products import read_facets

        with _reading(self._pinned):
            return read_facets(self._pinned)

    def thumbnails(self, product_ids: Iterable[str]) -> dict[str, bytes]:
        """JPEG thumbnails of the products' first embedded images; products without one are left out."""
        first: dict[str, tuple[int, bytes]] = {}
        with _reading(self._pinned):
            for rows in rows_of(self._pinned.images, product_ids, ["product_id", "ordinal", "thumbnail"]):
                for row in rows.to_pylist():
                    known = first.get(row["product_id"])
                    if row["thumbnail"] and (known is None or row["ordinal"] < known[0]):
                        first[row["product_id"]] = (row["ordinal"], row["thumbnail"])
        return {product_id: thumbnail for product_id, (_, thumbnail) in first.items()}


def _request(
    pinned: Pinned,
    *,
    mode: str = "avg",
    k: int = 10,
    offset: int = 0,
    columns: Sequence[str] | None = None,
    where: Where | None = None,
    exact: bool = False,
    diversify: Diversify | None = None,
    collapse_duplicates: float | None = None,
) -> Request:
    return check(pinned.schema, mode, k, offset, columns, where, exact, diversify, collapse_duplicates)


@contextmanager
def _reading(pinned: Pinned) -> Iterator[None]:
    """What Lance says of a table that cannot be read any more, as one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise QueryError(
            f"Release {pinned.release.release} cannot be read any more ({first_line(error)}): where it was pruned, "
            "`refresh()` or opening the database anew moves to the newest."
        ) from error


def _check_words(request: Request, words: Sequence[str]) -> None:
    if request.mode == "hybrid" and not all(words):
        raise QueryError("A hybrid search needs words: a text, or a Mixture with one.")


def _reach(db: str) -> None:
    from pipeline.store.tables import Database, reach_database

    try:
        reach_database(Database(db))
    except (OSError, ValueError) as error:
        raise QueryError(f"The database {db} cannot be read: {error}") from error


def _find(db: str, number: int | None) -> Release:
    from pipeline.store.releases import get_release, newest_release

    try:
        if number is not None:
            if isinstance(number, bool) or not isinstance(number, int):
                raise QueryError(f"A release is a whole number, not {shown(number)}.")
            return get_release(db, number)
        newest = newest_release(db)
    except (OSError, ValueError) as error:
        raise QueryError(f"The releases of {db} cannot be read: {error}") from error
    if newest is None:
        raise QueryError(f"Nothing is released in {db}: run jobs.backfill first, or check the path.")
    return newest


def _pin(db: str, release: Release, model: str | None, device: str, encoder: Encoder | None = None) -> Pinned:
    import lancedb

    try:
        connection = lancedb.connect(db)
        tables = {name: connection.open_table(name) for name in ("products", "images")}
        for name, table in tables.items():
            table.checkout(release.versions[name])
        schema = tables["products"].schema
    except (OSError, ValueError, RuntimeError) as error:
        raise QueryError(f"Release {release.release} of {db} cannot be opened: {error}") from error
    dim = schema.field("avg_vector").type.list_size
    if encoder is None or encoder.dim != dim:
        settings = dict(release.model_settings)
        if model is not None:
            settings.pop("revision", None)  # of the release's own name
        encoder = Encoder(model or release.model, release.model_id, dim, settings=settings, device=device)
    texts = {
        column for index in tables["products"].list_indices() if index.index_type == "FTS" for column in index.columns
    }
    return Pinned(release, tables["products"], tables["images"], schema, encoder, tuple(sorted(texts)))
