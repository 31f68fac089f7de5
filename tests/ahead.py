"""Things that take long to make for a test, made while the tests before it run.

A daemon of its own, say: it spends more than a second on importing torch, and the tests keep one core busy.

    @pytest.fixture(scope="module")
    def making(request, tmp_path_factory):
        with Making(request, tmp_path_factory) as making:
            yield making

    @pytest.fixture
    def made(request, making):
        with making.of(request.node) as made:
            yield made

    @makes(daemon("--model", "wait"))  # what `makes` is given gets a folder and returns a context manager
    def test_something(made: Daemon) -> None:
        ...
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import pytest

_AT_ONCE = 2  # that are being made
_AHEAD = 4  # that are being made or wait for their tests

Make = Callable[[Path], AbstractContextManager[Any]]
Test = TypeVar("Test", bound=Callable[..., None])


def makes(make: Make) -> Callable[[Test], Test]:
    """Have `make` called in time for a test, with an empty folder, and its context entered."""

    def mark(test: Test) -> Test:
        test.makes = make  # type: ignore[attr-defined]
        return test

    return mark


class Making:
    """Enters the contexts for the tests of one module, in the order of the tests, in threads."""

    def __init__(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._room = threading.Semaphore(_AHEAD)
        self._is_over = False
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._waiting: dict[str, Future[tuple[Any, ExitStack]]] = {}
        for item in request.session.items:
            make = getattr(getattr(item, "function", None), "makes", None)
            if make is not None and item.path == request.path:
                folder = tmp_path_factory.mktemp("made")
                self._waiting[item.nodeid] = self._pool.submit(self._enter, make, folder)

    def _enter(self, make: Make, folder: Path) -> tuple[Any, ExitStack]:
        self._room.acquire()
        stack = ExitStack()
        return None if self._is_over else stack.enter_context(make(folder)), stack

    @contextmanager
    def of(self, test: pytest.Item) -> Iterator[Any]:
        """The thing that was made for a test. Its context ends with this one."""
        while next(iter(self._waiting)) != test.nodeid:  # one that was skipped
            self._drop(next(iter(self._waiting)))
        self._room.release()
        made, stack = self._waiting.pop(test.nodeid).result()
        with stack:
            yield made

    def _drop(self, nodeid: str) -> None:
        self._room.release()
        made = self._waiting.pop(nodeid)
        if not made.cancel() and made.exception() is None:
            made.result()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for nodeid in list(self._waiting):  # where the run stops at a failure
            self._drop(nodeid)
        self._pool.shutdown()
