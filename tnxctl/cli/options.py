"""Options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from tnxctl import durations
from tnxctl.cli import output, suggestions
from tnxctl.protocol.errors import InvalidArgument

_Command = TypeVar("_Command", bound=Callable[..., Any])

# As in tnxctl.encoder and tnxctl.protocol.wire, whose import would make `tnxctl --help` slow; a test compares them.
DEFAULT_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 600.0
MAX_DEADLINE_S = 86_400.0
LOWEST_PRIORITY = 3


class Finite(click.FloatRange):
    """A range of numbers without NaN and infinity, which FloatRange lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Duration(click.ParamType):  # type: ignore[type-arg]  # old versions of click have no argument for it
    """A span of time with its unit: 200us, 50ms, 2s; without one, seconds. It becomes a number of seconds.

    Args:
        most: the longest one that is taken, in seconds.
        zero: whether none at all is taken, too.
    """

    name = "duration"

    def __init__(self, most: float = math.inf, *, zero: bool = False) -> None:
        self._most = most
        self._zero = zero

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = durations.read(str(value))
        if seconds is None:
            self.fail(f"{value!r} is not a duration: 50ms, 200us and 0.05s are, and 0.05 is seconds.", param, ctx)
        if not 0 <= seconds <= self._most or math.isinf(seconds) or not (seconds or self._zero):
            limit = "" if math.isinf(self._most) else f" and up to {durations.spell(self._most)}"
            self.fail(f"{value!r} is not in the range {'from' if self._zero else 'above'} 0{limit}.", param, ctx)
        return seconds


def inherited(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """The value given for an option here, else the one given for it before the name of this command.

    tnxctl models --host 192.168.1.100 show resnet
    """
    key = f"tnxctl.{param.opts[0]}"
    if ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE:
        ctx.meta[key] = value
    return ctx.meta.get(key, value)


def _endpoints(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """The endpoints that ZeroMQ connects to, made of what --host takes; None where no host is given."""
    given = inherited(ctx, param, value)
    if given is None:
        return None
    from tnxctl.endpoint import parse_endpoints

    try:
        return parse_endpoints(given.split(","))
    except InvalidArgument as error:
        raise click.BadParameter(error.message, param=param) from None


def _endpoint(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """The same for a command that is about one daemon."""
    found = _endpoints(ctx, param, value)
    if found is not None and len(found) > 1:
        raise click.BadParameter(
            f"{ctx.command_path} is about one daemon, and these are {len(found)}: ask each by itself.", param=param
        )
    return None if found is None else found[0]


def host(*, several: bool = False, **settings: Any) -> Callable[[_Command], _Command]:
    """--host, with further settings of an option of click's.

    Args:
        several: whether it takes several addresses; the command gets a list of them then.
    """
    return click.option(
        "--host",
        "endpoints" if several else "endpoint",
        callback=_endpoints if several else _endpoint,
        metavar="HOST[,HOST...]" if several else "HOST",
        help="Where the daemon is: ip, ip:port, hostname, tcp://... or ipc://..."
        + ("; or several daemons that serve the same models, of which any may answer." if several else ""),
        **settings,
    )


def common(command: _Command) -> _Command:
    """--host, --timeout and --json."""
    return _daemon(command, DEFAULT_TIMEOUT_S, "Longest wait for the answer to a request.")


def common_of_several(command: _Command) -> _Command:
    """The same for a command that any of several daemons may serve."""
    return _daemon(command, DEFAULT_TIMEOUT_S, "Longest wait for the answer to a request.", several=True)


def slow(command: _Command) -> _Command:
    """The same for a command that waits for a daemon's work."""
    what = f"Longest wait until the daemon is done, at most {DEFAULT_TIMEOUT_S:g} of it until it is reached."
    return _daemon(command, LOAD_TIMEOUT_S, what)


def _daemon(command: _Command, timeout: float, what: str, several: bool = False) -> _Command:
    command = click.option(
        "--timeout",
        type=Duration(),
        callback=inherited,
        default=f"{timeout:g}s",
        show_default=True,
        metavar="DURATION",
        help=what,
    )(as_json(command))
    return host(several=several, envvar="TNX_HOST", show_envvar=True, default="127.0.0.1", show_default=True)(command)


def as_json(command: _Command) -> _Command:
    """--json."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=output.choose_json,
        help="Print one JSON document on standard output, for machines.",
    )(command)


def duration(
    name: str, *, default: str, help: str, most: float = math.inf, zero: bool = False
) -> Callable[[_Command], _Command]:
    """An option that is a span of time. Args: most, zero: see `Duration`."""
    kind = Duration(most, zero=zero)
    return click.option(name, type=kind, default=default, show_default=True, metavar="DURATION", help=help)


def model(help: str) -> Callable[[_Command], _Command]:
    """--model, a model or one version of it; "" without one."""
    return click.option("--model", default="", metavar="NAME[@VERSION]", shell_complete=suggestions.models, help=help)


def request(*, no_device: str, missed: str, tensors: str, cast: str) -> Callable[[_Command], _Command]:
    """--model, --device, --deadline, --priority, --input and --cast: the request that a command sends.

    Args:
        no_device: where it runs without --device.
        missed: a sentence about a deadline that cannot be kept.
        tensors: help of --input.
        cast: help of --cast.
    """
    found = [
        model("Model, or one version of it.  [default: the daemon's default model]"),
        click.option(
            "--device",
            default="",
            metavar="DEVICE",
            shell_complete=suggestions.devices,
            help="auto: the one that is predicted to be done first. cpu, cuda:0, ...: that one or an error.  "
            f"[default: {no_device}]",
        ),
        click.option(
            "--deadline",
            type=Duration(most=MAX_DEADLINE_S),
            metavar="DURATION",
            help=f"Time after which an answer is worthless: 50ms, 200us, 0.05s. {missed}",
        ),
        click.option(
            "--priority",
            type=click.IntRange(0, LOWEST_PRIORITY),
            help="0 goes first, 3 last.  [default: as the model is configured]",
        ),
        click.option("--input", "input_path", type=click.Path(allow_dash=True), metavar="FILE|JSON", help=tensors),
        click.option("--cast", is_flag=True, help=cast),
    ]

    def add(command: _Command) -> _Command:
        for option in reversed(found):
            command = option(command)
        return command

    return add


def check_cast(input_path: str | None, cast: bool) -> None:
    """Refuse --cast without --input. Raises click.UsageError."""
    if input_path is None and cast:
        raise click.UsageError("--cast converts the tensors of --input, which is missing")
