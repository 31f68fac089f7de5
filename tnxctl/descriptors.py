"""File descriptors that a library owns, and does not tell of: looked at while it may close them."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Socket object for a borrowed descriptor, which stays open: of one connection, whatever becomes of its number.

    Raises OSError: the descriptor is closed, or that of no socket.
    """
    second = os.dup(descriptor)
    try:
        found = socket.socket(fileno=second)
    except OSError:
        os.close(second)
        raise
    with found:
        yield found
