"""Three ways to look at a daemon: once, on a screen until somebody has enough, or printed again and again."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from tnxctl.cli import intervals, output, text
from tnxctl.cli.top import view
from tnxctl.cli.top.history import History, Look
from tnxctl.cli.top.view import Choice, Surroundings
from tnxctl.protocol.errors import DeadlineExceeded, Unavailable
from tnxctl.protocol.statistics import StatsReport

if TYPE_CHECKING:
    from tnxctl.cli.top.watching import Watcher
    from tnxctl.client import Client

_AWAY = (Unavailable, DeadlineExceeded)  # a daemon may come back from these
_REDRAWN_S = 1.0
_SORT_KEYS = {"r": "rate", "p": "p99", "w": "queue", "e": "errors", "g": "grew", "n": "name"}


def once(client: Client, interval_s: float, choice: Choice, as_json: bool) -> None:
    """Print one look at an interval, held against all before it."""
    history = History()
    history.add(client.stats())
    time.sleep(interval_s)
    history.add(client.stats())
    look = history.look(since_start=True)
    assert look is not None
    if as_json:
        output.write_json({"endpoint": client.endpoint, **intervals.document(look.now, look.before)})
    else:
        click.echo("\n".join(view.frame(look, choice, Surroundings(client.endpoint, _clock(), width=_width()))))


def printing(client: Client, interval_s: float, choice: Choice) -> None:
    """Print looks one below the other until Ctrl-C: for terminals that cannot do more."""
    history = History()
    while True:
        away = ""
        try:
            history.add(client.stats())
        except _AWAY as error:
            away = f"not reachable: {text.reason(client.endpoint, error.message)}"
        around = Surroundings(client.endpoint, _clock(), away, _width())
        click.echo("\n".join([*view.frame(history.look(choice.since_start), choice, around), ""]))
        time.sleep(interval_s)


def live(client: Client, interval_s: float, timeout_s: float, choice: Choice, has_colours: bool) -> None:
    """Draw looks on the screen until somebody has enough.

    Raises:
        TensorNextError: what the daemon answers first is an error that will not go away.
    """
    from tnxctl.cli.top.screen import Screen
    from tnxctl.cli.top.watching import Watcher

    with ExitStack() as stack:
        screen = stack.enter_context(Screen())
        watcher = stack.enter_context(Watcher(client, interval_s, timeout_s, screen.wake))
        state = _State(choice)
        while True:
            state.hear(watcher, client.endpoint)
            width, height = screen.size
            lines = state.lines(client.endpoint, width, height)
            screen.draw(lines if has_colours else [click.unstyle(line) for line in lines])
            for key in screen.wait(_REDRAWN_S):
                if key == "q":
                    return
                state.press(key)


class _State:
    """State of the screen between two drawings."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._history = History()
        self._heard_at = time.time()  # of the last report
        self._away = ""
        self._is_known = False
        self._look: Look | None = None

    def hear(self, watcher: Watcher, endpoint: str) -> None:
        """Take what came from the daemon since the last time."""
        while (outcome := watcher.take()) is not None:
            if isinstance(outcome, StatsReport):
                self._history.add(outcome)
                self._heard_at = time.time()
                self._away = ""
                self._is_known = True
            elif self._is_known or isinstance(outcome, _AWAY):
                why = text.reason(endpoint, outcome.message)
                self._away = f"not reachable since {_clock(self._heard_at)}: {why}"
            else:
                raise outcome

    def lines(self, endpoint: str, width: int, height: int) -> list[str]:
        """The picture of now, or of when it was paused."""
        if not self._choice.paused or self._look is None:
            self._look = self._history.look(self._choice.since_start)
        around = Surroundings(endpoint, _clock(), self._away, width, height)
        return view.frame(self._look, self._choice, around)

    def press(self, key: str) -> None:
        """Do what a key is for."""
        choice = self._choice
        if key in ("h", "?"):
            choice.help = not choice.help
        elif key == " ":
            choice.paused = not choice.paused
        elif key == "s":
            sorts = [*view.SORTS]
            choice.sort = sorts[(sorts.index(choice.sort) + 1) % len(sorts)]
        elif key in _SORT_KEYS:
            choice.sort = _SORT_KEYS[key]
        elif key == "b":
            choice.since_start = not choice.since_start
        elif key == "c":
            choice.clients = not choice.clients
        elif key == "escape":
            choice.help = False
            choice.chosen = ""
        elif key in ("up", "down", "k", "j") and self._look is not None:
            choice.chosen = _neighbour(
                view.rows(self._look, choice.sort), choice.chosen, -1 if key in ("up", "k") else 1
            )


def _neighbour(table: Sequence[view.Row], chosen: str, step: int) -> str:
    """The title of the version above or below the one that is shown."""
    shown = view.shown_of(table, chosen)
    if shown is None:
        return ""
    at = min(max(table.index(shown) + step, 0), len(table) - 1)
    return table[at].version.title


def _clock(at: float | None = None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _width() -> int:
    return text.terminal_width(sys.stdout) or view.WIDEST
