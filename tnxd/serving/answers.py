"""Answers to requests: results, errors, and the end of what is kept for a request."""

from __future__ import annotations

from collections.abc import Sequence

from tnxctl.protocol.errors import Cancelled, DeadlineExceeded, ResourceExhausted, TensorNextError
from tnxd.executors.execution import Execution
from tnxd.scheduling.request import Request
from tnxd.scheduling.times import milliseconds
from tnxd.serving.pending import Answer, Pending, StepRequest
from tnxd.serving.replies import error_header
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.traces import Traces
from tnxd.serving.version_counts import VersionCounts
from tnxd.serving.version_traffic import TrafficByVersion
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router


class Answers:
    """Sender of answers, one for each request; afterwards a request is done.

    Args:
        admission: who has how much in flight. traffic: counts what becomes of requests.

    Attributes:
        traces: of sampled requests.
    """

    def __init__(
        self, router: Router, admission: Admission, telemetry: Telemetry, traffic: TrafficByVersion, traces: Traces
    ) -> None:
        self.traces = traces
        self._traced = traces.under_way
        self._router = router
        self._admission = admission
        self._telemetry = telemetry
        self._traffic = traffic

    def results(self, answers: Sequence[Answer], counts: VersionCounts) -> int:
        """Send results of one version, one after the other.

        Args:
            counts: of the version.

        Returns:
            How many of them their clients have room for.
        """
        send = self._router.send
        sent = [send(request.peer, request.delimited, (header, outputs)) for request, _, header, outputs in answers]
        if self._traced:
            self.traces.answered(answers)
        for request, _, _, _ in answers:
            self.close(request)
        if False in sent:
            for (request, _, _, _), taken in zip(answers, sent, strict=True):
                if not taken:
                    error = ResourceExhausted("the client does not take its replies: no room is left for this one")
                    self._send_error_to(request, error)
            answers = [answer for answer, taken in zip(answers, sent, strict=True) if taken]
        self._telemetry.replies += len(answers)
        counts.add_results(answers)
        return len(answers)

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
        self._send_error_to(request, error)

    def abandon(self, request: Pending) -> None:
        """End a request whose client is gone."""
        if self._traced:
            self.traces.failed(request, Cancelled("the client is gone"), None)
        self._telemetry.abandoned += 1
        self._traffic[request.version].counts.abandoned += 1
        self.close(request)

    def late(self, request: Request) -> None:
        """Answer a request that its deadline has passed."""
        allowed_us = (request.deadline_ns - request.came_ns) / 1e3
        what = f"the deadline of {milliseconds(allowed_us)} has passed"
        error = DeadlineExceeded(what, retry_after_s=allowed_us / 1e6)
        self.error(request, error)

    def close(self, request: Pending) -> None:
        """End a request that has been answered, or that nobody waits for any more."""
        request.done = True
        request.arrays = ()  # the scheduler may remember the request until its deadline
        self._admission.release(request)

    def _send_error_to(self, request: Pending, error: TensorNextError) -> None:
        """Send an error to the client of a request that was taken in."""
        self._traffic[request.version].counts.errors[error.code] += 1
        self.send_error(request.peer, request.delimited, request.id, error, request.model)

    def send_error(
        self, peer: bytes, delimited: bool, id_: int | None, error: TensorNextError, model: str = ""
    ) -> None:
        """Send an error to a peer. Args: id_: of its request; None: unknown. model: that the request was about."""
        self._telemetry.count_error(error.code, model)
        self._router.send(peer, delimited, (error_header(id_, error), ()))
