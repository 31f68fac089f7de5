"""Parts that clients of an overload share, whatever they speak: a load, a record of it, and how they are told.

Such a client is a program of its own. Its first line on stdin says what all its loads have in common. Then there are
three lines for each load, and a line from it after the first and the last: a `Load`, for which it gets ready; when that
is to begin, in nanoseconds of the monotonic clock, which all processes of a machine share; and a path. When the load is
over it goes on reading, so that nothing waits for it, until the path is there. Then it waits for the answers that are
missing, writes what became of the requests to that path (see `outcomes`), and says how many connections the server
ended. The program ends with stdin.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadgen import fine_sleep, no_collector
from outcomes import Outcomes
from rounds import offsets_ns

STDIN = 0

TICK_NS = 100_000
"""Requests that are due within this time may leave together: a client that wakes up for each costs the server a core
where both share few."""

CHECKED_EVERY = 256
"""Answers of which one is compared with what it should be: to compare all would take longer than the load."""


class Load(msgspec.Struct, frozen=True):
    """One load: requests at random times, as of independent users, at this rate for so long."""

    rate: float
    seconds: float
    seed: int

    def offsets_ns(self) -> list[int]:
        """When each request is due, from the start."""
        # Some more than are due on average, since how many there are is a matter of chance, too.
        found = offsets_ns(self.rate, 1.2 * self.seconds + 10 / self.rate, "exponential", self.seed)
        return found[: bisect_left(found, int(self.seconds * 1e9))]


@dataclass
class Record:
    """A record of what a client did so far. Both for as many of the first requests as it came to; see `Outcomes`.

    Attributes:
        cut: connections that the server ended while something was to be sent or to come.
    """

    tried: list[int] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    cut: int = 0


class Client(Protocol):
    """A client for one load, with connections of its own."""

    record: Record

    def send(self, due: Sequence[int], end: int, urgent: Sequence[bool]) -> None:
        """Send each request when it is due, or as soon after as there is room, and read what comes.

        Args:
            end: when it is over. What could not be sent by then is not sent any more.
        """

    def listen(self, stop: int) -> None:
        """Read what comes until this descriptor has something to read, too."""

    def finish(self, outcomes: Outcomes) -> None:
        """Wait for the answers that are missing, but not for ever, and put all in their places."""

    def close(self) -> None:
        """Close the connections."""


def obey(connect: Callable[[], Client], stdin: int, urgent_share: float = 0.0) -> None:
    """Carry out what the lines say, up to the last.

    Args:
        connect: makes the client of the next load. stdin: a descriptor, which nothing has been read from ahead.
        urgent_share: of the requests.
    """
    with os.fdopen(stdin, "rb", buffering=0, closefd=False) as lines:  # a buffer would hide from `select` what it holds
        while line := lines.readline():
            load = msgspec.json.decode(line, type=Load)
            offsets = load.offsets_ns()
            urgent: NDArray[np.bool_] = np.random.default_rng(load.seed).random(len(offsets)) < urgent_share
            choice = urgent.tolist()
            client = connect()
            print("set", flush=True)
            start = int(lines.readline() or 0)
            due = [start + offset for offset in offsets]
            with no_collector(), fine_sleep():
                client.send(due, start + int(load.seconds * 1e9), choice)
                client.listen(stdin)
            path = lines.readline().decode().strip()
            if not path:
                return
            outcomes = Outcomes.of(due, client.record.tried, client.record.sent, urgent)
            client.finish(outcomes)
            client.close()
            outcomes.save(Path(path))
            print(client.record.cut, flush=True)


def first_line(stdin: int) -> bytes:
    """The line that says what all loads have in common, and nothing more."""
    with os.fdopen(stdin, "rb", buffering=0, closefd=False) as lines:
        return lines.readline()
