"""Runner of executions on one device: a batch runs whole, or in halves until the request that fails stands alone.

A request with more rows than fit, into the model's limit or into memory, runs in pieces.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, Internal, ResourceExhausted, TensorNextError, Unavailable
from tnxd.error_text import first_line, sentence
from tnxd.events import event, speaker
from tnxd.executors.batching import Staging, split
from tnxd.executors.execution import Execution, Outcome
from tnxd.executors.exhaustion import is_out_of_memory
from tnxd.executors.host import Peak
from tnxd.executors.padding import pad, padded_shapes, split_ragged, units
from tnxd.executors.trial.copies import Call
from tnxd.models.model import Item, Model
from tnxd.models.python.failures import ProcessError
from tnxd.models.tensors import empty_outputs

log = logging.getLogger(__name__)

_modes = threading.local()


class Failure(NamedTuple):
    """Failure of some requests together.

    Attributes:
        final: the error of each of them; None: their halves may fare better.
        exhausted: whether memory ran out. emptied: see `Runner.free_memory`.
        why: in words.
    """

    final: TensorNextError | None
    exhausted: bool
    why: str
    emptied: bool


class Runner(ABC):
    """Runner of executions, one at a time, on the thread that calls it.

    A subclass knows one kind of device: it implements `forward` and adds to the stages of the execution.

    Args:
        device: name of the device, as torch has it. staging: buffers that batches are gathered in.

    Attributes:
        calls: key of a model -> its call, see `tnxd.executors.trial.copies`. Other threads change it.
        plain_calls: the same of the network as it is, where a variant of it runs.
        yields: whether the lanes that serve go first on the device. Set before `enter_thread`.
    """

    def __init__(self, device: str, staging: Staging) -> None:
        self.device = device
        self.torch_device = torch.device(device)
        self.calls: dict[str, Call] = {}
        self.plain_calls: dict[str, Call] = {}
        self.staging = staging
        self.yields = False

    def enter_thread(self) -> None:
        """Prepare the calling thread, once, before its first `run`."""
        infer_only()

    @abstractmethod
    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        """Run the model once on the rows of `items`, in order.

        Adds to gather_us, h2d_us, d2h_us and latency_us of the execution.

        Returns:
            One C-contiguous array `[rows, ...]` per output, in memory that no later batch writes.
        """

    def call(self, execution: Execution) -> Call:
        """The call that an execution is for."""
        key = execution.model.key
        if execution.plain:
            plain = self.plain_calls.get(key)
            if plain is not None:  # else it was given up, or there is none
                return plain
        return self.calls[key]

    def settle(self) -> None:  # noqa: B027 - a CPU has nothing under way
        """Wait until what the lane's thread has made, such as parts of a model, can be used by all."""

    def is_lost(self) -> bool:
        """Whether the device is lost for good. Asked after an accelerator's error."""
        return True

    def is_exhausted(self, error: BaseException) -> bool:
        """Whether a forward failed because the device has no memory left."""
        return is_out_of_memory(error)

    @abstractmethod
    def free_memory(self, *, emptied: bool) -> None:
        """Give memory back that is kept for reuse. Called after a forward ran out of memory, before a smaller one.

        Args:
            emptied: whether torch's allocator has done so, as it does before it says that memory has run out.
        """

    @abstractmethod
    def memory_left(self) -> int:
        """Free memory of the device now, in bytes; 0 if that is not known."""

    @abstractmethod
    def measured(self) -> AbstractContextManager[Peak]:
        """Peak memory of a block on the device, on top of the memory that is taken already."""

    def forget(self, key: str) -> None:
        """Free the buffers that are kept for the next batch of a model. Args: key: of the model."""
        self.staging.forget(key)

    def run(self, execution: Execution) -> None:
        """Fill the outcomes and stages of the execution. Never raises: a failure is the outcome of its request."""
        speaker.model = execution.model.key
        execution.started_ns = time.perf_counter_ns()
        execution.outcomes = self._attempt(execution, 0, len(execution.items))
        execution.finished_ns = time.perf_counter_ns()
        execution.compute_us = execution.run_us - execution.gather_us - execution.h2d_us - execution.d2h_us

    def _attempt(self, execution: Execution, start: int, stop: int) -> list[Outcome]:
        """Outcomes of the items from start up to stop."""
        if execution.fatal:
            lost: list[Outcome] = [Unavailable(f"{self.device} failed: {execution.fatal}")]
            return lost * (stop - start)
        rows = execution.rows[start:stop]
        if not any(rows) and execution.model.max_batch_size:
            empty = empty_outputs(execution.model)
            if empty is not None:  # many a program cannot run no rows
                return [*split(empty, rows)]
        try:
            if stop - start == 1:
                return [tuple(self._alone(execution, execution.items[start], rows[0]))]
            items = execution.items[start:stop]
            return outcomes_of(execution.model, self._forward(execution, items, sum(rows)), items, rows)
        except BaseException as error:  # a model may raise anything, SystemExit too: the daemon goes on
            failure = self._understood(execution, error, start, stop)
        # Out of the except block: the traceback no longer holds the failed batch's tensors while the halves run.
        return self._after(execution, failure, start, stop)

    def _understood(self, execution: Execution, error: BaseException, start: int, stop: int) -> Failure:
        """The failure of the items from start up to stop together. It does not hold the error."""
        if isinstance(error, torch.AcceleratorError) and self.is_lost():
            execution.fatal = first_line(error)
        exhausted = self.is_exhausted(error)
        final = stop - start == 1 or bool(execution.fatal) or isinstance(error, ProcessError)
        final = final or (exhausted and execution.crowded)
        # Else its halves have more to say.
        told = self._failure(execution, error) if final or exhausted else None
        return Failure(told if final else None, exhausted, first_line(error), isinstance(error, torch.OutOfMemoryError))

    def _after(self, execution: Execution, failure: Failure, start: int, stop: int) -> list[Outcome]:
        """Outcomes of the items from start up to stop, which have failed together."""
        if failure.final is not None:
            return [failure.final] * (stop - start)
        if failure.exhausted:
            self.free_memory(emptied=failure.emptied)
        middle = (start + stop) // 2
        outcomes = self._attempt(execution, start, middle) + self._attempt(execution, middle, stop)
        if not failure.exhausted and not any(isinstance(outcome, TensorNextError) for outcome in outcomes):
            count, why = stop - start, failure.why
            log.error(
                "%s on %s: %d requests failed together: %s",
                *(execution.model.name, self.device, count, why),
                extra=event("batch_failed", execution.model.key, device=self.device, count=count, reason=why),
            )
        return outcomes

    def _alone(self, execution: Execution, item: Item, rows: int) -> list[Array]:
        """Run one request, in pieces that are joined again where it has too many rows for one forward."""
        model = execution.model
        if not model.max_batch_size:
            return self._forward(execution, [item], rows)
        step = self._most_at_once(execution, item, rows)
        pieces: list[list[Array]] = []
        at = 0
        while at < rows or not pieces:
            count = min(step, rows - at)
            piece = (
                item if count == rows else tuple([None if array is None else array[at : at + count] for array in item])
            )
            try:
                pieces.append(self._forward(execution, [piece], count))
                at += count
                continue
            except BaseException as error:
                if count <= 1 or execution.crowded or not self.is_exhausted(error):
                    raise
                emptied = isinstance(error, torch.OutOfMemoryError)
            # Out of the except block, as above.
            log.warning(
                "%s on %s: no memory for %d rows at once",
                *(model.key, self.device, count),
                extra=event("out_of_memory", model.key, device=self.device, rows=count),
            )
            self.free_memory(emptied=emptied)
            step = count // 2
        return pieces[0] if len(pieces) == 1 else _joined(model, pieces, execution)

    @staticmethod
    def _most_at_once(execution: Execution, item: Item, rows: int) -> int:
        """Most rows of a request in one forward."""
        model = execution.model
        if not execution.max_rows:
            return model.max_batch_size
        most = execution.max_rows * rows // max(units(model, [item], rows), 1)
        return min(model.max_batch_size, max(most, 1))

    def _forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        """Run `forward`, and note how many rows the memory of the device allows."""
        try:
            outputs = self.forward(execution, items, rows)
        except BaseException as error:
            execution.exhausted = execution.exhausted or self.is_exhausted(error)
            raise
        if execution.exhausted:
            execution.safe_rows = max(execution.safe_rows, units(execution.model, items, rows))
        return outputs

    def staged(self, execution: Execution, items: Sequence[Item], rows: int, *, copy: bool) -> list[Array | None]:
        """Inputs of a forward, one array for each argument of the module.

        Args:
            copy: whether the inputs of a single request are copied, too.

        Returns:
            Arrays in staging buffers, which the next batch writes again, or those of the request itself.
        """
        model = execution.model
        if model.joins:
            assert model.ragged is not None
            if model.ragged.packed:
                return model.ragged.pack(items, model.name)
            if copy or len(items) > 1:
                room = partial(self.staging.room, model.key, execution.group)
                return pad(room, model, items, padded_shapes(model, items, rows))
        elif copy or len(items) > 1:
            return self.staging.gather(model.key, model.inputs, execution.group, items, rows)
        return list(items[0])

    def _failure(self, execution: Execution, error: BaseException) -> TensorNextError:
        model = execution.model
        if isinstance(error, TensorNextError):
            about = event("request_failed", model.key, device=self.device, error=error.code)
            log.error("%s on %s: %s", model.name, self.device, error, extra=about)
            return error.with_traceback(None)  # which would keep the inputs alive
        if self.is_exhausted(error) and not execution.fatal:
            about = event("out_of_memory", model.key, device=self.device, reason=first_line(error))
            if not execution.crowded:
                log.error("%s on %s: out of memory: %s", model.name, self.device, first_line(error), extra=about)
            return ResourceExhausted(f"{self.device} has no memory left for this request: {first_line(error)}")
        about = event("model_raised", model.key, device=self.device)
        log.error("%s on %s raised", model.name, self.device, exc_info=error, extra=about)
        if execution.fatal:
            return Unavailable(f"{self.device} failed: {execution.fatal}")
        return Internal(f"model {model.name!r} raised {sentence(error)}")


def infer_only() -> None:
    """Put the calling thread into torch's inference mode until it ends."""
    # torch 2.13 ends the mode of whatever thread frees this object: so it belongs to the thread, and to nothing else.
    if not torch.is_inference_mode_enabled():
        _modes.own = torch.inference_mode()
        _modes.own.__enter__()


def outcomes_of(model: Model, outputs: Sequence[Array], items: Sequence[Item], rows: Sequence[int]) -> list[Outcome]:
    """Outcomes of several requests, given the outputs of all together. Raises as `split_ragged`."""
    if model.joins:
        return [*split_ragged(model, outputs, items, rows)]
    return [*split(outputs, rows)]


def _joined(model: Model, pieces: Sequence[Sequence[Array]], execution: Execution) -> list[Array]:
    """Join the outputs of the pieces of a request along axis 0.

    Raises:
        FailedPrecondition: they do not fit together: the length of an output depends on the rows beside it.
    """
    outputs = []
    for spec, parts in zip(model.outputs, zip(*pieces, strict=True), strict=True):
        shapes = list(dict.fromkeys(part.shape[1:] for part in parts))
        if len(shapes) > 1:
            execution.mixes = (
                f"output {spec.name!r} of a piece of a request is {list(shapes[0])} in each row, "
                f"of another {list(shapes[1])}"
            )
            raise FailedPrecondition(
                f"model {model.name!r} takes {model.max_batch_size} rows at a time, and the pieces of this request "
                f"cannot be joined: {execution.mixes}"
            )
        outputs.append(np.concatenate(parts))
    return outputs
