"""Traces: what is noted of sampled requests, for the thread that makes spans of it (`tnxd.tracing`).

A request that is not sampled costs one look at a field of its header, and the answers of a batch one look at whether
any sampled request is under way.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.traceparent import sampled
from tnxctl.protocol.wire import Predict, StepTiming
from tnxd.events import model_fields
from tnxd.executors.execution import Execution
from tnxd.models.model import row_count
from tnxd.serving.pending import Answer, Pending
from tnxd.tracing.notes import Note, Notes, Stages


class _Traced:
    """A sampled request that is under way. Attributes: steps: of a pipeline that are done."""

    __slots__ = ("steps", "traceparent")

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent
        self.steps: tuple[StepTiming, ...] = ()


class Traces:
    """Sampled requests that are under way, and notes about them once they are over.

    Args:
        notes: takes the notes; None: nothing is recorded.

    Attributes:
        under_way: the sampled requests; empty most of the time.
    """

    def __init__(self, notes: Notes | None) -> None:
        self._notes = notes
        self.under_way: dict[Pending, _Traced] = {}

    def begin(self, request: Pending, header: Predict) -> None:
        """A request that has a traceparent was taken in."""
        if self._notes is not None:
            traceparent = sampled(header.traceparent)
            if traceparent:
                self.under_way[request] = _Traced(traceparent)

    def refused(self, header: Predict, model: str, client: str, received_ns: int, error: TensorNextError) -> None:
        """A request that has a traceparent was not taken in. Args: model: as its client calls it."""
        traceparent = "" if self._notes is None else sampled(header.traceparent)
        if self._notes is not None and traceparent:
            attributes = {**_about(model), "tnx.client": client, "tnx.request_id": header.id}
            attributes["tnx.attempt"] = header.attempt
            ended_ns = time.perf_counter_ns()
            note = Note(traceparent, attributes, received_ns, ended_ns, code=error.code, message=error.message)
            self._notes.put(note)

    def add_steps(self, request: Pending, steps: Iterable[StepTiming]) -> None:
        """The steps of a pipeline that were done. To be called before its end."""
        traced = self.under_way.get(request)
        if traced is not None:
            traced.steps = tuple(steps)

    def answered(self, answers: Iterable[Answer]) -> None:
        """These requests are about to be over, with results."""
        ended_ns = time.perf_counter_ns()
        for request, result, _, _ in answers:
            timing = result.timing
            started_ns = request.queued_ns + round(timing.queue_us * 1e3)
            took_us = timing.gather_us + timing.h2d_us + timing.compute_us + timing.d2h_us
            finished_ns = started_ns + round(took_us * 1e3)
            stages = Stages(started_ns, timing.gather_us, timing.h2d_us, timing.compute_us, timing.d2h_us, finished_ns)
            self._end(request, ended_ns, result.device, result.batch_size, stages)

    def failed(self, request: Pending, error: TensorNextError, execution: Execution | None) -> None:
        """A request is about to be over, with an error. Args: execution: that it was part of, if it ran."""
        ended_ns = time.perf_counter_ns()
        if execution is None:
            self._end(request, ended_ns, "", 0, None, error)
            return
        stages = Stages(
            execution.started_ns,
            execution.gather_us,
            execution.h2d_us,
            execution.compute_us,
            execution.d2h_us,
            execution.finished_ns,
        )
        self._end(request, ended_ns, request.device, sum(execution.rows), stages, error)

    def _end(
        self,
        request: Pending,
        ended_ns: int,
        device: str,
        batch_size: int,
        stages: Stages | None,
        error: TensorNextError | None = None,
    ) -> None:
        """Note what became of a request, if it is sampled. Args: device, batch_size: "" and 0 if it never ran."""
        traced = self.under_way.pop(request, None)
        if traced is None or self._notes is None:
            return
        attributes: dict[str, str | int | float] = {
            "tnx.model": request.served.name,
            "tnx.version": request.served.version,
            "tnx.client": request.connection.client.name,
            "tnx.request_id": request.id,
            "tnx.attempt": request.attempt,
            "tnx.rows": row_count(request.arrays),
            "tnx.reason": request.reason,
            "tnx.predicted_us": request.predicted_us,
        }
        if device:
            attributes.update({"tnx.device": device, "tnx.batch_size": batch_size})
        self._notes.put(
            Note(
                traced.traceparent,
                attributes,
                request.received_ns,
                ended_ns,
                request.queued_ns,
                None if traced.steps else stages,
                traced.steps,
                "" if error is None else error.code,
                "" if error is None else error.message,
            )
        )


def _about(model: str) -> dict[str, str | int | float]:
    return {f"tnx.{name}": value for name, value in model_fields(model).items()}
