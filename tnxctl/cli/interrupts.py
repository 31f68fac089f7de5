"""SIGTERM for the tool: the same end as Ctrl-C, with an exit code of its own."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import click


class Terminated(KeyboardInterrupt):
    """The interrupt that SIGTERM raises: a KeyboardInterrupt, so that it ends things as Ctrl-C does."""


def heed_sigterm(ctx: click.Context) -> None:
    """Have SIGTERM raise Terminated until the context closes, where it would end the process at once."""
    in_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
