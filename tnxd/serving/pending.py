"""Predict requests between arrival and answer: their executions, and the headers of their results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.strings import encode as encode_strings
from tnxctl.protocol.wire import VERSION, Predict, Result, Span, TensorSpec, Timing, encode
from tnxd.deployment.version import Version
from tnxd.executors.execution import Execution
from tnxd.models.model import BoundInputs, Item, Model, row_count
from tnxd.scheduling.device import Batch
from tnxd.scheduling.request import NEVER, Request
from tnxd.transport.clients import Connection
from tnxd.transport.router import Message


class Pending(Request, kw_only=True):
    """A predict request between its arrival and its answer.

    Attributes:
        connection, delimited, id: address of the answer.
        version: the version that was asked. served: its model.
        arrays: the inputs in the order of the signature; they keep the received frames alive.
        max_reply_bytes: largest reply that the client takes. attempt: as in `Predict`.
        space: part of the shared memory of the connection, for the outputs; None: they go out as frames.
        received_ns, queued_ns: when the frames were taken up, and when the scheduler had the request, of
            `time.perf_counter_ns`.
    """

    connection: Connection
    delimited: bool
    id: int
    version: Version
    served: Model
    arrays: Item
    max_reply_bytes: int
    received_ns: int
    queued_ns: int
    attempt: int = 1
    space: Span | None = None


Answer = tuple[Pending, Result, bytes, tuple[Array, ...]]
"""A request, its result, that as a header, and the frames of the outputs."""


class Owner(Protocol):
    """Whoever made a `StepRequest`, and hears of its end, instead of a client."""

    def succeeded(self, request: StepRequest, outputs: tuple[Array, ...], execution: Execution, rows: int) -> None:
        """The request has been computed. Args: rows: of its batch."""

    def failed(self, request: StepRequest, error: TensorNextError) -> None:
        """The request will not be computed."""


class StepRequest(Pending, kw_only=True):
    """A request that belongs to a larger one, whose client it does not answer.

    Attributes:
        owner: hears of its end. whole: the request that it belongs to. place: of it among the parts of that one.
    """

    owner: Owner
    whole: Pending
    place: int


def as_pending(
    message: Message,
    request: Predict,
    version: Version,
    model: Model,
    bound: BoundInputs,
    received_ns: int,
    came_ns: int,
    max_delay_us: float,
) -> Pending:
    """The pending request of a message.

    Args:
        bound: the inputs, held against the signature of the model.
        received_ns: when the frames were taken up. came_ns: when they came; the deadline counts from then.
        max_delay_us: longest wait for company, in microseconds, where the model has no limit of its own.
    """
    deadline_us = model.deadline_us if request.deadline_us is None else request.deadline_us
    delay_us = max_delay_us if model.max_delay_us is None else model.max_delay_us
    return Pending(  # the first ones by position: by name, this would take four times as long
        model.key,
        model.max_units,
        bound.units,
        bound.nbytes,
        bound.group,
        message.connection.client.name,
        message.peer,
        request.device,
        request.prefer_gpu,
        request.min_gpu_memory_mb,
        model.priority if request.priority is None else request.priority,
        NEVER if deadline_us is None else came_ns + int(deadline_us * 1e3),
        int(delay_us * 1e3),
        came_ns,
        bound.length,
        model.max_batch_size,
        share=message.connection.client.share,
        connection=message.connection,
        delimited=message.delimited,
        id=request.id,
        version=version,
        served=model,
        arrays=bound.arrays,
        max_reply_bytes=request.max_reply_bytes,
        received_ns=received_ns,
        queued_ns=received_ns,
        attempt=request.attempt,
    )


def as_execution(batch: Batch) -> Execution:
    """The execution of a batch of pending requests."""
    requests = batch.requests
    first = requests[0]
    assert isinstance(first, Pending)
    items = [request.arrays for request in requests]  # type: ignore[attr-defined]
    rows = [row_count(item) for item in items] if first.served.joins else [request.rows for request in requests]
    crowded = batch.device.chip is not None and not batch.alone
    return Execution(batch.lane, batch.max_rows, first.served, items, rows, first.group, batch.threads, crowded=crowded)


def as_frames(outputs: Sequence[Array]) -> tuple[Array, ...]:
    """Outputs as they go out: strings are put into one buffer each."""
    return tuple([encode_strings(array) if array.dtype.hasobject else array for array in outputs])


def as_result(request: Pending, batch_rows: int, execution: Execution, outputs: tuple[Array, ...]) -> Result:
    """The result of a request. Args: batch_rows: sum of the rows of all requests in the batch."""
    model, received_ns, queued_ns = request.served, request.received_ns, request.queued_ns
    now = time.perf_counter_ns()
    return Result(
        v=VERSION,
        id=request.id,
        model=model.name,
        version=model.version,
        outputs=described(model.outputs, outputs),
        device=request.device,
        reason=request.reason,
        batch_size=batch_rows,
        latency_ms=execution.latency_us / 1e3,
        gpu_memory_mb=execution.memory_free_mb,
        timing=Timing(
            receive_us=(queued_ns - received_ns) / 1e3,
            queue_us=(execution.started_ns - queued_ns) / 1e3,
            gather_us=execution.gather_us,
            h2d_us=execution.h2d_us,
            compute_us=execution.compute_us,
            d2h_us=execution.d2h_us,
            reply_us=(now - execution.finished_ns) / 1e3,
            total_us=(now - received_ns) / 1e3,
        ),
        predicted_us=request.predicted_us,
    )


def as_answer(request: Pending, result: Result, frames: tuple[Array, ...]) -> Answer:
    """The answer that a result makes: with its outputs as frames, or in shared memory if they fit there."""
    segment = request.connection.segment
    if request.space is not None and segment is not None:
        spans = segment.place(request.space, frames)
        if spans is not None:
            result, frames = msgspec.structs.replace(result, shared=spans), ()
    return request, result, encode(result), frames


def described(expected: tuple[TensorSpec, ...], outputs: tuple[Array, ...]) -> tuple[TensorSpec, ...]:
    """Outputs as a header describes them. Args: expected: as the signature does."""
    if len(outputs) == 1:  # most models; a fifth of the time that a comprehension takes
        spec = expected[0]
        return (TensorSpec(spec.name, spec.datatype, outputs[0].shape),)
    return tuple(
        [TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in zip(expected, outputs, strict=True)]
    )
