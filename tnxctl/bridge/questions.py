"""Questions to daemons that are under way: whoever asks the same meanwhile gets the same answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Questions:
    """Questions of one worker. Many clients that ask at a time cost a daemon one answer, not one for each."""

    def __init__(self) -> None:
        self._under_way: dict[Hashable, asyncio.Future[Any]] = {}

    async def share(self, question: Hashable, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer to a question, of which one is under way at a time. Whoever is cancelled leaves it to the others.

        Args:
            question: what makes it the same one.
            ask: asks it, if nobody does. Raises what it raises, to all who wait.
        """
        asking = self._under_way.get(question)
        if asking is None or asking.done():
            asking = self._under_way[question] = asyncio.ensure_future(ask())
            asking.add_done_callback(partial(self._end, question))
        answer: T = await asyncio.shield(asking)
        return answer

    def forget(self) -> None:
        """Share no question that is under way with those who ask from now on."""
        self._under_way.clear()

    def _end(self, question: Hashable, asked: asyncio.Future[Any]) -> None:
        if self._under_way.get(question) is asked:
            del self._under_way[question]
        if not asked.cancelled():
            asked.exception()  # taken note of, which asyncio would log where those who have asked are gone
