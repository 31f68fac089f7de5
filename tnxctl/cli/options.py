"""Options that several commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

from tnxctl.cli import output
from tnxctl.errors import InvalidArgument

_Command = TypeVar("_Command", bound=Callable[..., Any])

DEFAULT_TIMEOUT_S = 5.0


class Finite(click.FloatRange):
    """A range of numbers without NaN and infinity, which FloatRange lets through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def _endpoint(_: click.Context, param: click.Parameter, value: str) -> str:
    """What --host takes, made into the endpoint that ZeroMQ connects to."""
    from tnxctl.endpoint import parse_endpoint

    try:
        return parse_endpoint(value)
    except InvalidArgument as error:
        raise click.BadParameter(error.message, param=param) from None


def common(command: _Command) -> _Command:
    """--host, --timeout and --json."""
    command = click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=output.choose_json,
        help="Print one JSON document on standard output, for machines.",
    )(command)
    command = click.option(
        "--timeout",
        type=Finite(min=0, min_open=True),
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        metavar="SECONDS",
        help="Longest wait for the answer to a request.",
    )(command)
    return click.option(
        "--host",
        "endpoint",
        callback=_endpoint,
        envvar="TNX_HOST",
        show_envvar=True,
        default="127.0.0.1",
        show_default=True,
        metavar="HOST",
        help="Where the daemon is: ip, ip:port, hostname, tcp://... or ipc://...",
    )(command)
