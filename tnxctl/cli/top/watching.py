"""Reports of a daemon, asked for again and again in a thread of their own, so that a screen never waits for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.statistics import StatsReport

if TYPE_CHECKING:
    from tnxctl.client import Client

_LONGEST_WAIT_S = 1.0
_PATIENCE_S = 5.0


class Watcher:
    """Thread that asks a daemon for its counts until the block ends. It also closes the client then.

    Args:
        interval_s: from one question to the next.
        timeout_s: for an answer; never longer than a second or the interval, so that one sees soon that none comes.
        wake: called in the thread after each answer, and each error.
    """

    def __init__(self, client: Client, interval_s: float, timeout_s: float, wake: Callable[[], None]) -> None:
        self._client = client
        self._interval_s = interval_s
        self._timeout_s = min(timeout_s, max(interval_s, _LONGEST_WAIT_S))
        self._wake = wake
        self._outcomes: deque[StatsReport | Exception] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tnxctl-top", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._over.set()
        self._client.close()  # ends a question that is under way
        self._thread.join(_PATIENCE_S)

    def take(self) -> StatsReport | TensorNextError | None:
        """The oldest answer that was not taken, or the error in its place; None: there is none.

        Raises:
            Exception: that ended the thread.
        """
        if not self._outcomes:
            return None
        outcome = self._outcomes.popleft()
        if isinstance(outcome, StatsReport | TensorNextError):
            return outcome
        raise outcome

    def _watch(self) -> None:
        due = time.monotonic()
        is_well = True
        while is_well and not self._over.wait(max(due - time.monotonic(), 0.0)):
            due = max(due + self._interval_s, time.monotonic())
            try:
                outcome: StatsReport | Exception = self._client.stats(timeout=self._timeout_s)
            except Exception as error:
                outcome = error
                is_well = isinstance(error, TensorNextError)
            self._outcomes.append(outcome)
            self._wake()
