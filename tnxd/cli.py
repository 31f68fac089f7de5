"""`tnxd`, the command: reads the configuration, wires the parts together, runs them."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tnxctl import __version__
from tnxctl.errors import FailedPrecondition, TensorNextError
from tnxd import check as checking
from tnxd import config as configuration
from tnxd import logs, offer, signals
from tnxd.admission import Admission, is_loopback
from tnxd.advice import installing
from tnxd.config import Config, control_of
from tnxd.control import Inventory
from tnxd.costs import CostModel
from tnxd.executors.execution import Executor
from tnxd.lifecycle import Notifier, raise_file_limit
from tnxd.loading import Changes, Loader
from tnxd.registry import DRAINING, READY, STARTING, Registry
from tnxd.router import Router
from tnxd.scheduler import Scheduler
from tnxd.server import Server
from tnxd.spinner import Spinner
from tnxd.telemetry import Telemetry
from tnxd.wakeup import Wakeup
from tnxd.watchdog import Watchdog
from tnxd.work import Device

if TYPE_CHECKING:
    from tnxd.models.process import Watch

log = logging.getLogger("tnxd")

_FLUSH_S = 5.0
_LAST_WORDS_S = 1.0
_TICK_S = 1.0
_MIB = 1024 * 1024
_GC_THRESHOLD = 10_000


def _option(flag: str, *name: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that the environment may hold, too: --default-model as TNXD_DEFAULT_MODEL."""
    variable = "TNXD_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, *name, envvar=variable, show_envvar=True, **settings)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": False})
@_option(
    "--config",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with settings.",
)
@_option(
    "--bind",
    multiple=True,
    metavar="ENDPOINT",
    help="Where to listen: HOST:PORT, tcp://HOST:PORT (port * picks one) or ipc://PATH.",
)
@_option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="A built-in model to serve; may be given several times.",
)
@_option(
    "--model-repository",
    metavar="DIRECTORY",
    help="Serve the models of this directory: NAME/VERSION/model.pt2 and so on.",
)
@_option(
    "--default-model",
    metavar="NAME",
    help="The model for requests that name none.",
)
@_option(
    "--devices",
    metavar="LIST",
    help="Devices to use: auto, or names with commas between: cpu,cuda:0.",
)
@_option(
    "--cpu-workers",
    type=int,
    metavar="N",
    help="CPU lanes; 0 chooses from the cores.",
)
@_option(
    "--cpu-threads",
    type=int,
    metavar="N",
    help="torch threads per CPU lane; 0 chooses from the cores.",
)
@_option(
    "--log-level",
    type=click.Choice(configuration.LOG_LEVELS),
    help="What goes to the log.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Print what is configured and what would be served, look whether all of it is right, and end.",
)
@click.version_option(__version__, prog_name="tnxd", message="%(prog)s %(version)s")
@click.pass_context
def main(
    ctx: click.Context,
    path: Path | None,
    bind: tuple[str, ...],
    models: tuple[str, ...],
    model_repository: str | None,
    default_model: str | None,
    devices: str | None,
    cpu_workers: int | None,
    cpu_threads: int | None,
    log_level: str | None,
    check: bool,
) -> None:
    """Serve PyTorch models over ZeroMQ.

    Without options it listens on tcp://127.0.0.1:5555 and serves the built-in models on every device it finds; with
    --model-repository it serves that. A flag wins over the environment, the environment over the file. A variable for
    an option that may be given several times holds its values with spaces between.

    Prints one line when it is ready. SIGHUP looks at the model repository again. SIGTERM and SIGINT let it finish what
    it has taken in, then it exits with 0; after a second signal, what is left gets UNAVAILABLE. Exit code 2: the
    configuration is wrong; 1: it cannot listen or cannot load, it lost a device, or a model hangs.

    --check needs no torch, listens nowhere and loads nothing: it prints every setting with the flag, variable or file
    that it comes from, and the models that it finds. Exit code 2: the configuration is wrong; 1: something in the model
    repository could not be served, which standard error names.
    """
    signals.prepare()  # `tnxd.__main__` has done so long before; other programs call this function
    overrides: dict[str, Any] = {
        "bind": list(bind) or None,
        "models": list(models) or None,
        "model_repository": model_repository,
        "default_model": default_model,
        "devices": [name.strip() for name in devices.split(",")] if devices else None,
        "log_level": log_level,
        "cpu": {"workers": cpu_workers, "threads": cpu_threads},
    }
    try:
        config = configuration.load(path, overrides)
        if check:
            click.echo("\n".join(checking.settings(config, checking.origins(ctx, path))))
        catalog = offer.catalog(config)
        offer.check_default(config, catalog)
    except TensorNextError as error:
        _exit(2, error)
    if check:
        sys.exit(checking.finish(catalog, _odd_variables()))
    logs.install(config.log_level)
    if importlib.util.find_spec("torch") is None:
        advice = installing("torch", "safetensors")
        _exit(1, FailedPrecondition(f"the daemon needs torch, which is not installed: {advice}"))
    for sentence in _odd_variables():
        log.warning("%s", sentence)
    raise_file_limit()
    queue = config.queue
    admission = Admission(config.clients, max_requests=queue.max_requests, max_bytes=int(queue.max_mb * _MIB))
    router = Router(config.limits, admission)
    try:
        for endpoint in config.bind:
            router.bind(endpoint)
    except TensorNextError as error:
        router.close(0)
        _exit(1, error)
    _warn_of_strangers(config, router.endpoints)
    try:
        registry = Registry(config.default_model)
        registry.announce(catalog)
        code = _Daemon(config, registry, router, admission).run()
    except BaseException:
        log.exception("the daemon has failed, and ends with 1")
        code = 1
    logs.flush(_LAST_WORDS_S)
    # Lanes may be inside torch, and the interpreter cannot end under them: it would abort.
    os._exit(code)


def _warn_of_strangers(config: Config, endpoints: list[str]) -> None:
    """Say what whoever reaches the daemon could do there."""
    for endpoint in endpoints:
        if endpoint.startswith("tcp://") and not is_loopback(endpoint.removeprefix("tcp://").rpartition(":")[0]):
            orders = ", and load, unload and route them" if control_of(config) == "any" else ""
            log.warning(
                "%s: the daemon does not ask who its clients are: whoever reaches it can run every model%s, and read "
                "names, signatures and traffic from health",
                endpoint,
                orders,
            )


class _Daemon:
    """The parts, wired."""

    def __init__(self, config: Config, registry: Registry, router: Router, admission: Admission) -> None:
        self._config = config
        self._inventory = Inventory(registry)
        self._router = router
        self._notifier = Notifier()
        self._costs = CostModel()
        self._loader: Loader | None = None
        self._reload_waits = False
        self._watch: Watch | None = None
        self._exit_code = 0
        self._server = Server(
            router,
            Wakeup(),
            self._inventory,
            self._scheduler([]),
            Telemetry(),
            Spinner(config.spin_us),
            limits=config.limits,
            on_tick=self._tick,
            tick_s=min(_TICK_S, self._notifier.watchdog_s / 3 or _TICK_S),
            drain_timeout_s=config.drain_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            max_delay_us=config.queue.max_delay_us,
            admission=admission,
            remote_control=control_of(config),
            on_device_lost=self._device_lost,
        )

    def _scheduler(self, devices: list[Device]) -> Scheduler:
        queue = self._config.queue
        return Scheduler(
            devices,
            self._costs,
            max_requests=queue.max_requests,
            max_bytes=int(queue.max_mb * _MIB),
            max_per_model=queue.max_per_model or None,
            max_bytes_per_model=int(queue.max_mb_per_model * _MIB) or None,
        )

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self._notifier.send("STATUS=loading")
        threading.Thread(target=self._open_devices, name="devices", daemon=True).start()
        call_soon = self._server.call_soon
        # The drain, the flush, and as much again before it counts as hung.
        patience_s = self._config.drain_timeout_s + 2 * _FLUSH_S
        with signals.handled_signals(
            lambda: call_soon(self._stop), lambda: call_soon(self._reload), patience_s, _FLUSH_S
        ):
            Watchdog(self._hang, self._hangs)
            self._router.close(self._server.run(_FLUSH_S))
            log.info("stopped")
            logs.flush(_LAST_WORDS_S)  # while a signal does not end it yet
        return self._exit_code

    def _open_devices(self) -> None:
        """Open the devices on a thread of its own: health answers meanwhile."""
        try:
            from tnxd.executors.devices import open_devices  # imports torch, which takes seconds

            opened = open_devices(self._config, self._server.completed)
            if not opened.executors:
                raise RuntimeError(f"no device works: {opened.failures}")
            if self._config.model_repository:
                import tnxd.models.formats.opening  # noqa: F401 - it imports much that stays, too
            # What is alive now stays alive: the collector need not look at it again. Models come later, and may go.
            gc.collect()
            gc.freeze()
            # Requests come and go by the thousand and hold no cycles: by default, it would look through them every
            # few hundred.
            gc.set_threshold(_GC_THRESHOLD)
        except BaseException as error:
            log.error("cannot start: %s", error, exc_info=not isinstance(error, RuntimeError))
            self._server.call_soon(self._give_up)
            return
        self._server.call_soon(lambda: self._load(opened.executors, opened.failures))

    def _load(self, executors: Mapping[str, Executor], failures: Mapping[str, str]) -> None:
        """The devices are open: load the models on them."""
        config, inventory = self._config, self._inventory
        for name, failure in failures.items():
            log.error("device %s is left out: %s", name, failure)
        inventory.executors = executors
        inventory.device_failures.update(failures)
        for executor in executors.values():
            executor.adopt_thread()
        scheduler = self._scheduler([self._device(executor) for executor in executors.values()])
        self._loader = Loader(
            inventory.registry,
            scheduler,
            executors,
            self._costs,
            lambda: offer.catalog(config),
            self._server.call_soon,
            limits=config.limits,
            budget={"cpu": int(config.memory.cpu_mb * _MIB), "cuda": int(config.memory.cuda_mb * _MIB)},
            load_timeout_s=config.load_timeout_s,
            on_reload=self._announce_reload,
            on_mixing=self._server.end_batches,
        )
        self._server.install(scheduler, self._loader)
        from tnxd.models.process import Watch  # imports torch, which is here by now

        self._watch = Watch()
        self._loader.start(self._loaded)

    def _device(self, executor: Executor) -> Device:
        return Device(
            executor.name,
            executor.kind,
            executor.lanes,
            set(),
            executor.memory_mb()[0],
            inline_limit_us=self._config.cpu.inline_limit_us if executor.kind == "cpu" else 0.0,
            lane_threads=executor.lane_threads,
        )

    def _loaded(self, outcome: Changes | TensorNextError) -> None:
        """The first load of everything is over."""
        if not any(version.servable for _, version in self._inventory.registry):
            why = outcome.message if isinstance(outcome, TensorNextError) else outcome.failed
            if why:
                log.error("cannot start: no model can be served: %s", why)
                self._give_up()
                return
            log.warning("%s has no model yet: publish one, then tnxctl reload", self._config.model_repository)
        self._server.serve()
        line = self._status()
        print(f"tnxd {__version__} {line}", flush=True)  # as `tnxd.logs` has it: nobody has to read it
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
        """SIGHUP. One that comes while models are loaded counts when they are: what it is about may be read already."""
        if self._server.state == STARTING:
            self._reload_waits = True
        elif self._server.state != READY or self._loader is None:
            log.warning("SIGHUP is ignored: the daemon is %s", self._server.state)
        else:
            if not self._config.model_repository:
                log.warning("SIGHUP changes nothing: there is no model repository to look at, see --model-repository")
            self._loader.reload()

    def _announce_reload(self, begins: bool) -> None:
        if begins:
            self._notifier.reloading()
        elif self._server.state == READY:
            self._notifier.send("READY=1", f"STATUS={self._status()}")

    def _device_lost(self) -> None:
        if self._is_to_restart(self._config.on_device_loss):
            log.error("the daemon finishes what other devices run, and ends for a new start")
            self._exit_code = 1
            if self._server.state != DRAINING:
                self._stop()

    def _hang(self) -> str:
        # Before systemd's watchdog, which would end the process without naming anything.
        return self._server.hangs(self._notifier.watchdog_s * 2 / 3 or float("inf"))

    def _hangs(self, why: str, stack: str) -> None:
        """Log, on the watchdog's thread, that nothing is served, and end the process if it is to restart."""
        log.error("%s: nothing is served meanwhile\n%s", why, stack)
        if self._is_to_restart(self._config.on_hang):
            signals.die(f"{why}: the daemon ends for a new start")

    def _is_to_restart(self, choice: str) -> bool:
        return choice == "restart" or (choice == "auto" and self._notifier.supervised)

    def _stop(self) -> None:
        self._notifier.send("STOPPING=1", "STATUS=draining")
        self._server.drain()

    def _give_up(self) -> None:
        self._exit_code = 1
        self._server.stop()

    def _tick(self, progress: bool) -> None:
        if self._watch is not None and self._loader is not None and not self._loader.active:  # which puts back itself
            self._watch.look()
        if progress and self._notifier.watchdog_s and self._server.state != STARTING:
            self._notifier.alive()
        else:
            self._notifier.retry()


def _odd_variables() -> Iterator[str]:
    """Sentences about variables that look like the daemon's, and are not."""
    known = {parameter.envvar for parameter in main.params if isinstance(parameter.envvar, str)}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("TNXD_"):
            close = get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]}?" if close else ""
            yield f"the environment variable {name} is none of the daemon's{hint}"


def _exit(code: int, error: TensorNextError) -> None:
    click.echo(f"{'<3>' if logs.to_journal() else ''}tnxd: {error.message}", err=True)
    logs.flush(_LAST_WORDS_S)
    sys.exit(code)


if __name__ == "__main__":
    main()
