"""The daemon: its parts wired together, opened, loaded and stopped."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from tnxctl import __version__
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import MIB
from tnxd import offered_models
from tnxd.config import Config
from tnxd.deployment.reconciler import Changes, Reconciler
from tnxd.deployment.registry import Registry
from tnxd.deployment.version import DRAINING, READY, STARTING
from tnxd.device_kinds import CHOSEN, PROCESS
from tnxd.error_text import named
from tnxd.events import event, machine_event
from tnxd.executors.execution import Executor
from tnxd.process import logs, openmp, signals
from tnxd.process.systemd import Notifier
from tnxd.process.watchdog import Watchdog
from tnxd.recording.recorder import Recorder
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving import recording_notes
from tnxd.serving.call_queue import CallQueue
from tnxd.serving.reports import Inventory
from tnxd.serving.server import Server
from tnxd.serving.telemetry import Telemetry
from tnxd.tracing.exporter import SpanThread, otlp_sender
from tnxd.tracing.notes import Notes
from tnxd.transport.access import Access
from tnxd.transport.busy_poller import BusyPoller
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router
from tnxd.transport.wakeup import Wakeup

if TYPE_CHECKING:
    from tnxd.models.process_state.drift import DriftMonitor

log = logging.getLogger("tnxd")

LAST_WORDS_S = 1.0
"""Seconds that the end of the process waits until the log is written."""

_FLUSH_S = 5.0
_RECORDED_S = 2.0  # to write what a recording still holds
_TICK_S = 1.0
_GC_THRESHOLD = 10_000


class Daemon:
    """The parts of a daemon, wired.

    Args:
        registry: announced. router: bound. access: that of the router.
    """

    def __init__(
        self, config: Config, registry: Registry, router: Router, admission: Admission, access: Access
    ) -> None:
        self._config = config
        self._router = router
        self._notifier = Notifier()
        self._reload_waits = False
        self._watch: DriftMonitor | None = None
        self._exit_code = 0
        self._executors: dict[str, Executor] = {}  # filled when they are open
        self._notes = Notes() if config.traces.endpoint else None
        wakeup = Wakeup()
        self._calls = CallQueue(wakeup)
        queue = config.queue
        self._scheduler = Scheduler(
            [],
            CostModel(),
            max_requests=queue.max_requests,
            max_bytes=int(queue.max_mb * MIB),
            max_per_model=queue.max_per_model or None,
            max_bytes_per_model=int(queue.max_mb_per_model * MIB) or None,
        )
        self._reconciler = Reconciler(
            registry,
            self._scheduler,
            self._executors,
            lambda: offered_models.catalog(config),
            self._calls.call_soon,
            limits=config.limits,
            budget={kind.name: config.memory.nbytes(kind.name) for kind in CHOSEN},
            load_timeout_s=config.load_timeout_s,
            on_reload=self._announce_reload,
            open_processes=self._open_processes,
        )
        self._inventory = Inventory(registry, self._reconciler.audits, self._executors)
        self._recorder = Recorder(
            config.record_directory,
            most_bytes=int(config.record_max_mb * MIB),
            queue_bytes=int(config.record_queue_mb * MIB),
            call_soon=self._calls.call_soon,
            describe=lambda title: recording_notes.describe(title, registry, self._scheduler),
            about=lambda: recording_notes.about(self._scheduler),
        )
        self._server = Server(
            router,
            wakeup,
            self._calls,
            self._inventory,
            self._scheduler,
            self._reconciler,
            Telemetry(),
            BusyPoller(config.spin_us),
            limits=config.limits,
            on_tick=self._tick,
            tick_s=min(_TICK_S, self._notifier.watchdog_s / 3 or _TICK_S),
            drain_timeout_s=config.drain_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            max_delay_us=config.queue.max_delay_us,
            admission=admission,
            access=access,
            recorder=self._recorder,
            on_device_lost=self._device_lost,
            notes=self._notes,
        )

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self._notifier.send("STATUS=loading")
        threading.Thread(target=self._open_devices, name="devices", daemon=True).start()
        call_soon = self._calls.call_soon
        # The drain, the flush, and as much again before it counts as hung.
        stop_timeout_s = self._config.drain_timeout_s + 2 * _FLUSH_S
        with signals.handled_signals(
            lambda: call_soon(self._stop), lambda: call_soon(self._reload), stop_timeout_s, _FLUSH_S
        ):
            Watchdog(self._hang_reason, self._report_hang)
            spans = self._span_thread()
            self._router.close(self._server.run(_FLUSH_S))
            self._recorder.close(_RECORDED_S)
            if spans is not None:
                spans.close(LAST_WORDS_S)
            log.info("stopped", extra=event("stopped", code=self._exit_code))
            logs.flush(LAST_WORDS_S)  # while a signal does not end it yet
        return self._exit_code

    def _span_thread(self) -> SpanThread | None:
        """The thread that makes spans of what is noted; None if nothing is."""
        if self._notes is None:
            return None
        return SpanThread(self._notes, partial(otlp_sender, self._config.traces.endpoint))

    def _open_devices(self) -> None:
        """Open the devices on a thread of its own: health answers meanwhile."""
        try:
            openmp.settle()
            from tnxd.executors.devices import open_devices  # imports torch, which takes seconds

            opened = open_devices(self._config, self._server.completed)
            if not opened.executors:
                raise RuntimeError(f"no device works: {'; '.join(named(opened.failures))}")
            if self._config.model_repository:
                import tnxd.models.formats.opening  # noqa: F401 - it imports much that stays, too
            # What is alive now stays alive: the collector need not look at it again. Models come later, and may go.
            gc.collect()
            gc.freeze()
            # Requests come and go by the thousand and hold no cycles: by default, it would look through them every
            # few hundred.
            gc.set_threshold(_GC_THRESHOLD)
        except BaseException as error:
            about = event("cannot_start", code=1)
            log.error("cannot start: %s", error, exc_info=not isinstance(error, RuntimeError), extra=about)
            self._calls.call_soon(self._fail)
            return
        self._calls.call_soon(lambda: self._load(opened.executors, opened.failures))

    def _load(self, executors: Mapping[str, Executor], failures: Mapping[str, str]) -> None:
        """Load the models on the devices, which are open."""
        for name, failure in failures.items():
            about = event("device_left_out", device=name, reason=failure)
            log.error("device %s is left out: %s", name, failure, extra=about)
        self._inventory.device_failures.update(failures)
        for executor in executors.values():
            executor.adopt_thread()
            self._add(executor)
        from tnxd.models.process_state.drift import DriftMonitor  # imports torch, which is here by now

        self._watch = DriftMonitor()
        self._reconciler.start(self._loaded)

    def _open_processes(self) -> None:
        """Add the device for models in processes of their own, once one is there that asks for it."""
        if PROCESS.name not in self._executors:
            from tnxd.executors.processes import open_processes  # imports torch, which is here by now

            self._add(open_processes(PROCESS.name, self._config, self._server.completed))

    def _add(self, executor: Executor) -> None:
        about = machine_event("device_ready", device=executor.name, lanes=executor.lanes)
        log.info("device %s is ready: %s", executor.name, executor.description, extra=about)
        self._scheduler.add_device(self._device(executor))
        self._executors[executor.name] = executor

    def _device(self, executor: Executor) -> Device:
        return Device(
            executor.name,
            executor.kind,
            executor.lanes,
            set(),
            executor.memory_mb()[0],
            inline_limit_us=self._config.cpu.inline_limit_us if executor.runs_inline else 0.0,
            teams=executor.teams,
            shares_chip=executor.shares_chip,
            streams=executor.streams,
        )

    def _loaded(self, outcome: Changes | TensorNextError) -> None:
        """Begin to serve, after the first load of everything."""
        if not any(version.servable for _, version in self._inventory.registry):
            why = outcome.message if isinstance(outcome, TensorNextError) else "; ".join(named(outcome.failed))
            if why:
                log.error("cannot start: no model can be served: %s", why, extra=event("cannot_start", code=1))
                self._fail()
                return
            log.warning(
                "%s has no model yet: publish one, then tnxctl reload",
                self._config.model_repository,
                extra=event("no_models"),
            )
        self._server.serve()
        line = self._status()
        executors = self._inventory.executors
        about = event(
            "ready",
            release=__version__,
            endpoints=list(self._router.endpoints),
            devices={name: executor.lanes for name, executor in executors.items()},
            models=list(self._inventory.registry.deployments),
        )
        logs.say(f"tnxd {__version__} {line}", about)
        self._notifier.send("READY=1", f"STATUS={line}")
        if self._reload_waits:
            self._reload()

    def _status(self) -> str:
        """A line about what is served, and where."""
        inventory = self._inventory
        devices = ", ".join(
            f"{executor.name} ({executor.lanes} lane{'s' if executor.lanes > 1 else ''})"
            for executor in inventory.executors.values()
        )
        registry = inventory.registry
        models = ", ".join(
            name
            + " (default)" * (name == registry.default)
            + " (failed)" * (not any(version.servable for version in deployment.versions.values()))
            for name, deployment in registry.deployments.items()
        )
        models = models or "none yet"
        return f"ready on {', '.join(self._router.endpoints)}; devices: {devices}; models: {models}"

    def _reload(self) -> None:
        """Reload, after a SIGHUP: the keys at once, the models once the first load is over.

        Files of models that have changed meanwhile may have been read already.
        """
        self._server.reload_keys()
        if self._server.state == STARTING:
            self._reload_waits = True
        elif self._server.state != READY:
            about = event("reload_ignored", state=self._server.state)
            log.warning("SIGHUP is ignored: the daemon is %s", self._server.state, extra=about)
        else:
            if not (self._config.model_repository or self._config.keys.authorized):
                log.warning(
                    "SIGHUP changes nothing: there is no model repository to scan, see --model-repository",
                    extra=event("reload_ignored", state=self._server.state),
                )
            self._reconciler.reload()

    def _announce_reload(self, begins: bool) -> None:
        if begins:
            self._notifier.reloading()
        elif self._server.state == READY:
            self._notifier.send("READY=1", f"STATUS={self._status()}")

    def _device_lost(self) -> None:
        if self._is_to_restart(self._config.on_device_loss):
            log.error(
                "the daemon finishes what other devices run, and ends for a new start",
                extra=event("restarting", code=1),
            )
            self._exit_code = 1
            if self._server.state != DRAINING:
                self._stop()

    def _hang_reason(self) -> str:
        # Before systemd's watchdog, which would end the process without naming anything.
        return self._server.hangs(self._notifier.watchdog_s * 2 / 3 or float("inf"))

    def _report_hang(self, why: str, stack: str) -> None:
        """Log, on the watchdog's thread, that nothing is served, and end the process if it is to restart."""
        about = event("hang", message=f"{why}: nothing is served meanwhile", stack=stack)
        log.error("%s: nothing is served meanwhile\n%s", why, stack, extra=about)
        if self._is_to_restart(self._config.on_hang):
            signals.die(f"{why}: the daemon ends for a new start")

    def _is_to_restart(self, choice: str) -> bool:
        return choice == "restart" or (choice == "auto" and self._notifier.supervised)

    def _stop(self) -> None:
        self._notifier.send("STOPPING=1", "STATUS=draining")
        self._server.drain()

    def _fail(self) -> None:
        self._exit_code = 1
        self._server.stop()

    def _tick(self, progress: bool) -> None:
        if self._watch is not None and not self._reconciler.active:  # which puts back itself
            self._watch.restore()
        if progress and self._notifier.watchdog_s and self._server.state != STARTING:
            self._notifier.alive()
        else:
            self._notifier.retry()
