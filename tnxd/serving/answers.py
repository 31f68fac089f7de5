"""Answers to requests: results, errors, and the end of what is kept for a request."""

from __future__ import annotations

from collections.abc import Sequence

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Cancelled, DeadlineExceeded, ResourceExhausted, TensorNextError
from tnxd.executors.execution import Execution
from tnxd.scheduling.request import Request
from tnxd.serving.pending import Pending, StepRequest
from tnxd.serving.replies import error_header
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.traces import Traces
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router

Answer = tuple[Pending, bytes, tuple[Array, ...]]
"""A request, the header of its result, and the frames of the outputs."""


class Answers:
    """Sender of answers, one for each request; afterwards a request is done.

    Args:
        admission: who has how much in flight.

    Attributes:
        traces: of sampled requests.
    """

    def __init__(self, router: Router, admission: Admission, telemetry: Telemetry, traces: Traces) -> None:
        self.traces = traces
        self._traced = traces.under_way
        self._router = router
        self._admission = admission
        self._telemetry = telemetry

    def results(self, answers: Sequence[Answer], execution: Execution) -> None:
        """Send results of an execution, one after the other."""
        send = self._router.send
        sent = [send(request.peer, request.delimited, (header, outputs)) for request, header, outputs in answers]
        if self._traced:
            self.traces.answered([request for request, _, _ in answers], execution)
        for (request, _, _), taken in zip(answers, sent, strict=True):
            self.close(request)
            actual_us = (execution.finished_ns - request.queued_ns) / 1e3
            self._telemetry.observe_prediction(request.predicted_us, actual_us)
            if taken:
                self._telemetry.replies += 1
            else:
                error = ResourceExhausted("the client does not take its replies: no room is left for this one")
                self.send_error(request.peer, request.delimited, request.id, error, request.model)

    def error(self, request: Request, error: TensorNextError, execution: Execution | None = None) -> None:
        """Answer a request with an error; of a part of another one, its owner hears instead of a client.

        Args:
            execution: that it was part of, if it ran.
        """
        assert isinstance(request, Pending)
        if isinstance(request, StepRequest):
            request.owner.failed(request, error)
            return
        if self._traced:
            self.traces.failed(request, error, execution)
        self.close(request)
        self.send_error(request.peer, request.delimited, request.id, error, request.model)

    def abandon(self, request: Pending) -> None:
        """End a request whose client is gone."""
        if self._traced:
            self.traces.failed(request, Cancelled("the client is gone"), None)
        self.close(request)

    def late(self, request: Request) -> None:
        """Answer a request that its deadline has passed."""
        allowed_ms = (request.deadline_ns - request.came_ns) / 1e6
        error = DeadlineExceeded(f"the deadline of {allowed_ms:.3g} ms has passed", retry_after_s=allowed_ms / 1e3)
        self.error(request, error)

    def close(self, request: Pending) -> None:
        """End a request that has been answered, or that nobody waits for any more."""
        request.done = True
        request.arrays = ()  # the scheduler may remember the request until its deadline
        self._admission.release(request)

    def send_error(
        self, peer: bytes, delimited: bool, id_: int | None, error: TensorNextError, model: str = ""
    ) -> None:
        """Send an error to a peer. Args: id_: of its request; None: unknown. model: that the request was about."""
        self._telemetry.count_error(error.code, model)
        self._router.send(peer, delimited, (error_header(id_, error), ()))
