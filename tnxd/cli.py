"""`tnxd`, the command: reads the configuration, wires the parts together, runs them."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import click

from tnxctl import __version__
from tnxctl.errors import FailedPrecondition, TensorNextError
from tnxd import config as configuration
from tnxd.config import Config
from tnxd.control import STARTING, Inventory
from tnxd.costs import CostModel
from tnxd.lifecycle import Notifier, raise_file_limit, stop_signals
from tnxd.models.builtin import builtin
from tnxd.router import Router
from tnxd.scheduler import Scheduler
from tnxd.server import Server
from tnxd.spinner import Spinner
from tnxd.telemetry import Telemetry
from tnxd.wakeup import Wakeup
from tnxd.work import Device

log = logging.getLogger("tnxd")

_FLUSH_S = 5.0
_TICK_S = 1.0


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": False})
@click.option(
    "--config",
    "path",
    envvar="TNXD_CONFIG",
    show_envvar=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="TOML file with settings.",
)
@click.option(
    "--bind",
    envvar="TNXD_BIND",
    show_envvar=True,
    multiple=True,
    metavar="ENDPOINT",
    help="Where to listen: tcp://HOST:PORT (port * picks one) or ipc://PATH.",
)
@click.option(
    "--model",
    "models",
    envvar="TNXD_MODEL",
    show_envvar=True,
    multiple=True,
    metavar="NAME",
    help="A model to serve; may be given several times.",
)
@click.option(
    "--default-model",
    envvar="TNXD_DEFAULT_MODEL",
    show_envvar=True,
    metavar="NAME",
    help="The model for requests that name none.",
)
@click.option(
    "--devices",
    envvar="TNXD_DEVICES",
    show_envvar=True,
    metavar="LIST",
    help="Devices to use: auto, or names with commas between: cpu,cuda:0.",
)
@click.option(
    "--cpu-workers",
    envvar="TNXD_CPU_WORKERS",
    show_envvar=True,
    type=int,
    metavar="N",
    help="CPU lanes; 0 chooses from the cores.",
)
@click.option(
    "--cpu-threads",
    envvar="TNXD_CPU_THREADS",
    show_envvar=True,
    type=int,
    metavar="N",
    help="torch threads per CPU lane; 0 chooses from the cores.",
)
@click.option(
    "--log-level",
    envvar="TNXD_LOG_LEVEL",
    show_envvar=True,
    type=click.Choice(configuration.LOG_LEVELS),
    help="What goes to the log.",
)
@click.version_option(__version__, prog_name="tnxd", message="%(prog)s %(version)s")
def main(
    path: Path | None,
    bind: tuple[str, ...],
    models: tuple[str, ...],
    default_model: str | None,
    devices: str | None,
    cpu_workers: int | None,
    cpu_threads: int | None,
    log_level: str | None,
) -> None:
    """Serve PyTorch models over ZeroMQ.

    Without options it listens on tcp://127.0.0.1:5555 and serves the built-in models on every device it finds. A flag
    wins over the environment, the environment over the file. A variable for an option that may be given several times
    holds its values with spaces between.

    Prints one line when it is ready. SIGTERM and SIGINT let it finish what it has taken in, then it exits with 0; a
    second signal stops it at once. Exit code 2: the configuration is wrong; 1: it cannot listen or cannot load.
    """
    overrides: dict[str, Any] = {
        "bind": list(bind) or None,
        "models": list(models) or None,
        "default_model": default_model,
        "devices": [name.strip() for name in devices.split(",")] if devices else None,
        "log_level": log_level,
        "cpu": {"workers": cpu_workers, "threads": cpu_threads},
    }
    try:
        config = configuration.load(path, overrides)
        inventory = Inventory({name: builtin(name) for name in config.models}, config.default)
    except TensorNextError as error:
        _exit(2, error)
    _log_to_stderr(config.log_level)
    if importlib.util.find_spec("torch") is None:
        _exit(1, FailedPrecondition("the daemon needs torch, which is not installed: pip install 'tensornext[daemon]'"))
    for name in sorted(os.environ.keys() - _known_variables()):
        if name.startswith("TNXD_"):
            log.warning("the environment variable %s is none of the daemon's", name)
    raise_file_limit()
    router = Router(config.limits)
    try:
        for endpoint in config.bind:
            router.bind(endpoint)
    except TensorNextError as error:
        router.close(0)
        _exit(1, error)
    code = _Daemon(config, inventory, router).run()
    logging.shutdown()
    # Lanes may be inside torch, and the interpreter cannot end under them: it would abort.
    os._exit(code)


class _Daemon:
    """The parts, wired."""

    def __init__(self, config: Config, inventory: Inventory, router: Router) -> None:
        self._config = config
        self._inventory = inventory
        self._router = router
        self._notifier = Notifier()
        self._costs = CostModel()
        self._exit_code = 0
        self._server = Server(
            router,
            Wakeup(),
            inventory,
            self._scheduler([]),
            Telemetry(),
            Spinner(config.spin_us),
            limits=config.limits,
            on_tick=self._tick,
            tick_s=min(_TICK_S, self._notifier.watchdog_s / 3 or _TICK_S),
            drain_timeout_s=config.drain_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
            max_delay_us=config.queue.max_delay_us,
        )

    def _scheduler(self, devices: list[Device]) -> Scheduler:
        queue = self._config.queue
        return Scheduler(
            devices,
            self._costs,
            max_requests=queue.max_requests,
            max_bytes=int(queue.max_mb * 1024 * 1024),
            max_per_model=queue.max_per_model or None,
        )

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self._notifier.send("STATUS=loading")
        threading.Thread(target=self._load, name="load", daemon=True).start()
        with stop_signals(lambda: self._server.call_soon(self._stop), self._config.drain_timeout_s + _FLUSH_S):
            self._server.run()
            self._router.close(max(_FLUSH_S, self._server.drain_left_s))
        log.info("stopped")
        return self._exit_code

    def _load(self) -> None:
        """On a thread of its own: health answers meanwhile."""
        try:
            from tnxd.loading import load_everything  # imports torch, which takes seconds

            loaded = load_everything(self._config, self._inventory, self._costs, self._server.completed)
        except BaseException as error:
            log.error("cannot start: %s", error, exc_info=not isinstance(error, RuntimeError))
            self._server.call_soon(self._give_up)
            return

        def install() -> None:
            inventory = self._inventory
            inventory.executors = loaded.executors
            inventory.device_failures.update(loaded.device_failures)
            inventory.model_failures.update(loaded.model_failures)
            for device in loaded.devices:
                executor = loaded.executors[device.name]
                executor.adopt_thread()
                for name in device.models:
                    model = inventory.models[name]
                    curve = self._costs.curve(device.name, name, model.example_group, inline=True)
                    for rows, micros in executor.warm_up_inline(model, device.inline_limit_us):
                        curve.observe(rows, micros)
            self._server.install(self._scheduler(loaded.devices))
            # What is alive now stays alive: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            self._announce()

        self._server.call_soon(install)

    def _announce(self) -> None:
        inventory = self._inventory
        devices = ", ".join(
            f"{executor.name} ({executor.lanes} lane{'s' if executor.lanes > 1 else ''})"
            for executor in inventory.executors.values()
        )
        models = ", ".join(
            name + " (default)" * (name == inventory.default_model) + " (failed)" * (name in inventory.model_failures)
            for name in inventory.models
        )
        line = f"ready on {', '.join(self._router.endpoints)}; devices: {devices}; models: {models}"
        with contextlib.suppress(OSError):  # nobody has to read it
            print(f"tnxd {__version__} {line}", flush=True)
        self._notifier.send("READY=1", f"STATUS={line}")

    def _stop(self) -> None:
        self._notifier.send("STOPPING=1", "STATUS=draining")
        self._server.drain()

    def _give_up(self) -> None:
        self._exit_code = 1
        self._server.stop()

    def _tick(self, progress: bool) -> None:
        if progress and self._notifier.watchdog_s and self._server.state != STARTING:
            self._notifier.send("WATCHDOG=1")


def _known_variables() -> set[str]:
    return {str(parameter.envvar) for parameter in main.params if isinstance(parameter, click.Option)}


def _exit(code: int, error: TensorNextError) -> None:
    click.echo(f"{'<3>' if _journal() else ''}tnxd: {error.message}", err=True)
    sys.exit(code)


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JournalFormatter("%(name)s: %(message)s")
        if _journal()
        else logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # a closed stderr must not become an error of its own


class _JournalFormatter(logging.Formatter):
    """journald adds the time itself, and reads the priority of each line from the <N> that it begins with."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def _journal() -> bool:
    """Whether stderr goes to systemd's journal."""
    return bool(os.environ.get("JOURNAL_STREAM"))


if __name__ == "__main__":
    main()
