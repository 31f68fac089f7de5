"""`tnxctl top`: what a daemon does now, drawn again every second.

loops.py     once, live, or one below the other    watching.py   asks the daemon, in a thread
history.py   what is held against what             view.py       a look at a daemon, as lines
screen.py    the terminal
"""

from __future__ import annotations

import sys

import click

from tnxctl.cli import options
from tnxctl.cli.options import common

# As in view.py, whose import would make --help slow; a test compares them.
SORTS = ("rate", "p99", "queue", "errors", "grew", "name")


@click.command("top", short_help="Watch what the daemon does, and where the time goes.")
@common
@options.duration("--interval", default="1s", help="Time from one update to the next.", most=60.0)
@click.option("--once", is_flag=True, help="Print one such interval, and end: the default without a terminal.")
@click.option(
    "--sort", type=click.Choice(SORTS), default="rate", show_default=True, help="Order of models, the largest first."
)
@click.pass_context
def command(
    ctx: click.Context, endpoint: str, timeout: float, as_json: bool, interval: float, once: bool, sort: str
) -> None:
    """Watch what the daemon does: who asks how much, where the time goes, and what grew.

    The numbers are of the last five seconds. BEFORE and GREW hold them against all since the daemon's start, or with b
    against the last minute: below the models stands which stage made requests slower, and what else changed. The stages
    below that are of the model with the mark. Press h for the keys.

    A daemon that goes away is waited for. Clients are shown to admins alone. --json prints one document, as --once
    does; its clients' rates are null where they are not known. It needs a terminal with ANSI codes; on Windows, and
    where TERM is dumb, updates are printed one below the other.

    \b
    Examples:
      tnxctl top
      tnxctl top --host gpu-1 --sort p99
      tnxctl top --once --interval 5s
      tnxctl top --json | jq '.models[] | select(.grew) | {name, version, grew}'
    """
    from tnxctl.cli.top import loops, screen
    from tnxctl.cli.top.view import Choice
    from tnxctl.client import Client

    choice = Choice(sort=sort)
    with Client(endpoint, timeout=timeout) as client:
        if as_json or once or sys.stdout is None or not sys.stdout.isatty():
            loops.once(client, interval, choice, as_json)
        elif screen.usable():
            loops.live(client, interval, timeout, choice, has_colours=ctx.color is not False)
        else:
            loops.printing(client, interval, choice)
