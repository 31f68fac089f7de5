"""Options that the programs here have in common, and how they end."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import click

from processes import BenchError
from tnxctl.protocol.errors import InvalidArgument

Program = Callable[..., None]

command = functools.partial(
    click.command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120}
)
"""`click.command`, as all of them are made."""

_FILE = click.Path(dir_okay=False, path_type=Path)


def numbers(kind: type[int] | type[float]) -> Callable[..., tuple[float, ...] | None]:
    """Callback of an option that takes positive numbers with commas between."""

    def convert(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[float, ...] | None:
        if text is None:
            return None
        try:
            found = tuple(kind(item) for item in text.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a list of numbers, as in 1,8,64") from None
        for number in found:
            if not 0 < number < 1e7:
                raise click.BadParameter(f"{number:g} is not between 0 and 10,000,000")
        return found

    return convert


def listed(
    name: str, default: str, says: str, kind: type[int] | type[float] = int, metavar: str = "N,N,..."
) -> Callable[[Program], Program]:
    """An option that takes positive numbers with commas between, and what it `says` in --help."""
    return click.option(name, metavar=metavar, callback=numbers(kind), default=default, show_default=True, help=says)


def lengths(
    *, rounds: tuple[int, int], seconds: tuple[float, float], longest: float = 600, note: str = ""
) -> Callable[[Program], Program]:
    """Options --rounds, --seconds and --quick. The program is given `rounds` and `seconds`, resolved.

    Args:
        rounds, seconds: what they are by default, and with --quick.
        longest: most seconds that may be asked for. note: what else there is to say about them.
    """

    def decorate(program: Program) -> Program:
        def resolved(*, quick: bool, **options: Any) -> None:
            for name, (usual, short) in (("rounds", rounds), ("seconds", seconds)):
                options[name] = options[name] or (short if quick else usual)
            program(**options)

        return _with_options(
            program,
            resolved,
            click.option(
                "--rounds",
                type=click.IntRange(1, 1000),
                help=f"Rounds of each measurement.  [default: {rounds[0]}; quick: {rounds[1]}]",
            ),
            click.option(
                "--seconds",
                type=click.FloatRange(0.001, longest),
                help=f"Length of one measurement of one round{note}.  [default: {seconds[0]}; quick: {seconds[1]}]",
            ),
            click.option("--quick", is_flag=True, help="Short rounds and few: to see that it works, not to rely on."),
        )

    return decorate


def parts(known: Collection[str]) -> Callable[[Program], Program]:
    """Option --parts, which takes names with commas between. Args: known: all that there are, the default."""

    def convert(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for part in found:
            if part not in known:
                raise click.BadParameter(f"no part {part!r}; there are {', '.join(known)}")
        return found

    return click.option(
        "--parts",
        metavar="PART,PART,...",
        callback=convert,
        default=",".join(known),
        show_default=True,
        help="Only these.",
    )


def outputs(picture: str) -> Callable[[Program], Program]:
    """Options --json and --plot. The program is given `json_path` and `plot_path`, which can be written.

    Args:
        picture: what --plot does, up to "this PNG".
    """

    def decorate(program: Program) -> Program:
        def checked(*, json_path: Path | None, plot_path: Path | None, **options: Any) -> None:
            if plot_path is not None:
                require("matplotlib", "--plot")
            for option, path in (("--json", json_path), ("--plot", plot_path)):
                if path is not None and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
                    raise click.BadParameter(f"{path} cannot be written", param_hint=option)  # before it is measured
            program(json_path=json_path, plot_path=plot_path, **options)

        return _with_options(
            program,
            checked,
            click.option("--json", "json_path", type=_FILE, help="Write all results to this file."),
            click.option("--plot", "plot_path", type=_FILE, help=f"{picture} this PNG (needs matplotlib)."),
        )

    return decorate


def _with_options(program: Program, around: Program, *options: Callable[[Program], Program]) -> Program:
    """`around` in place of the program that it calls, with these options before those that the program has."""
    decorated: Program = functools.wraps(program)(around)
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def require(package: str, option: str, module: str = "") -> None:
    """Refuse an option whose package is not installed.

    Raises:
        click.UsageError: so it is.
    """
    try:
        __import__(module or package)
    except ImportError:
        raise click.UsageError(f"{option} needs the package {package}, which is not installed") from None


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Stop what was started within the block, however that ends, and say in a sentence what went wrong."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except (BenchError, InvalidArgument) as error:
        click.echo(f"{click.get_current_context().info_name}: {error}", err=True)
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)  # by way of every `finally`
