"""The serving loop: takes requests in, asks the scheduler, hands batches to executors, sends answers.

One thread runs it and owns the router, the scheduler and all state here, so nothing is locked. Other threads reach it
through a `CallQueue` and `completed` alone.

The file is longer than others. A request's way from its message to its answer is one story about one state, and every
step of it costs time per request; the parts that can stand alone have files of their own.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
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
from tnxctl.protocol.frames import Array, view_tensors
from tnxctl.protocol.wire import (
    Cancel,
    Limits,
    Predict,
    decode_request,
    request_id,
)
from tnxd.deployment.background import Background, Copy
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.registry import LOADING_RETRY_S
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import DRAINING, READY, STARTING, Version
from tnxd.executors.execution import Execution, Executor
from tnxd.lanes import BACKGROUND, INLINE
from tnxd.models.sizes import reply_too_large
from tnxd.scheduling.device import Batch
from tnxd.scheduling.refusals import Refusals, TooLate
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import reports
from tnxd.serving.call_queue import CallQueue
from tnxd.serving.control_plane import ControlPlane
from tnxd.serving.pending import Pending, as_execution, as_pending, result_header
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.replies import error_header, report_header
from tnxd.serving.reports import Inventory
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.traffic_memory import TrafficMemory
from tnxd.transport.busy_poller import BusyPoller
from tnxd.transport.client_limits import Admission, Connection
from tnxd.transport.router import Message, Router
from tnxd.transport.wakeup import Wakeup

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

# How long messages are taken in before the scheduler gets to act: a flood must not keep finished work waiting.
_INTAKE_NS = 2_000_000

# So many requests fill a batch of most models. With fewer, what is taken in first makes the next batch larger.
_ENOUGH = 64

# Where the queue is full, so many messages may be refused in a turn.
_REFUSED_AT_ONCE = 64

# A loop that never waits looks after new connections so often.
_LOOK_S = 0.03

# Answers made before they are sent, one after the other: libzmq's thread sleeps as soon as it has nothing to do, and to
# wake it for an answer takes longer than to make one. More at a time would leave clients waiting for no reason.
_SENT_TOGETHER = 16

_Answer = tuple[Pending, bytes, tuple[Array, ...]]
"""A request, the header of its result, and the outputs."""

_NOBODYS_FAULT = (DeadlineExceeded, ResourceExhausted, Unavailable)
"""Refusals of requests that would have been served at another time."""


class Server:
    """The loop and its state.

    Args:
        router: bound. wakeup: what the router's `wait` also returns for.
        calls: from other threads; they wake the loop by the same wakeup.
        inventory: models and devices. scheduler: of the same devices. Both may be empty at first.
        reconciler: of the models on these devices.
        on_tick: called every `tick_s` seconds with whether all lanes make progress.
        drain_timeout_s: how long `drain` lets running work go on.
        stall_timeout_s: a batch that runs longer is given up, and its lane counts as dead until it ends after all.
        max_delay_us: how long a batch smaller than its model's limit waits for company, in microseconds.
        admission: who may have how much in flight.
        remote_control: which clients may change what is served: "local", "any" or "off".
        on_device_lost: called when a device has failed for good.
    """

    def __init__(
        self,
        router: Router,
        wakeup: Wakeup,
        calls: CallQueue,
        inventory: Inventory,
        scheduler: Scheduler,
        reconciler: Reconciler,
        telemetry: Telemetry,
        busy_poller: BusyPoller,
        *,
        limits: Limits,
        on_tick: Callable[[bool], None],
        tick_s: float,
        drain_timeout_s: float,
        stall_timeout_s: float,
        max_delay_us: float,
        admission: Admission,
        remote_control: str,
        on_device_lost: Callable[[], None],
    ) -> None:
        self.state = STARTING
        self._router = router
        self._wakeup = wakeup
        self._inventory = inventory
        self._scheduler = scheduler
        self._telemetry = telemetry
        self._traffic = inventory.traffic
        self._mirrors = inventory.registry.mirrors
        self._busy_poller = busy_poller
        self._configured_limits = self._limits = limits
        self._message_bytes = limits.message_bytes
        self._on_tick = on_tick
        self._tick_s = tick_s
        self._drain_timeout_s = drain_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._max_delay_us = max_delay_us
        self._admission = admission
        self._memory = TrafficMemory(router, admission)
        self._on_device_lost = on_device_lost
        self._reconciler = reconciler
        self._audits = reconciler.audits
        self._background = Background()
        self._shadows = Shadows(self._background)
        self._quarantine = Quarantine()
        self._refusals = Refusals()
        self._control = ControlPlane(
            inventory,
            scheduler,
            reconciler,
            self._shadows,
            telemetry,
            router,
            admission,
            remote_control=remote_control,
            message_bytes=limits.message_bytes,
        )
        self._commands_done = self._control.commands_done
        self._calls = calls
        self._completed: deque[Execution] = deque()
        self._started: Batch | None = None
        self._light_waits = False
        self._inline: Execution | None = None
        self._on_lanes: dict[Execution, Batch] = {}
        self._next_tick = time.monotonic()
        self._drain_until = float("inf")
        self._next_look = 0.0
        # When the socket was last seen empty, and since when it is not, as far as is known.
        self._looked_at_ns = self._empty_ns = self._filled_ns = time.perf_counter_ns()
        self._stopped = False
        router.watch(wakeup)
        inventory.registry.on_change = self._models_changed

    def _models_changed(self) -> None:
        """Forget versions that are gone, and raise the limits of tensors and of axes as signatures ask.

        What models take, they may be sent.
        """
        registry = self._inventory.registry
        self._traffic.keep({version for _, version in registry})
        tensors, rank = registry.needs()
        configured = self._configured_limits
        self._limits = msgspec.structs.replace(
            configured, tensors=max(configured.tensors, tensors), rank=max(configured.rank, rank)
        )
        self._router.max_tensors = self._limits.tensors

    # --- called from other threads ---------------------------------------------------------------------------

    def completed(self, execution: Execution) -> None:
        """An executor is done with what it was given. Any thread."""
        self._completed.append(execution)
        self._wakeup.set()

    def hangs(self, most_s: float) -> str:
        """Words for what has kept the loop longer than its limit, or `most_s` seconds; "": nothing. Any thread."""
        execution = self._inline
        if execution is not None and execution.started_ns:
            limit_s = min(self._limit_s(execution), most_s)
            if (time.perf_counter_ns() - execution.started_ns) / 1e9 > limit_s:
                model, count = execution.model.key, len(execution.items)
                return f"model {model!r} has run for over {limit_s:g} s with {count} requests on the serving thread"
            return ""
        limit_s = min(self._stall_timeout_s, most_s)
        if time.monotonic() - self._next_tick > limit_s:
            return f"the serving loop has not turned for {limit_s:g} s"
        return ""

    # --- called on the loop's thread, by `call_soon` or before `run` -------------------------------------------

    def serve(self) -> None:
        """The models are ready: take requests."""
        if self.state == STARTING:
            self.state = READY

    def drain(self) -> None:
        """Refuse what is new, finish what is here, then stop. A second call waits for nothing more to be finished."""
        if self.state == DRAINING:
            self.stop()
            return
        self.state = DRAINING
        self._refusals.clear()
        self._drain_until = time.monotonic() + self._drain_timeout_s
        log.info("draining: %d requests waiting, %d running", self._scheduler.queued, self._scheduler.running)

    def stop(self) -> None:
        """Leave `run` as soon as everybody has an answer, or the news that there will be none."""
        self._stopped = True

    def run(self, linger_s: float) -> float:
        """Serve until drained or stopped, and until every peer that reads has what it is owed.

        Args:
            linger_s: how long it may take at least until those who read have it.

        Returns:
            Seconds that are left of the time for that.
        """
        busy = False
        while not self._stopped:
            if not busy or not (self._scheduler.queued or self._router.readable()):
                self._wait()
            self._calls.run()
            ran = False
            if self._completed:
                self._finish_completed()
                if self._scheduler.queued >= _ENOUGH:
                    ran = self._dispatch()  # a lane is free, and need not wait until more is taken in
            more = self._receive()
            busy = self._dispatch() or more or ran
            flushed = self._router.flush()
            self._expire()
            if self._reconciler.active:
                self._reconciler.poll()
            if self._commands_done:
                self._answer_commands()
            now = time.monotonic()
            if now >= self._next_look:
                self._look(now)
            if now >= self._next_tick:
                self._tick(now)
            if self.state == DRAINING and self._is_drained(now, flushed and not busy):
                break
        left = self._deliver(linger_s if self._stopped else max(linger_s, self._drain_until - time.monotonic()))
        self._tell_errors(time.monotonic(), at_once=True)
        return left

    def _deliver(self, seconds: float) -> float:
        """Answer all that is here, and see to it that the answers go out, for so long at most. Returns what is left."""
        until = time.monotonic() + seconds
        self._finish_completed()
        self.state = DRAINING
        self._next_tick = float("inf")
        self._abandon()
        while True:
            self._receive()  # what came meanwhile is refused: nobody is to wait for an answer from the next daemon
            left = until - time.monotonic()
            if left <= 0 or (self._router.flush() and not self._router.readable()):
                return max(left, 0.0)
            if self._router.wait(left * 1e3):
                self._wakeup.clear()

    def _wait(self) -> None:
        if not self._router.readable():
            self._empty_ns = time.perf_counter_ns()
            self._wait_for_events()
            self._filled_ns = time.perf_counter_ns()
        else:
            self._wait_for_events()
        self._forget_vanished()

    def _wait_for_events(self) -> None:
        # A thread that polls holds the GIL most of the time: only while no lane needs it.
        spun = bool(self._busy_poller.limit_ns) and not self._scheduler.running
        if spun and self._busy_poller.poll(self._router.readable):
            return
        until_ms = (min(self._next_tick, self._drain_until) - time.monotonic()) * 1e3
        event_ns = self._scheduler.next_event_ns()
        if event_ns != NEVER:
            until_ms = min(until_ms, (event_ns - time.perf_counter_ns()) / 1e6)
        if self._router.wait(max(until_ms, 0.0)):
            self._wakeup.clear()  # before looking for what it announces; it may have been found already
        if spun:
            self._busy_poller.blocked()

    def _forget_vanished(self) -> None:
        """Nobody waits for the answers to a client that is gone: take what it queued out."""
        for connection in self._router.take_disconnected():
            if self._quarantine.active:
                self._quarantine.left(connection.peer, connection.client.name)
            for request in list(connection.requests.values()):
                if self._scheduler.cancel(request):
                    self._telemetry.abandoned += 1
                    self._close(request)

    def _expire(self) -> None:
        now_ns = time.perf_counter_ns()
        if self._scheduler.next_event_ns() <= now_ns:
            for request in self._scheduler.expire(now_ns):
                self._answer_late(request)

    def _answer_late(self, request: Request) -> None:
        allowed_ms = (request.deadline_ns - request.came_ns) / 1e6
        error = DeadlineExceeded(f"the deadline of {allowed_ms:.3g} ms has passed", retry_after_s=allowed_ms / 1e3)
        self._answer_error(request, error)

    def _look(self, now: float) -> None:
        """Look after connections, whatever else there is to do."""
        self._next_look = now + _LOOK_S
        self._router.poll_monitor()
        self._forget_vanished()
        self._router.measure_unread(everywhere=False)
        self._memory.look(now, settled=self.state != STARTING and not self._reconciler.active)

    def _look_at_clients(self) -> None:
        """Cut off who floods."""
        router, admission = self._router, self._admission
        now_ns = time.perf_counter_ns()
        for connection in admission.take_flooding(now_ns - self._looked_at_ns):
            log.warning("%s goes on sending what is refused, and is cut off", connection.client.name)
            router.cut(connection)
        self._looked_at_ns = now_ns

    def _tick(self, now: float) -> None:
        self._next_tick = now + self._tick_s
        self._look(now)
        self._look_at_clients()
        self._tell_errors(now)
        self._memory.look_at_connections()
        for name, executor in self._inventory.executors.items():
            self._scheduler.set_free_memory(name, executor.memory_mb()[0])
        keys = {version.model.key for _, version in self._inventory.registry if version.model is not None}
        self._shadows.keep(keys)
        self._background.keep(keys)
        now_ns = time.perf_counter_ns()
        stalled: list[Batch] = []
        for execution, batch in self._on_lanes.items():
            if (now_ns - batch.started_ns) / 1e9 > self._limit_s(execution):
                stalled.append(batch)
                if not batch.hung:
                    self._give_up(execution, batch)
        dead = Counter(batch.device.name for batch in stalled if batch.lane != BACKGROUND)
        self._on_tick(all(self._scheduler.devices[name].lanes > count for name, count in dead.items()))

    def _tell_errors(self, now: float, *, at_once: bool = False) -> None:
        told = self._telemetry.tell_errors(now, at_once=at_once)
        if told:
            log.info("%s", told)

    def _limit_s(self, execution: Execution) -> float:
        return execution.model.time_limit_s or self._stall_timeout_s

    def _give_up(self, execution: Execution, batch: Batch) -> None:
        """A batch hangs: its requests get an error. Its lane is free again if it ever ends."""
        why = f"model {batch.model!r} ran for over {self._limit_s(execution):g} s on {batch.device.name}"
        held = [request for request in batch.requests if not request.done]
        if held:
            log.error("%s: %d requests given up, the lane counts as dead", why, len(held))
        for request in held:
            self._answer_error(request, Internal(why))
        self._scheduler.mark_hung(batch)
        if isinstance(execution, Copy):
            self._background.stop(execution.model)
            log.error("%s: it gets no more copies", why)

    def _is_drained(self, now: float, flushed: bool) -> bool:
        return (not self._admission.requests and flushed) or now >= self._drain_until

    def _abandon(self) -> None:
        """Answer what will never be finished."""
        waiting = self._scheduler.drop_all()
        running = [request for batch in self._on_lanes.values() for request in batch.requests]
        for request in [*waiting, *[request for request in running if not request.done]]:
            self._answer_error(request, Unavailable("the daemon stopped before this request was done"))
        self._control.abandon()
        self._answer_commands()

    # --- in ----------------------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Take in what is waiting, up to a limit. True if there may be more."""
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
                    return router.busy
                self._take(message, begin)
            except Exception:  # a defect of ours, or of what is below us: this message is lost, the loop goes on
                log.exception("a message could not be taken in")
                router.resume()
            # At low load the first message is the only one, and to ask costs less than to try in vain.
            if self._started is not None:
                return False
            if count == 0 and not router.readable():
                self._empty_ns = self._filled_ns = clock()
                return False
            if self._completed and self._scheduler.queued >= _ENOUGH:
                break  # a lane has nothing to do
            if self._light_waits and self._scheduler.queued >= _ENOUGH * self._admission.active:
                break  # a client with a single request waits behind what others have sent
        return True

    def _age_ns(self, connection: Connection, sent_us: float | None, received_ns: int) -> int:
        """The time that a message waited until it was taken up: since the socket was last seen empty, at the most.

        One that does not say when it was sent has waited for half of the time since there was something to read.
        """
        if sent_us is None:
            return (received_ns - self._filled_ns) // 2
        return min(connection.clock.waited_ns(sent_us, received_ns), received_ns - self._empty_ns)

    def _take(self, message: Message, received_ns: int) -> None:
        header, tensors = message.header, message.tensors
        if header is None:
            self._refuse(message, None, InvalidArgument("the message is empty"), received_ns)
            return
        try:
            request = decode_request(header, self._limits)
        except TensorNextError as error:
            self._refuse(message, request_id(header, self._limits), error, received_ns)
            return
        if self._refusals and isinstance(request, Predict) and self._is_hopeless(message, request, received_ns):
            return
        try:
            if message.tensor_count > len(tensors):
                raise InvalidArgument(
                    f"{message.tensor_count} tensor frames came, more than the limit of {self._limits.tensors}"
                )
            if isinstance(request, Predict):
                self._telemetry.requests += 1
                self._predict(message, request, tensors, received_ns)
            elif tensors:
                raise InvalidArgument(f"{len(tensors)} tensor frames came with a message that takes none")
            elif isinstance(request, Cancel):
                self._cancel(message.connection, request.id)
            else:
                reply = self._control.answer(message, request, self.state)
                if reply is not None:
                    self._router.send(message.peer, message.delimited, (report_header(reply), ()))
            return
        except TensorNextError as error:
            failure = error
        except Exception:  # a defect of ours: this client gets an answer, and the others go on
            log.exception("the daemon failed at a request")
            failure = Internal("the daemon failed at this request; its log says how")
        self._telemetry.requests -= isinstance(request, Predict)
        id_ = None if isinstance(request, Cancel) else request.id  # that is the id of another request
        self._refuse(message, id_, failure, received_ns, self._named(request))

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
        self._send_error(message.peer, message.delimited, request.id, refusal, self._named(request))
        return True

    def _named(self, request: object) -> str:
        """The model that a request is about, as its client calls it; "" for one about none."""
        model: str | None = getattr(request, "model", None)
        return "" if model is None else model or self._inventory.registry.default

    def _refuse(
        self, message: Message, id_: int | None, error: TensorNextError, received_ns: int, model: str = ""
    ) -> None:
        """Answer a message with an error at once. What that takes counts against its sender, if it is to blame."""
        self._telemetry.requests += 1
        self._send_error(message.peer, message.delimited, id_, error, model)
        # The traceback holds the frame that holds the error, and with it the message until the collector comes by.
        error.__traceback__ = error.__context__ = None
        if not isinstance(error, _NOBODYS_FAULT):
            self._admission.add_refused(message.connection, time.perf_counter_ns() - received_ns)

    def _answer_commands(self) -> None:
        """Answer the admin commands that are done."""
        for message, id_, answer in self._control.answers():
            if isinstance(answer, TensorNextError):
                self._telemetry.requests += 1
                self._send_error(message.peer, message.delimited, id_, answer)
            else:
                self._router.send(message.peer, message.delimited, (report_header(answer), ()))

    def _predict(self, message: Message, request: Predict, tensors: Sequence[Buffer], received_ns: int) -> None:
        if self.state != READY:
            raise reports.refusal(request.model, self.state, self._inventory.registry)
        connection = message.connection
        if request.id in connection.requests:
            raise AlreadyExists(f"a request with id {request.id} is in flight on this connection")
        version = self._inventory.registry.find(request.model, message.peer, request.route_key)
        model = version.model
        if model is None or version.state != READY:
            view_tensors(request.inputs, tensors, self._limits)  # nothing is loaded for what is broken
            raise self._request_load(version)
        traffic = self._traffic[version]
        bound = traffic.binder.bind(model, request.inputs, tensors, self._limits)
        self._admission.check(connection, bound.nbytes)
        reply_nbytes = bound.rows * model.reply_row_nbytes
        if reply_nbytes > self._message_bytes or reply_nbytes > request.max_reply_bytes:
            raise self._too_large(reply_nbytes, request.max_reply_bytes)
        came_ns = received_ns
        if request.deadline_us is not None or model.deadline_us is not None:
            came_ns -= self._age_ns(connection, request.sent_us, received_ns)
        pending = as_pending(message, request, version, model, bound, received_ns, came_ns, self._max_delay_us)
        quarantine = self._quarantine
        if quarantine.active and model.max_batch_size and quarantine.holds(message.peer, connection.client.name):
            pending.alone, pending.max_batch_size = True, 1
        scheduler = self._scheduler
        pending.queued_ns = now_ns = time.perf_counter_ns()
        if not scheduler.queued and not self._router.readable():  # else others may share its batch
            self._started = scheduler.start(pending, now_ns)
        if self._started is None:
            try:
                scheduler.add(pending, now_ns)
            except TooLate as refusal:
                if refusal.retry_after_s is not None:
                    self._refusals.add(message.peer, request, refusal)
                raise
        self._admission.take(connection, pending)
        if connection.client.requests == 1:
            self._light_waits = True
        traffic.requests += 1

    def _request_load(self, version: Version) -> Unavailable:
        """A request came for a version that had to make room: load it again."""
        self._reconciler.request_load(version)
        return Unavailable(
            f"model {version.title!r} had made room for another and is being loaded again",
            retry_after_s=LOADING_RETRY_S,
        )

    def _cancel(self, connection: Connection, id_: int) -> None:
        request = connection.requests.get(id_)
        if request is not None and self._scheduler.cancel(request):
            self._answer_error(request, Cancelled("the request was withdrawn by its client"))

    # --- run ---------------------------------------------------------------------------------------------------

    def _dispatch(self) -> bool:
        """Put batches on free lanes. True if one ran right here: more may have come meanwhile."""
        batch, self._started = self._started, None
        if batch is not None:
            self._run_inline(batch)
            return True
        if not self._scheduler.queued:
            if self._background:
                self._run_copy()
            return False
        inline: Batch | None = None
        batches, late = self._scheduler.next_batches(time.perf_counter_ns())
        if batches or late:
            self._refusals.clear()
        for request in late:
            self._answer_late(request)
        for batch in batches:
            if batch.lane == INLINE:
                inline = batch
            else:
                execution = as_execution(batch)
                self._on_lanes[execution] = batch
                self._executor(batch).submit(execution)
        if inline is None:
            return False
        self._run_inline(inline)
        return True

    def _run_inline(self, batch: Batch) -> None:
        self._inline = execution = as_execution(batch)
        self._executor(batch).run_inline(execution)
        self._inline = None
        self._finish(execution, batch)

    def _run_copy(self) -> None:
        found = self._background.next(self._scheduler, time.perf_counter_ns())
        if found is not None:
            copy, batch = found
            self._on_lanes[copy] = batch
            self._executor(batch).submit(copy)

    def _executor(self, batch: Batch) -> Executor:
        return self._inventory.executors[batch.device.name]

    def _finish_completed(self) -> None:
        while self._completed:
            execution = self._completed.popleft()
            self._finish(execution, self._on_lanes.pop(execution))

    def _finish(self, execution: Execution, batch: Batch) -> None:
        """Answer the requests of a batch that is over."""
        try:
            self._settle(execution, batch)
        except Exception:  # a defect of ours: these clients get an answer, and the others go on
            log.exception("finishing a batch of %s", batch.model)
            for request in batch.requests:
                if not request.done:
                    self._answer_error(request, Internal("the daemon failed at this request; its log says how"))

    def _settle(self, execution: Execution, batch: Batch) -> None:
        device = batch.device
        if device.is_gpu:
            self._scheduler.set_free_memory(device.name, execution.memory_free_mb)
        answers: list[_Answer] = []
        sizes_known = execution.model.reply_row_nbytes  # and looked at before
        for request, outcome in zip(batch.requests, execution.outcomes, strict=False):  # a copy has no requests
            assert isinstance(request, Pending)
            if request.done:
                continue  # its deadline came first, or the batch had been given up
            if isinstance(outcome, TensorNextError):
                if not (execution.exhausted and self._runs_elsewhere(request, outcome)):
                    self._answer_error(request, outcome)
            elif not sizes_known and (nbytes := sum([array.nbytes for array in outcome])) > min(
                self._message_bytes, request.max_reply_bytes
            ):
                self._answer_error(request, self._too_large(nbytes, request.max_reply_bytes))
            else:
                answers.append((request, result_header(request, batch.rows, execution, outcome), outcome))
                if len(answers) == _SENT_TOGETHER:
                    self._answer(answers, execution)
                    answers.clear()
        self._answer(answers, execution)
        if execution.exhausted:
            self._scheduler.limit_rows(device.name, batch.model, execution.safe_rows)
        failures = sum([isinstance(outcome, TensorNextError) for outcome in execution.outcomes])
        if failures or self._quarantine.active:
            self._judge(execution, batch)
        # How long a failure took says nothing about the next success.
        succeeded = not execution.exhausted and not failures
        micros = (execution.finished_ns - execution.started_ns) / 1e3 if succeeded else 0.0
        self._scheduler.finished(batch, micros, time.perf_counter_ns())
        if self._refusals:
            self._refusals.clear()
        if isinstance(execution, Copy):
            self._background.finished(execution)
        elif failures < len(batch.requests):
            version: Version = batch.requests[0].version  # type: ignore[attr-defined]
            if version in self._audits:
                self._audits[version].look(execution, self._background)
            if self._mirrors and version in self._mirrors:
                self._shadows.offer(execution, self._mirrors[version])
        if execution.mixes:
            mixing: Version = execution.version if isinstance(execution, Copy) else batch.requests[0].version  # type: ignore[attr-defined]
            mixing.end_batches(batch.model, execution.mixes)
        if execution.fatal and not device.error:
            self._lose_device(device.name, execution.fatal)

    def _too_large(self, nbytes: int, max_reply_bytes: int) -> InvalidArgument:
        if max_reply_bytes < self._message_bytes:
            return reply_too_large(nbytes, max_reply_bytes, "the client")
        return reply_too_large(nbytes, self._message_bytes, "the daemon")

    def _judge(self, execution: Execution, batch: Batch) -> None:
        """Let clients ride alone who sent what a model fails at, until they have shown that they can do otherwise."""
        if execution.fatal:
            return
        for request, outcome in zip(batch.requests, execution.outcomes, strict=False):
            peer = request.peer
            if not isinstance(outcome, TensorNextError):
                self._quarantine.succeeded(peer)
            elif not isinstance(outcome, (ResourceExhausted, Unavailable)):
                self._quarantine.failed(peer)
                if request.connection.closed:  # type: ignore[attr-defined]
                    self._quarantine.left(peer, request.connection.client.name)  # type: ignore[attr-defined]

    def _runs_elsewhere(self, request: Pending, error: TensorNextError) -> bool:
        """A GPU had no memory for a request: have it run where else it may. False if that is nowhere."""
        if not isinstance(error, ResourceExhausted) or not self._scheduler.devices[request.device].is_gpu:
            return False
        if request.wanted not in ("", "auto"):
            return False
        request.excluded |= {request.device}
        try:
            self._scheduler.add(request, time.perf_counter_ns())
        except TensorNextError:
            return False
        return True

    def _lose_device(self, name: str, why: str) -> None:
        log.error("device %s failed and is no longer used: %s", name, why)
        self._inventory.device_failures[name] = why
        for request in self._scheduler.fail_device(name, why):
            try:
                self._scheduler.add(request, time.perf_counter_ns())
            except TensorNextError as error:
                self._answer_error(request, error)
        self._on_device_lost()

    # --- out ---------------------------------------------------------------------------------------------------

    def _answer(self, answers: Sequence[_Answer], execution: Execution) -> None:
        send = self._router.send
        sent = [send(request.peer, request.delimited, (header, outputs)) for request, header, outputs in answers]
        for (request, _, _), taken in zip(answers, sent, strict=True):
            self._close(request)
            actual_us = (execution.finished_ns - request.queued_ns) / 1e3
            self._telemetry.observe_prediction(request.predicted_us, actual_us)
            if taken:
                self._telemetry.replies += 1
            else:
                error = ResourceExhausted("the client does not take its replies: no room is left for this one")
                self._send_error(request.peer, request.delimited, request.id, error, request.model)

    def _answer_error(self, request: Request, error: TensorNextError) -> None:
        assert isinstance(request, Pending)
        self._close(request)
        self._send_error(request.peer, request.delimited, request.id, error, request.model)

    def _close(self, request: Pending) -> None:
        """The request has been answered, or nobody waits for it any more."""
        request.done = True
        request.arrays = ()  # the scheduler may remember the request until its deadline
        self._admission.release(request)

    def _send_error(
        self, peer: bytes, delimited: bool, id_: int | None, error: TensorNextError, model: str = ""
    ) -> None:
        self._telemetry.count_error(error.code, model)
        self._router.send(peer, delimited, (error_header(id_, error), ()))
