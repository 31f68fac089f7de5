"""Threads that do something with each row of a batch. No torch."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_Done = queue.SimpleQueue[tuple[int, Any, BaseException | None]]
_Task = tuple[Callable[[int], Any], int, _Done]


class Workers:
    """Worker threads. They end with this object, and, unlike those of concurrent.futures, hold up no end of a process.

    Args:
        count: how many. name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._tasks = tasks
        for _ in range(count):
            threading.Thread(target=_work, args=(tasks,), name=name, daemon=True).start()
        weakref.finalize(self, _end, tasks, count).atexit = False

    def map(self, function: Callable[[int], Any], count: int) -> list[Any]:
        """Results of a function for 0 up to `count`, in order. Raises what the function raised, once all are done."""
        done: _Done = queue.SimpleQueue()
        for number in range(count):
            self._tasks.put((function, number, done))
        results: list[Any] = [None] * count
        failure: BaseException | None = None
        for _ in range(count):
            number, results[number], error = done.get()
            failure = failure or error
        if failure is not None:
            raise failure
        return results


def _end(tasks: queue.SimpleQueue[_Task | None], count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        function, number, done = task
        try:
            done.put((number, function(number), None))
        except BaseException as error:  # a model's code may raise anything
            done.put((number, None, error))
        del task, function, done  # hold no batch while waiting for the next
