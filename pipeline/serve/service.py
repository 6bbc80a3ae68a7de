"""What answers requests: a searcher that follows releases, batches through the text tower, threads that search."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import first_line
from pipeline.query import Diversify, Searcher
from pipeline.serve.answers import schema_answer, search_answer, similar_answer, texts_of
from pipeline.serve.batches import Batches
from pipeline.serve.metrics import Metrics
from pipeline.serve.searches import Searches

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 32
WAITING = 64
"""So many requests may wait for a thread; more are told to come again."""

_WAITING_KEYS = 1_024


class Service:
    """Answers of one database.

    Args:
        searcher: opened; it is refreshed here, and by nobody else.
        metrics: are told what happens.
        threads: searches at once.
    """

    def __init__(self, searcher: Searcher, metrics: Metrics, *, threads: int, waiting: int = WAITING) -> None:
        self.metrics = metrics
        self._searcher = searcher
        self._searches = Searches(threads, waiting)
        self._tower = ThreadPoolExecutor(1, thread_name_prefix="text tower")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="thumbnails")
        self._follower = ThreadPoolExecutor(1, thread_name_prefix="releases")
        self._texts = Batches(
            Searcher.encode, self._tower, most=TEXTS_AT_ONCE, waiting=_WAITING_KEYS, seen=metrics.text_batch.observe
        )
        self._pictures = Batches(_thumbnails, self._reader, most=64, waiting=_WAITING_KEYS)
        self._schema: tuple[int, bytes] | None = None
        self._said = ""
        metrics.release.set(searcher.release.release)
        metrics.searches.set_function(lambda: len(self._searches))

    @property
    def searcher(self) -> Searcher:
        """Held on the newest release that is known."""
        return self._searcher.held()

    async def search(self, query: object, chosen: Mapping[str, Any], mark: float | None) -> bytes:
        """The answer to a search, as JSON."""
        held = self.searcher
        await self._embed(held, query)
        return await self._searches.run(lambda: search_answer(held, query, chosen, mark))

    async def similar(self, product_id: str, chosen: Mapping[str, Any], mark: float | None) -> bytes:
        """Products like one, as JSON."""
        held = self.searcher
        return await self._searches.run(lambda: similar_answer(held, product_id, chosen, mark))

    async def schema(self) -> bytes:
        """What may be asked, as JSON; read once for each release."""
        held = self.searcher
        number = held.release.release
        if self._schema is None or self._schema[0] != number:
            self._schema = number, await self._searches.run(lambda: schema_answer(held))
        return self._schema[1]

    async def thumbnail(self, product_id: str) -> tuple[int, bytes | None]:
        """The release, and the JPEG of a product in it."""
        held = self.searcher
        return held.release.release, await self._pictures.ask(held, product_id)

    def warm(self) -> None:
        """Load what first searches would wait for: the text tower, each index, k-means; an image tower may never be."""
        held = self.searcher
        for mode in held.modes:
            held.search("warm", mode=mode, diversify=Diversify())

    async def follow(self, every_s: float) -> None:
        """Move to new releases as they come; what is being answered stays on its own."""
        while every_s:
            await asyncio.sleep(every_s)
            await asyncio.get_running_loop().run_in_executor(self._follower, self._refresh)

    def _refresh(self) -> None:
        before, said = self._searcher.release, ""
        try:
            if self._searcher.refresh():
                release = self._searcher.release
                log.info("release %d takes the place of %d", release.release, before.release)
                self.metrics.release.set(release.release)
                if release.model_id != before.model_id:
                    self._tower.submit(self._searcher.held().encode, ["warm"])
        except Exception as error:  # whatever it is, the next look may go well
            said = first_line(error)
            if said != self._said:  # once, and not every few seconds
                log.warning("release %d stays: %s", before.release, said)
        self._said = said

    def close(self, within_s: float) -> bool:
        """Take no more searches; whether those that run ended in time."""
        for pool in (self._tower, self._reader, self._follower):
            pool.shutdown(wait=False, cancel_futures=True)
        return self._searches.close(within_s)

    async def _embed(self, held: Searcher, query: object) -> None:
        """Have the vectors of a query's texts remembered."""
        fresh = [text for text in dict.fromkeys(texts_of(query)) if not held.knows(text)]
        if fresh:
            await asyncio.gather(*(self._texts.ask(held, text) for text in fresh))


def _thumbnails(searcher: Searcher, product_ids: list[str]) -> list[bytes | None]:
    found = searcher.thumbnails(product_ids)
    return [found.get(product_id) for product_id in product_ids]
