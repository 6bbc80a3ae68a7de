"""Single questions answered together: what is asked while one call runs goes into the next call."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

from pipeline.query import Searcher
from pipeline.serve.searches import Busy

Answer = TypeVar("Answer")


class Batches(Generic[Answer]):
    """Collects keys of concurrent requests for a function that takes many at once.

    An idle function is called at once with a single key, so that nobody waits for company; under load batches fill
    themselves while the call before runs. A timer would only add its time to both.

    Args:
        call: gives the answers for keys of one release, in their order; it runs in `executor`.
        executor: of one thread.
        most: keys in one call.
        waiting: keys that may wait; more are refused as Busy.
        seen: told the size of each batch.
    """

    def __init__(
        self,
        call: Callable[[Searcher, list[str]], Sequence[Answer]],
        executor: Executor,
        *,
        most: int,
        waiting: int,
        seen: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._call = call
        self._executor = executor
        self._most = most
        self._waiting = waiting
        self._seen = seen
        self._asked: deque[tuple[Searcher, str, asyncio.Future[Answer]]] = deque()
        self._runner: asyncio.Task[None] | None = None

    async def ask(self, searcher: Searcher, key: str) -> Answer:
        """The answer for one key.

        Args:
            searcher: held on a release; a batch is of one release.
            key: what the function takes.

        Raises:
            Busy: too many wait already.
        """
        if len(self._asked) >= self._waiting:
            raise Busy
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._asked.append((searcher, key, answer))
        if self._runner is None:
            self._runner = loop.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        """Call until nobody waits."""
        await asyncio.sleep(0)  # those that came with the same turn of the loop are one batch
        while batch := self._next():
            await self._answer(batch)
        self._runner = None

    def _next(self) -> list[tuple[Searcher, str, asyncio.Future[Answer]]]:
        """The oldest questions, of one release; those whose asker went away are dropped."""
        batch: list[tuple[Searcher, str, asyncio.Future[Answer]]] = []
        while self._asked and len(batch) < self._most:
            searcher, _, answer = self._asked[0]
            if batch and searcher.release is not batch[0][0].release:
                break
            asked = self._asked.popleft()
            if not answer.done():
                batch.append(asked)
        return batch

    async def _answer(self, batch: list[tuple[Searcher, str, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        self._seen(len(batch))
        keys = [key for _, key, _ in batch]
        try:
            answers = await loop.run_in_executor(self._executor, self._call, batch[0][0], keys)
        except Exception as error:  # whatever it is, it belongs to whoever asked
            if len(batch) > 1:
                for asked in batch:  # so that one bad key fails alone
                    await self._answer([asked])
            elif not batch[0][2].done():
                batch[0][2].set_exception(error)
            return
        for (_, _, waiting), found in zip(batch, answers, strict=True):
            if not waiting.done():
                waiting.set_result(found)
