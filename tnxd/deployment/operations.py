"""Operations: work on the loop's thread, whose blocking parts run on a thread beside it.

An operation is a generator. What blocks it yields, as a function, and gets the result back when that has run on the
other thread. So an operation reads from top to bottom, and between two of its steps the loop serves.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tnxctl.protocol.errors import DeadlineExceeded, FailedPrecondition, TensorNextError
from tnxd.error_text import sentence
from tnxd.events import event
from tnxd.scheduling.loaded_models import LoadedModels

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Drained:
    """Yielded by an operation that goes on once no request of a model is waiting or running. Attributes: key: of it."""

    key: str


class StepTimeout(DeadlineExceeded):
    """A step that took too long. Its thread is left to itself. Attributes: step: its number; 0: no thread hangs."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


Operation = Generator[Callable[[], Any] | Drained, Any, T]
"""Yields functions to run on the other thread, and gets their results; raises TensorNextError if it fails."""

Done = Callable[[T | TensorNextError], None]
"""Called with what an operation returned, or with the reason why it failed."""

_Task = tuple[int, Callable[[], Any]]


class OperationRunner:
    """Runs operations, one after the other. All methods are called on the loop's thread.

    Args:
        models: know what each has to finish.
        call_soon: has the loop run a function; called from the other thread.
        timeout_s: a step that takes longer has failed. Its thread is left to itself: Python cannot end it.
        on_end: called after each operation, before its `Done`.

    Attributes:
        active: whether an operation is under way, and `poll` may have something to do.
    """

    def __init__(
        self,
        models: LoadedModels,
        call_soon: Callable[[Callable[[], None]], None],
        timeout_s: float,
        on_end: Callable[[], None],
    ) -> None:
        self.active = False
        self._models = models
        self._call_soon = call_soon
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._waiting: deque[tuple[Operation[Any], Done[Any]]] = deque()
        self._current: tuple[Operation[Any], Done[Any]] | None = None
        self._drained: Drained | None = None
        self._inbox: queue.SimpleQueue[_Task | None] | None = None
        self._step = 0
        self._step_until = float("inf")
        self._when_ended: dict[int, Callable[[], Operation[Any]]] = {}

    def submit(self, operation: Operation[T], done: Done[T], *, urgent: bool = False) -> None:
        """Run an operation after all that wait, or before them if it is urgent."""
        if urgent:
            self._waiting.appendleft((operation, done))
        else:
            self._waiting.append((operation, done))
        self._go_on()

    def when_ended(self, late: StepTimeout, make: Callable[[], Operation[Any]]) -> None:
        """Run an operation if the thread of a step that took too long comes to the end of it after all."""
        if late.step:
            self._when_ended[late.step] = make

    def poll(self) -> None:
        """Go on if what the current operation waits for has come. The loop calls it every turn while `active`."""
        if self._drained is not None and not self._models.outstanding(self._drained.key):
            self._drained = None
            self._resume(None, None)
        elif self._drained is not None and self._models.is_hung(self._drained.key):
            self._drained = None
            self._resume(None, DeadlineExceeded("a batch of it hangs"))
        elif self._current is not None and time.monotonic() > self._step_until:
            late = 0
            if self._drained is None and self._inbox is not None:
                self._inbox.put(None)  # its thread hangs in a model's code; should that end, it ends, too
                self._inbox = None
                late = self._step
            self._drained = None
            self._resume(None, StepTimeout(f"it took longer than load_timeout_s, {self._timeout_s:g} s", late))

    def _go_on(self) -> None:
        """Begin what waits, as long as nothing is under way. A loop: many may fail at their first step."""
        while self._current is None and self._waiting:
            self._current = self._waiting.popleft()
            self.active = True
            self._advance(partial(self._current[0].send, None))

    def _advance(self, resume: Callable[[], Callable[[], Any] | Drained]) -> None:
        """Let the current operation go on up to its next step."""
        assert self._current is not None
        _, done = self._current
        self._step += 1
        self._step_until = float("inf")
        try:
            step = resume()
        except StopIteration as stop:
            self._end(done, stop.value)
        except TensorNextError as error:
            self._end(done, error)
        except Exception as error:
            log.exception("loading", extra=event("defect"))
            self._end(done, FailedPrecondition(sentence(error)))
        else:
            self._step_until = time.monotonic() + self._timeout_s
            if isinstance(step, Drained):
                self._drained = step
                self.poll()
            else:
                if self._inbox is None:
                    self._inbox = queue.SimpleQueue()
                    threading.Thread(target=self._work, args=(self._inbox,), name="loading", daemon=True).start()
                self._inbox.put((self._step, step))

    def _end(self, done: Done[Any], outcome: Any) -> None:
        self._on_end()
        try:
            done(outcome)
        except Exception:
            log.exception("answering for an operation", extra=event("defect"))
        self._current = None
        self.active = False

    def _resume(self, result: Any, error: BaseException | None) -> None:
        assert self._current is not None
        operation = self._current[0]
        self._advance(partial(operation.send, result) if error is None else partial(operation.throw, error))
        self._go_on()

    def _work(self, inbox: queue.SimpleQueue[_Task | None]) -> None:
        """The thread beside the loop."""
        while True:
            task = inbox.get()
            if task is None:
                return
            number, step = task
            result: Any = None
            error: BaseException | None = None
            try:
                result = step()
            except Exception as raised:
                error = raised
            except BaseException as raised:  # a model's code may raise anything; GeneratorExit would end an operation
                error = FailedPrecondition(sentence(raised))
            self._call_soon(partial(self._step_done, number, result, error))
            del task, step, result, error  # hold no model's memory while waiting for the next

    def _step_done(self, number: int, result: Any, error: BaseException | None) -> None:
        if number == self._step and self._current is not None:
            self._resume(result, error)
        elif number in self._when_ended:
            self.submit(self._when_ended.pop(number)(), lambda outcome: None)
