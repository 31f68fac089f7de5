"""The serving loop: takes requests in, asks the scheduler, hands batches to executors, sends answers.

One thread runs it and owns the router, the scheduler and every request, so nothing is locked. Other threads reach it
through a `CallQueue` and `completed` alone. What happens to a message is in `intake`, to a batch in `dispatcher`, and
to an answer in `answers`; here is when. These parts are put together here too, since the order of their turns is all
that they have in common.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import Limits
from tnxd.deployment.background import Background
from tnxd.deployment.reconciler import Reconciler
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import DRAINING, READY, STARTING
from tnxd.events import event
from tnxd.executors.execution import Execution
from tnxd.recording.recorder import Recorder
from tnxd.scheduling.refusals import Refusals
from tnxd.scheduling.request import NEVER
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import reports
from tnxd.serving.answers import Answers
from tnxd.serving.call_queue import CallQueue
from tnxd.serving.control_plane import ControlPlane
from tnxd.serving.dispatcher import Dispatcher
from tnxd.serving.intake import ENOUGH, Intake
from tnxd.serving.pipelines import Pipelines
from tnxd.serving.quarantine import Quarantine
from tnxd.serving.replies import report_header
from tnxd.serving.reports import Inventory
from tnxd.serving.slowest import SLOT_S
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.traces import Traces
from tnxd.serving.traffic_memory import TrafficMemory
from tnxd.tracing.notes import Notes
from tnxd.transport.access import Access
from tnxd.transport.busy_poller import BusyPoller
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router
from tnxd.transport.wakeup import Wakeup

log = logging.getLogger(__name__)

# A loop that never waits looks after new connections so often.
_LOOK_S = 0.03


class Server:
    """The loop and its state.

    Args:
        router: bound. wakeup: what the router's `wait` also returns for.
        calls: from other threads; they wake the loop by the same wakeup.
        inventory: models and devices. scheduler: of the same devices. Both may be empty at first.
        reconciler: of the models on these devices.
        on_tick: called every `tick_s` seconds with whether all lanes make progress.
        drain_timeout_s: how long `drain` lets running work go on.
        stall_timeout_s: a batch that runs longer is given up, and its lane counts as hung until it ends after all.
        max_delay_us: how long a batch smaller than its model's limit waits for company, in microseconds.
        admission: who may have how much in flight.
        access: who may ask for what.
        recorder: of requests.
        on_device_lost: called when a device has failed for good.
        notes: takes what is noted of sampled requests; None: nothing is.
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
        access: Access,
        recorder: Recorder,
        on_device_lost: Callable[[], None],
        notes: Notes | None = None,
    ) -> None:
        self._router = router
        self._wakeup = wakeup
        self._calls = calls
        self._inventory = inventory
        self._scheduler = scheduler
        self._reconciler = reconciler
        self._telemetry = telemetry
        self._busy_poller = busy_poller
        self._on_tick = on_tick
        self._tick_s = tick_s
        self._drain_timeout_s = drain_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._admission = admission
        self._recorder = recorder
        self._memory = TrafficMemory(router, admission)
        self._background = Background()
        self._shadows = Shadows(self._background)
        self._quarantine = Quarantine()
        self._refusals = Refusals()
        self._completed: deque[Execution] = deque()
        self._answers = Answers(router, admission, telemetry, inventory.traffic, Traces(notes))
        self._control = ControlPlane(
            inventory,
            scheduler,
            reconciler,
            self._shadows,
            telemetry,
            router,
            admission,
            recorder,
            access=access,
            message_bytes=limits.message_bytes,
            notes=notes,
        )
        self._commands_done = self._control.commands_done
        self._pipelines = Pipelines(
            scheduler,
            inventory,
            reconciler,
            self._answers,
            self._quarantine,
            admission,
            limits=limits,
            max_delay_us=max_delay_us,
        )
        self._intake = Intake(
            router,
            scheduler,
            inventory,
            reconciler,
            self._control,
            self._answers,
            admission,
            self._refusals,
            self._quarantine,
            self._pipelines,
            telemetry,
            self._completed,
            recorder,
            limits=limits,
            max_delay_us=max_delay_us,
            access=access,
        )
        self._dispatcher = Dispatcher(
            scheduler,
            inventory,
            reconciler,
            self._answers,
            self._background,
            self._shadows,
            self._refusals,
            self._quarantine,
            limits=limits,
            stall_timeout_s=stall_timeout_s,
            on_device_lost=on_device_lost,
        )
        self._next_tick = time.monotonic()
        self._drain_until = float("inf")
        self._next_look = 0.0
        self._next_slot = self._next_tick + SLOT_S
        self._looked_at_ns = time.perf_counter_ns()
        self._stopped = False
        router.watch(wakeup)
        inventory.registry.on_change = self._models_changed

    @property
    def state(self) -> str:
        """State of the daemon, as in `tnxd.deployment.version`."""
        return self._intake.state

    def _models_changed(self) -> None:
        """Forget versions that are gone, and raise limits as the signatures of new ones ask."""
        registry, traffic = self._inventory.registry, self._inventory.traffic
        traffic.keep({version for _, version in registry})
        registry.forget_evictions(dict(traffic.counts()))
        self._pipelines.forget_wirings()
        self._intake.refresh_limits()

    # --- called from other threads ---------------------------------------------------------------------------

    def completed(self, execution: Execution) -> None:
        """An executor is done with what it was given. Any thread."""
        self._completed.append(execution)
        self._wakeup.set()

    def hangs(self, most_s: float) -> str:
        """Words for what has kept the loop longer than its limit, or `most_s` seconds; "": nothing. Any thread."""
        execution = self._dispatcher.inline
        if execution is not None and execution.started_ns:
            limit_s = min(self._dispatcher.limit_s(execution), most_s)
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
            self._intake.state = READY

    def reload_keys(self) -> None:
        """Read the authorized keys again. What has changed counts at once; a file with a mistake changes nothing."""
        self._control.reload_keys()

    def drain(self) -> None:
        """Refuse what is new, finish what is here, then stop. A second call waits for nothing more to be finished."""
        if self.state == DRAINING:
            self.stop()
            return
        self._intake.state = DRAINING
        self._refusals.clear()
        self._drain_until = time.monotonic() + self._drain_timeout_s
        queued, running = self._scheduler.queued, self._scheduler.running
        about = event("draining", waiting=queued, running=running)
        log.info("draining: %d requests waiting, %d running", queued, running, extra=about)

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
        intake, dispatcher = self._intake, self._dispatcher
        busy = False
        turns = self._telemetry.turns_s
        while not self._stopped:
            if not busy or not (self._scheduler.queued or self._router.readable()):
                self._wait()
            began = time.monotonic()
            self._calls.run()
            ran = False
            if self._completed:
                self._finish_completed()
                if self._scheduler.queued >= ENOUGH:
                    ran = dispatcher.dispatch()  # a lane is free, and need not wait until more is taken in
            more, started = intake.receive()
            if started is not None:
                dispatcher.run_inline(started)
                busy = True
            else:
                busy = dispatcher.dispatch() or more or ran
            flushed = self._router.flush()
            self._expire()
            if self._reconciler.active:
                self._reconciler.poll()
            if self._commands_done:
                self._answer_commands()
            now = time.monotonic()
            if now >= self._next_look or now >= self._next_tick:
                self._look(now)
                if now >= self._next_tick:
                    self._tick(now)
                now = time.monotonic()
            turns.append(now - began)
            if intake.state == DRAINING and self._is_drained(now, flushed and not busy):
                break
        left = self._deliver(linger_s if self._stopped else max(linger_s, self._drain_until - time.monotonic()))
        self._tell_errors(time.monotonic(), at_once=True)
        return left

    def _deliver(self, seconds: float) -> float:
        """Answer all that is here, and see to it that the answers go out, for so long at most. Returns what is left."""
        until = time.monotonic() + seconds
        self._finish_completed()
        self._intake.state = DRAINING
        self._next_tick = float("inf")
        self._abandon()
        while True:
            self._intake.receive()  # what came meanwhile is refused: nobody is to wait for the next daemon's answer
            left = until - time.monotonic()
            if left <= 0 or (self._router.flush() and not self._router.readable()):
                return max(left, 0.0)
            if self._router.wait(left * 1e3):
                self._wakeup.clear()

    def _wait(self) -> None:
        self._intake.wait(self._wait_for_events)
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
                if self._scheduler.cancel(request) or self._pipelines.withdraw(request):
                    self._answers.abandon(request)

    def _expire(self) -> None:
        now_ns = time.perf_counter_ns()
        if self._scheduler.next_event_ns() <= now_ns:
            for request in self._scheduler.expire(now_ns):
                self._answers.late(request)

    def _look(self, now: float) -> None:
        """Look after connections, whatever else there is to do."""
        self._next_look = now + _LOOK_S
        self._telemetry.fold_turns()
        self._router.poll_monitor()
        self._forget_vanished()
        self._router.measure_unread(everywhere=False)
        self._admission.recorded = self._recorder.held_bytes
        self._memory.look(now, settled=self.state != STARTING and not self._reconciler.active)

    def _look_at_clients(self) -> None:
        """Cut off who floods."""
        router, admission = self._router, self._admission
        now_ns = time.perf_counter_ns()
        for connection in admission.take_flooding(now_ns - self._looked_at_ns):
            log.warning(
                "%s goes on sending what is refused, and is cut off",
                connection.client.name,
                extra=event("peer_cut", client=connection.client.name, address=connection.address, reason="flood"),
            )
            router.cut(connection)
        self._looked_at_ns = now_ns

    def _tick(self, now: float) -> None:
        self._next_tick = now + self._tick_s
        self._look_at_clients()
        self._tell_errors(now)
        self._memory.look_at_connections()
        if now >= self._next_slot:
            self._next_slot = now + SLOT_S
            self._inventory.traffic.end_slot()
        for name, executor in self._inventory.executors.items():
            self._scheduler.set_free_memory(name, executor.memory_mb()[0])
            failure = executor.failure()
            if failure and not self._scheduler.devices[name].error:
                self._dispatcher.lose_device(name, failure)
        keys = {version.model.key for _, version in self._inventory.registry if version.model is not None}
        self._shadows.keep(keys)
        self._background.keep(keys)
        dead = self._dispatcher.give_up_hung()
        self._on_tick(all(self._scheduler.devices[name].lanes > count for name, count in dead.items()))

    def _tell_errors(self, now: float, *, at_once: bool = False) -> None:
        told = self._telemetry.tell_errors(now, at_once=at_once)
        if told:
            log.info("%s", told, extra=event("errors_sent", **self._telemetry.told))

    def _is_drained(self, now: float, flushed: bool) -> bool:
        return (not self._admission.requests and flushed) or now >= self._drain_until

    def _abandon(self) -> None:
        """Answer what will never be finished."""
        for request in [*self._scheduler.drop_all(), *self._dispatcher.unanswered()]:
            self._answers.error(request, reports.stopped("this request"))
        self._control.abandon()
        self._answer_commands()

    def _answer_commands(self) -> None:
        """Answer the admin commands that are done."""
        for message, id_, answer in self._control.answers():
            if isinstance(answer, TensorNextError):
                self._telemetry.requests += 1
                self._answers.send_error(message.peer, message.delimited, id_, answer)
            else:
                self._router.send(message.peer, message.delimited, (report_header(answer), ()))

    def _finish_completed(self) -> None:
        while self._completed:
            self._dispatcher.finish(self._completed.popleft())
