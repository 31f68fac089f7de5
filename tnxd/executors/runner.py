"""Run one execution on one device: whole if it works, in halves until the request that fails stands alone."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tnxctl.errors import Internal, ResourceExhausted, TensorNextError, Unavailable
from tnxctl.frames import Array
from tnxd.batching import split
from tnxd.executors.execution import Execution, Outcome

log = logging.getLogger(__name__)

Replicas = Mapping[str, torch.nn.Module]
"""Model name -> its module on the runner's device, shared by all lanes of that device."""


class Runner(ABC):
    """Runs executions one at a time, on the thread that calls it.

    A subclass knows one kind of device: it implements `forward` and adds to the stages of the execution.
    """

    def __init__(self, device: str, replicas: Replicas) -> None:
        self.device = device
        self.replicas = replicas
        self._inference_mode = torch.inference_mode()

    def enter_thread(self) -> None:
        """Prepare the calling thread, once, before its first `run`."""
        # A property of the thread, and it ends with this object: entered without a name, it would end at once.
        self._inference_mode.__enter__()

    @abstractmethod
    def forward(self, execution: Execution, items: Sequence[tuple[Array, ...]], rows: int) -> list[Array]:
        """Run the model once on the rows of `items`, in order.

        Adds to gather_us, h2d_us, d2h_us and latency_us of the execution.

        Returns:
            One C-contiguous array `[rows, ...]` per output, in memory that no later batch writes.
        """

    def is_lost(self) -> bool:
        """Whether an accelerator's error is for good. Asked after one."""
        return True

    def run(self, execution: Execution) -> None:
        """Fill the outcomes and stages of the execution. Never raises: a failure is the outcome of its request."""
        execution.started_ns = time.perf_counter_ns()
        execution.outcomes = self._attempt(execution, 0, len(execution.items))
        execution.finished_ns = time.perf_counter_ns()
        execution.compute_us = (
            (execution.finished_ns - execution.started_ns) / 1e3
            - execution.gather_us
            - execution.h2d_us
            - execution.d2h_us
        )

    def _attempt(self, execution: Execution, start: int, stop: int) -> list[Outcome]:
        """Outcomes of the items from start up to stop."""
        if execution.fatal:
            lost: list[Outcome] = [Unavailable(f"{self.device} failed: {execution.fatal}")]
            return lost * (stop - start)
        rows = execution.rows[start:stop]
        try:
            if len(rows) == 1 and 0 < execution.model.max_batch_size < rows[0]:
                outputs = self._in_chunks(execution, execution.items[start], rows[0])
            else:
                outputs = self.forward(execution, execution.items[start:stop], sum(rows))
            return [*split(outputs, rows)]
        except BaseException as error:  # a model may raise anything, SystemExit too: the daemon goes on
            if isinstance(error, torch.AcceleratorError) and self.is_lost():
                execution.fatal = first_line(error)
            failure = self._failure(execution, error)
        # Out of the except block: the traceback no longer holds the failed batch's tensors while the halves run.
        if stop - start == 1 or execution.fatal:
            return [failure] * (stop - start)
        middle = (start + stop) // 2
        return self._attempt(execution, start, middle) + self._attempt(execution, middle, stop)

    def _in_chunks(self, execution: Execution, item: tuple[Array, ...], rows: int) -> list[Array]:
        """A request with more rows than the model takes at once: run in pieces, joined again."""
        step = execution.model.max_batch_size
        pieces = [
            self.forward(execution, [tuple(array[at : at + step] for array in item)], min(step, rows - at))
            for at in range(0, rows, step)
        ]
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _failure(self, execution: Execution, error: BaseException) -> TensorNextError:
        model = execution.model
        if isinstance(error, TensorNextError):
            log.error("%s on %s: %s", model.name, self.device, error)
            return error.with_traceback(None)  # which would keep the inputs alive
        if isinstance(error, torch.OutOfMemoryError):
            log.error("%s on %s: out of memory: %s", model.name, self.device, first_line(error))
            return ResourceExhausted(f"{self.device} has no memory left for this request: {first_line(error)}")
        log.error("%s on %s raised", model.name, self.device, exc_info=error)
        if execution.fatal:
            return Unavailable(f"{self.device} failed: {execution.fatal}")
        return Internal(f"model {model.name!r} raised {type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """What an exception says, as far as a header can carry it; it may be of any class, with any __str__."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be shown)"
    return (text.splitlines() or [""])[0][:200].encode("utf-8", "replace").decode()
