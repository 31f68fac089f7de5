"""`tnxd`, the command: reads the configuration, wires the parts together, runs them."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

import click

from tnxctl import __version__
from tnxctl.errors import TensorNextError
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

log = logging.getLogger("tnxd")

_FLUSH_S = 5.0
_TICK_S = 1.0


@click.command(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "TNXD"})
@click.option("--config", "path", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with settings.")
@click.option(
    "--bind",
    multiple=True,
    metavar="ENDPOINT",
    help="Where to listen: tcp://HOST:PORT (port * picks one) or ipc://PATH.",
)
@click.option("--model", "models", multiple=True, metavar="NAME", help="A model to serve; may be given several times.")
@click.option("--default-model", metavar="NAME", help="The model for requests that name none.")
@click.option("--devices", metavar="LIST", help="Devices to use: auto, or names with commas between: cpu,cuda:0.")
@click.option("--cpu-workers", type=int, metavar="N", help="CPU lanes; 0 chooses from the cores.")
@click.option("--cpu-threads", type=int, metavar="N", help="torch threads per CPU lane; 0 chooses from the cores.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="What goes to the log.")
@click.version_option(__version__, prog_name="tnxd")
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

    Without options it listens on tcp://127.0.0.1:5555 and serves the built-in models on every device it finds. Every
    option can come from the environment: TNXD_BIND, TNXD_CONFIG, TNXD_DEVICES, ... A flag wins over the environment,
    the environment over the file.

    Prints one line when it is ready. SIGTERM and SIGINT let it finish what it has taken in, then it exits with 0; a
    second signal stops it at once. Exit code 2: the configuration is wrong; 1: it cannot listen or cannot load.
    """
    overrides: dict[str, Any] = {
        "bind": list(bind) or None,
        "models": list(models) or None,
        "default_model": default_model,
        "devices": devices.split(",") if devices else None,
        "log_level": log_level,
        "cpu": {"workers": cpu_workers, "threads": cpu_threads},
    }
    try:
        config = configuration.load(path, overrides)
        inventory = Inventory({name: builtin(name) for name in config.models}, config.default)
    except TensorNextError as error:
        _exit(2, error)
    _log_to_stderr(config.log_level)
    raise_file_limit()
    router = Router(config.limits)
    try:
        for endpoint in config.bind:
            router.bind(endpoint)
    except TensorNextError as error:
        router.close(0)
        _exit(1, error)
    sys.exit(_Daemon(config, inventory, router).run())


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
            Scheduler([], self._costs, max_requests=config.queue.max_requests, max_bytes=self._queue_bytes),
            self._costs,
            Telemetry(),
            Spinner(config.spin_us),
            limits=config.limits,
            on_tick=self._tick,
            tick_s=min(_TICK_S, self._notifier.watchdog_s / 3 or _TICK_S),
            drain_timeout_s=config.drain_timeout_s,
            stall_timeout_s=config.stall_timeout_s,
        )

    @property
    def _queue_bytes(self) -> int:
        return int(self._config.queue.max_mb * 1024 * 1024)

    def run(self) -> int:
        """Serve until told to stop; returns the exit code."""
        self._notifier.send("STATUS=loading")
        threading.Thread(target=self._load, name="load", daemon=True).start()
        with stop_signals(lambda: self._server.call_soon(self._stop)):
            self._server.run()
        self._router.close(_FLUSH_S)
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
                    executor.warm_up_inline(inventory.models[name])
            self._server.install(
                Scheduler(
                    loaded.devices,
                    self._costs,
                    max_requests=self._config.queue.max_requests,
                    max_bytes=self._queue_bytes,
                )
            )
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


def _exit(code: int, error: TensorNextError) -> None:
    click.echo(f"tnxd: {error.message}", err=True)
    sys.exit(code)


def _log_to_stderr(level: str) -> None:
    if os.environ.get("JOURNAL_STREAM"):
        form = "%(priority)s%(name)s: %(message)s"  # journald reads the priority from <N> and adds the time itself
    else:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_priority)
    handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.raiseExceptions = False  # a closed stderr must not become an error of its own


def _add_priority(record: logging.LogRecord) -> bool:
    record.priority = (
        "<3>" if record.levelno >= logging.ERROR else "<4>" if record.levelno >= logging.WARNING else "<6>"
    )
    return True


if __name__ == "__main__":
    main()
