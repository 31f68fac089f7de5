"""`tnxd`, the command: flags become a configuration, and that a running daemon and an exit code."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from tnxctl import __version__
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.wire import MIB
from tnxd import check as checking
from tnxd import config as configuration
from tnxd import keys, offered_models
from tnxd.advice import installing
from tnxd.config import Config, control_of
from tnxd.daemon import LAST_WORDS_S, Daemon
from tnxd.deployment.registry import Registry
from tnxd.events import event
from tnxd.process import activation, logs, signals
from tnxd.process.systemd import raise_file_limit
from tnxd.tracing import exporter
from tnxd.transport import inherited
from tnxd.transport.access import Access
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router

log = logging.getLogger("tnxd")

DEFAULT_RECEIVER = "http://127.0.0.1:4318"
"""Receiver of spans where `--otel` names none: a collector on this host."""


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
    "--insecure",
    is_flag=True,
    default=None,
    help="Listen on other addresses than loopback without asking for keys: whoever reaches them is let in.",
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
    "--record-directory",
    metavar="DIRECTORY",
    help="Let admins record requests into files of this directory: tnxctl record.",
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
    help="Most torch threads of one batch; 0 chooses from the cores.",
)
@_option(
    "--log-level",
    type=click.Choice(configuration.LOG_LEVELS),
    help="Least level of messages that go to the log.",
)
@_option(
    "--log-format",
    type=click.Choice(configuration.LOG_FORMATS),
    help="text: lines for people. json: an event per line, for machines.",
)
@_option(
    "--otel",
    "traces_endpoint",
    is_flag=False,
    flag_value=DEFAULT_RECEIVER,
    metavar="[URL]",
    help=f"Send spans of sampled requests to this OTLP/HTTP receiver (alone: {DEFAULT_RECEIVER}).",
)
@click.option(
    "--check",
    is_flag=True,
    help="Print what is configured and what would be served, check all of it, and end.",
)
@click.version_option(__version__, prog_name="tnxd", message="%(prog)s %(version)s")
@click.pass_context
def main(
    ctx: click.Context,
    path: Path | None,
    bind: tuple[str, ...],
    insecure: bool | None,
    models: tuple[str, ...],
    model_repository: str | None,
    default_model: str | None,
    record_directory: str | None,
    devices: str | None,
    cpu_workers: int | None,
    cpu_threads: int | None,
    log_level: str | None,
    log_format: str | None,
    traces_endpoint: str | None,
    check: bool,
) -> None:
    """Serve PyTorch models over ZeroMQ.

    Without options it listens on tcp://127.0.0.1:5555 and serves the built-in models on every device it finds; with
    --model-repository it serves that. A flag wins over the environment, the environment over the file. A variable for
    an option that may be given several times holds its values with spaces between.

    Prints one line when it is ready. SIGHUP scans the model repository again. SIGTERM and SIGINT let it finish what
    it has taken in, then it exits with 0; after a second signal, what is left gets UNAVAILABLE. Exit code 2: the
    configuration is wrong; 1: it cannot listen or cannot load, it lost a device, or a model hangs.

    --check needs no torch, listens nowhere and loads nothing: it prints every setting with the flag, variable or file
    that it comes from, and the models that it finds. Exit code 2: the configuration is wrong; 1: something in the model
    repository could not be served, which standard error names.
    """
    signals.prepare()  # `tnxd.__main__` has done so long before; other programs call this function
    overrides: dict[str, Any] = {
        "bind": list(bind) or None,
        "insecure": insecure,
        "models": list(models) or None,
        "model_repository": model_repository,
        "default_model": default_model,
        "record_directory": record_directory,
        "devices": [name.strip() for name in devices.split(",")] if devices else None,
        "log_level": log_level,
        "log_format": log_format,
        "cpu": {"workers": cpu_workers, "threads": cpu_threads},
        "traces": {"endpoint": traces_endpoint},
    }
    try:
        config = configuration.load(path, overrides)
        if check:
            click.echo("\n".join(checking.settings(config, checking.origins(ctx, path))))
        keys.check_exposure(config, config.bind)
        ring, secret = keys.load(config)
        catalog = offered_models.catalog(config)
        offered_models.check_default(config, catalog)
    except TensorNextError as error:
        _exit(2, error)
    if check:
        sys.exit(checking.finish(catalog, _odd_variables()))
    logs.install(config.log_level, as_json=config.log_format == "json")
    if importlib.util.find_spec("torch") is None:
        advice = installing("torch", "safetensors")
        _exit(1, FailedPrecondition(f"the daemon needs torch, which is not installed: {advice}"))
    if config.log_format == "json":
        log.info("tnxd %s starts", __version__, extra=event("starting", release=__version__, pid=os.getpid()))
    if config.traces.endpoint and not exporter.is_installed():
        advice = installing(*exporter.PACKAGES)
        _exit(1, FailedPrecondition(f"traces.endpoint needs OpenTelemetry, which is not installed: {advice}"))
    for sentence in _odd_variables():
        log.warning("%s", sentence, extra=event("unknown_variable"))
    raise_file_limit()
    queue = config.queue
    admission = Admission(config.clients, max_requests=queue.max_requests, max_bytes=int(queue.max_mb * MIB))
    try:
        endpoints = _endpoints(config)
    except TensorNextError as error:
        _exit(2, error)
    access = Access(ring, control_of(config))
    router = Router(config.limits, admission, access, secret)
    try:
        for endpoint, listener in endpoints.items():
            router.bind(endpoint, listener)
        keys.check_exposure(config, router.endpoints)
    except TensorNextError as error:
        router.close(0)
        _exit(1, error)
    for sentence in keys.warnings(config, router.endpoints):
        log.warning("%s", sentence, extra=event("insecure"))
    try:
        registry = Registry(config.default_model)
        registry.announce(catalog)
        code = Daemon(config, registry, router, admission, access).run()
    except BaseException:
        log.exception("the daemon has failed, and ends with 1", extra=event("daemon_failed", code=1))
        code = 1
    logs.flush(LAST_WORDS_S)
    # Lanes may be inside torch, and the interpreter cannot end under them: it would abort.
    os._exit(code)


def _endpoints(config: Config) -> dict[str, inherited.Listener | None]:
    """Endpoints to listen on, with the listeners that systemd holds for them.

    Raises:
        InvalidArgument: what it holds does not fit the configuration.
    """
    held = inherited.listeners(activation.take_descriptors())
    endpoints = inherited.assign(config.bind, held)
    for endpoint, listener in endpoints.items():
        if held and listener is None:
            log.warning(
                "%s is not among what systemd holds for the daemon: nobody can connect there during a restart, unless "
                "tensornext.socket has it as a ListenStream=, too",
                endpoint,
                extra=event("address_not_held", address=endpoint),
            )
    return endpoints


def _odd_variables() -> Iterator[str]:
    """Sentences about variables that look like the daemon's, and are not."""
    known = {parameter.envvar for parameter in main.params if isinstance(parameter.envvar, str)}
    for name in sorted(os.environ.keys() - known):
        if name.startswith("TNXD_"):
            close = get_close_matches(name, known, 1)
            hint = f", did you mean {close[0]}?" if close else ""
            yield f"the environment variable {name} is none of the daemon's{hint}"


def _exit(code: int, error: TensorNextError) -> None:
    logs.say(f"tnxd: {error.message}", event("cannot_start", code=code), error=True)
    logs.flush(LAST_WORDS_S)
    sys.exit(code)


if __name__ == "__main__":
    main()
