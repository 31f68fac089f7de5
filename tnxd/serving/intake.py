"""Intake: messages become requests that the scheduler has, or are answered at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence, Sized
from typing import TYPE_CHECKING

import msgspec

from tnxctl.protocol.errors import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    TensorNextError,
    Unavailable,
)
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.wire import LEAST_ROLES, Cancel, Limits, Predict, PredictShared, decode_request, encode, request_id
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.registry import LOADING_RETRY_S
from tnxd.deployment.version import READY, STARTING, Version
from tnxd.events import event
from tnxd.models.pipelines import Pipeline
from tnxd.models.sizes import reply_too_large
from tnxd.recording.recorder import Recorder
from tnxd.scheduling.device import Batch
from tnxd.scheduling.refusals import Refusals, TooLate
from tnxd.scheduling.request import BATCH
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import permissions, reports, shared_inputs
from tnxd.serving.answers import Answers
from tnxd.serving.control_plane import ControlPlane
from tnxd.serving.pending import as_pending
from tnxd.serving.pipelines import Pipelines
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.replies import report_header
from tnxd.serving.reports import Inventory
from tnxd.serving.telemetry import Telemetry
from tnxd.transport.access import Access
from tnxd.transport.client_limits import Admission
from tnxd.transport.clients import Connection
from tnxd.transport.fair_queue import FairQueue
from tnxd.transport.router import Message, Router

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# How long messages are taken in before the scheduler gets to act: a flood must not keep finished work waiting.
_INTAKE_NS = 2_000_000

# So many requests fill a batch of most models. With fewer, what is taken in first makes the next batch larger.
ENOUGH = 64

# Where the queue is full, so many messages may be refused in a turn.
_REFUSED_AT_ONCE = 64

_PREDICT = LEAST_ROLES[Predict]

_NOBODYS_FAULT = (DeadlineExceeded, ResourceExhausted, Unavailable)
"""Refusals of requests that would have been served at another time."""


class Intake:
    """Intake of messages: decodes each one, holds it against every limit, and routes it.

    Args:
        router: bound.
        control: answers what is no predict request.
        answers: for what is refused.
        refusals: of requests for want of time, to be forgotten when requests leave the queue.
        quarantine: clients that ride alone.
        pipelines: requests that are made of others.
        completed: executions that are over: while a lane is free, little is taken in.
        recorder: gets the requests, those that are refused too, while there is a recording.
        limits: of a message.
        max_delay_us: how long a batch smaller than its model's limit waits for company, in microseconds.
        access: who may ask for what.

    Attributes:
        state: of the daemon, as in `tnxd.deployment.version`. Requests are taken while it is READY.
        limits: of a message, raised as signatures ask; see `refresh_limits`.
    """

    def __init__(
        self,
        router: Router,
        scheduler: Scheduler,
        inventory: Inventory,
        reconciler: Reconciler,
        control: ControlPlane,
        answers: Answers,
        admission: Admission,
        refusals: Refusals,
        quarantine: Quarantine,
        pipelines: Pipelines,
        telemetry: Telemetry,
        completed: Sized,
        recorder: Recorder,
        *,
        limits: Limits,
        max_delay_us: float,
        access: Access,
    ) -> None:
        self.state = STARTING
        self._access = access
        self._router = router
        self._scheduler = scheduler
        self._registry = inventory.registry
        self._traffic = inventory.traffic
        self._reconciler = reconciler
        self._control = control
        self._answers = answers
        self._traces = answers.traces
        self._admission = admission
        self._refusals = refusals
        self._quarantine = quarantine
        self._pipelines = pipelines
        self._telemetry = telemetry
        self._completed = completed
        self._recorder = recorder
        self._configured_limits = self._limits = limits
        self._message_bytes = limits.message_bytes
        self._max_delay_us = max_delay_us
        self._light_waits = False
        # When the socket was last seen empty, and since when it is not, as far as is known.
        self._empty_ns = self._filled_ns = time.perf_counter_ns()
        self._fair_queue = FairQueue()

    def refresh_limits(self) -> None:
        """Raise the limits of tensors and of axes as signatures ask: what models take, they may be sent."""
        tensors, rank = self._registry.needs()
        configured = self._configured_limits
        self._limits = msgspec.structs.replace(
            configured, tensors=max(configured.tensors, tensors), rank=max(configured.rank, rank)
        )
        self._router.max_tensors = self._limits.tensors

    def wait(self, until_something: Callable[[], None]) -> None:
        """Wait for messages by a function, and note since when there are some."""
        if self._router.readable():
            until_something()
            return
        self._empty_ns = time.perf_counter_ns()
        until_something()
        self._filled_ns = time.perf_counter_ns()

    def receive(self) -> tuple[bool, Batch | None]:
        """Take in what is waiting, up to a limit.

        Returns:
            Whether there may be more, and a batch to be run before anything else happens: a request that need not wait.
        """
        clock = time.perf_counter_ns
        router = self._router
        receive = router.receive
        until = 0
        self._light_waits = False
        # No more than the queue has room for: lanes that are free may empty it before the next one is refused.
        for count in range(self._scheduler.room or _REFUSED_AT_ONCE):
            begin = clock()
            if not until:
                until = begin + _INTAKE_NS
            elif begin > until:
                break
            try:
                message = receive()
                if message is None:
                    if not router.busy:
                        self._empty_ns = self._filled_ns = begin
                    return router.busy, None
                started = self._take(message, begin)
            except Exception:  # a defect of ours, or of what is below us: this message is lost, the loop goes on
                log.exception("a message could not be taken in", extra=event("defect"))
                router.resume()
                continue
            # At low load the first message is the only one, and to ask costs less than to try in vain.
            if started is not None:
                return False, started
            if count == 0 and not router.readable():
                self._empty_ns = self._filled_ns = clock()
                return False, None
            if self._completed and self._scheduler.queued >= ENOUGH:
                break  # a lane has nothing to do
            if self._light_waits and self._scheduler.queued >= ENOUGH * self._admission.active:
                break  # a client with a single request waits behind what others have sent
        self._fair_queue.went_on(self._telemetry.requests, clock(), router.peers)
        return True, None

    def _age_ns(self, connection: Connection, sent_us: float | None, received_ns: int) -> int:
        """The time that a message waited until it was taken up: since the socket was last seen empty, at the most.

        One that does not say when it was sent has waited for half of the time since there was something to read, of its
        connection as far as that is known.
        """
        if sent_us is None:
            filled_ns = self._fair_queue.filled_ns(connection, self._telemetry.requests)
            return (received_ns - max(filled_ns, self._filled_ns)) // 2
        return min(connection.clock.waited_ns(sent_us, received_ns), received_ns - self._empty_ns)

    def _take(self, message: Message, received_ns: int) -> Batch | None:
        """Take a message in: the batch that its request is to run in at once, if there is one."""
        header = message.header
        tensors: Sequence[Buffer] = message.tensors
        if header is None:
            self._refuse(message, None, InvalidArgument("the message is empty"), received_ns)
            return None
        try:
            request = decode_request(header, self._limits)
        except TensorNextError as error:
            self._refuse(message, request_id(header, self._limits), error, received_ns)
            return None
        if isinstance(request, Predict):
            if self._recorder.recording is not None:
                request, tensors = self._record(message, request, received_ns)
            if request.attempt > 1:
                self._telemetry.resent += 1
            if self._refusals and self._is_hopeless(message, request, received_ns):
                return None
            self._telemetry.requests += 1
        try:
            if message.tensor_count > len(tensors):
                raise InvalidArgument(
                    f"{message.tensor_count} tensor frames came, more than the limit of {self._limits.tensors}"
                )
            if isinstance(request, Predict):
                return self._predict(message, request, tensors, received_ns)
            if tensors:
                raise InvalidArgument(f"{len(tensors)} tensor frames came with a message that takes none")
            if isinstance(request, Cancel):
                self._cancel(message.connection, request.id)
            else:
                reply = self._control.answer(message, request, self.state)
                if reply is not None:
                    self._router.send(message.peer, message.delimited, (report_header(reply), ()))
            return None
        except TensorNextError as error:
            failure = error
        except Exception:  # a defect of ours: this client gets an answer, and the others go on
            log.exception("the daemon failed at a request", extra=event("defect"))
            failure = Internal("the daemon failed at this request; its log says how")
        if isinstance(request, Predict):
            self._telemetry.requests -= 1
            self._count_refused(message, request, failure, received_ns)
        id_ = None if isinstance(request, Cancel) else request.id  # that is the id of another request
        self._refuse(message, id_, failure, received_ns, self._named(request))
        return None

    def _record(self, message: Message, request: Predict, received_ns: int) -> tuple[Predict, Sequence[Buffer]]:
        """Hand a request over to the recording, if it is one that its sender may make, for a model that is there.

        Returns the request and its inputs. What was recorded is what is served: inputs in shared memory are frames now.
        """
        recording = self._recorder.recording
        connection, header = message.connection, message.header
        tensors: Sequence[Buffer] = message.tensors
        whole = message.tensor_count == len(tensors)
        if recording is None or header is None or not whole or connection.role < _PREDICT:
            return request, tensors
        try:
            version = self._registry.find(request.model, message.peer, request.route_key)
        except TensorNextError:
            return request, tensors
        name, title = version.source.name, version.title
        if isinstance(request, PredictShared):
            try:
                tensors = shared_inputs.take(connection, request, tensors, self._admission, self._message_bytes)
            except TensorNextError:  # it will be refused, too
                return request, tensors
            header = encode(shared_inputs.plain(request))
            request = msgspec.structs.replace(request, shared=None)
        try:
            recording.take(received_ns, name, title, connection.client.name, header, tensors)
        except Exception:  # a defect of ours: the request is served all the same
            log.exception("a request could not be recorded", extra=event("defect", title))
            recording.stop("the daemon failed at it; its log says how")
        return request, tensors

    def _is_hopeless(self, message: Message, request: Predict, received_ns: int) -> bool:
        """Answer a request, if one of its kind was refused just now and it has no more time than that one."""
        if request.deadline_us is None:
            return False
        age_ns = self._age_ns(message.connection, request.sent_us, received_ns)
        deadline_ns = received_ns - age_ns + int(request.deadline_us * 1e3)
        refusal = self._refusals.find(message.peer, request, deadline_ns)
        if refusal is None:
            return False
        self._telemetry.requests += 1
        self._count_refused(message, request, refusal, received_ns)
        self._answers.send_error(message.peer, message.delimited, request.id, refusal, self._named(request))
        return True

    def _count_refused(self, message: Message, request: Predict, error: TensorNextError, received_ns: int) -> None:
        """Count a request that is not taken in, where it is for a model that there is: clients choose names."""
        version = self._registry.asked(request.model, message.peer, request.route_key)
        if version is not None:
            self._traffic[version].counts.refuse(error.code)
        client = message.connection.client
        client.refused += 1
        if request.traceparent:
            self._traces.refused(request, self._named(request), client.name, received_ns, error)

    def _named(self, request: object) -> str:
        """The model that a request is about, as its client calls it; "" for one about none."""
        model: str | None = getattr(request, "model", None)
        return "" if model is None else model or self._registry.default

    def _refuse(
        self, message: Message, id_: int | None, error: TensorNextError, received_ns: int, model: str = ""
    ) -> None:
        """Answer a message with an error at once. What that takes counts against its sender, if it is to blame."""
        self._telemetry.requests += 1
        self._answers.send_error(message.peer, message.delimited, id_, error, model)
        # The traceback holds the frame that holds the error, and with it the message until the collector comes by.
        error.__traceback__ = error.__context__ = None
        if not isinstance(error, _NOBODYS_FAULT):
            self._admission.add_refused(message.connection, time.perf_counter_ns() - received_ns)

    def _predict(self, message: Message, request: Predict, tensors: Sequence[Buffer], received_ns: int) -> Batch | None:
        connection = message.connection
        if connection.role < _PREDICT:
            raise permissions.refusal(connection, request, self._access)
        if self.state != READY:
            raise reports.refusal(request.model, self.state, self._registry)
        if request.id in connection.requests:
            raise AlreadyExists(f"a request with id {request.id} is in flight on this connection")
        version = self._registry.find(request.model, message.peer, request.route_key)
        shared = request if request.__class__ is PredictShared else None
        if shared is not None:
            tensors = shared_inputs.take(connection, shared, tensors, self._admission, self._message_bytes)
        model = version.model
        if model is None or version.state != READY:
            view_tensors(request.inputs, tensors, self._limits)  # nothing is loaded for what is broken
            raise self._request_load(version)
        traffic = self._traffic[version]
        bound = traffic.binder.bind(model, request.inputs, tensors, self._limits)
        self._admission.check(connection, bound.nbytes)
        reply_nbytes = bound.rows * model.reply_row_nbytes
        if reply_nbytes > self._message_bytes or reply_nbytes > request.max_reply_bytes:
            raise reply_too_large(reply_nbytes, request.max_reply_bytes, self._message_bytes)
        came_ns = received_ns
        if request.deadline_us is not None or model.deadline_us is not None:
            came_ns -= self._age_ns(connection, request.sent_us, received_ns)
        pending = as_pending(message, request, version, model, bound, received_ns, came_ns, self._max_delay_us)
        if shared is not None:
            pending.space = shared.space
        quarantine = self._quarantine
        if quarantine.active and model.max_batch_size and quarantine.holds(message.peer, connection.client.name):
            pending.alone, pending.max_batch_size = BATCH, 1
        scheduler = self._scheduler
        started: Batch | None = None
        pending.queued_ns = now_ns = time.perf_counter_ns()
        piped = model.__class__ is Pipeline
        # Else others may share its batch; but what was copied just now is in the caches of this core.
        if not piped and not scheduler.queued and (shared is not None or not self._router.readable()):
            started = scheduler.start(pending, now_ns)
        if started is None:
            try:
                if piped:
                    self._pipelines.start(pending, request.route_key, now_ns)
                else:
                    scheduler.add(pending, now_ns)
            except TooLate as refusal:
                if refusal.retry_after_s is not None:
                    self._refusals.add(message.peer, request, refusal)
                raise
        self._admission.take(connection, pending)
        if request.traceparent:
            self._traces.begin(pending, request)
        if connection.client.requests == 1:
            self._light_waits = True
        traffic.counts.requests += 1
        return started

    def _request_load(self, version: Version) -> Unavailable:
        """A request came for a version that had to make room: load it again."""
        self._reconciler.request_load(version)
        return Unavailable(
            f"model {version.title!r} had made room for another and is being loaded again",
            retry_after_s=LOADING_RETRY_S,
        )

    def _cancel(self, connection: Connection, id_: int) -> None:
        request = connection.requests.get(id_)
        if request is not None and (self._scheduler.cancel(request) or self._pipelines.withdraw(request)):
            self._answers.error(request, Cancelled("the request was withdrawn by its client"))
