"""Progress line on the terminal while the daemon works: the work, and the time that it has taken so far."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

import click

from tnxctl.cli import text
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.client import Client
    from tnxctl.protocol.wire import ModelInfo

_PERIOD_S = 0.5
_BUSY = ("starting", "draining")
_CLEAR = "\r\x1b[K"


@contextmanager
def shown(client: Client, what: str, about: str = "") -> Iterator[None]:
    """Show progress on standard error, if that is a terminal, while the block waits for the daemon.

    Args:
        client: asked for the states of models meanwhile.
        what: the work: "loading resnet@2".
        about: NAME or NAME@VERSION of the model that it is about; "": any.
    """
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_draw, args=(client, what, about, stream, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_PERIOD_S)  # it may wait for an answer: the line is cleared once more in any case
        _write(stream, _CLEAR)


def _draw(client: Client, what: str, about: str, stream: IO[str], over: threading.Event) -> None:
    started = time.monotonic()
    while not over.wait(_PERIOD_S):
        states = _states(client.models, about)
        if over.is_set():
            return
        line = f"{what}: {states}{text.duration(time.monotonic() - started)}"
        width = text.terminal_width(stream) or 80
        _write(stream, _CLEAR + text.shorten(text.clean(line), width - 1))


def _states(models: Callable[..., Sequence[ModelInfo]], about: str) -> str:
    """The daemon's words about the versions that it works at; nothing if it does not answer."""
    try:
        infos = models(timeout=1.0)
    except TensorNextError:
        return ""
    busy = [
        f"{text.title(info)} {info.status}"
        for info in infos
        if info.status in _BUSY and about in ("", info.name, text.title(info))
    ]
    return f"{', '.join(busy)}, " if busy else ""


def _write(stream: IO[str], line: str) -> None:
    with suppress(OSError, ValueError):  # the terminal is gone: nobody looks
        click.echo(line, stream, nl=False)
