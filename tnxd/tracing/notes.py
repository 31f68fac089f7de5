"""Notes about sampled requests that are over, on their way from the serving thread to the one that makes spans."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from tnxctl.protocol.timings import StepTiming

MOST_WAITING = 4096
"""Most notes that wait. What comes beyond is dropped and counted."""


class Stages(NamedTuple):
    """Stages of a batch. Times are of `time.perf_counter_ns`."""

    started_ns: int
    gather_us: float
    h2d_us: float
    compute_us: float
    d2h_us: float
    finished_ns: int


class Note(NamedTuple):
    """Outcome of one request.

    Attributes:
        traceparent: the span that it belongs to.
        attributes: of its span, by name.
        received_ns, ended_ns: when it was taken up, and when its answer was sent, of `time.perf_counter_ns`.
        queued_ns: when it was queued; 0: it never was.
        stages: of the batch that it ran in; None: it did not, or it is a pipeline.
        steps: those of a pipeline that were done.
        code, message: of its error; "": it succeeded.
    """

    traceparent: str
    attributes: dict[str, str | int | float]
    received_ns: int
    ended_ns: int
    queued_ns: int = 0
    stages: Stages | None = None
    steps: tuple[StepTiming, ...] = ()
    code: str = ""
    message: str = ""


class Notes:
    """Bounded queue of notes. One thread puts them, another takes them.

    Attributes:
        noted: number of notes that came. dropped: of those that found no room.
        lost: of those that were taken, and not sent after all; counted by who takes them.
    """

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._most = most
        self._waiting: deque[Note] = deque()
        self.noted = 0
        self.dropped = 0
        self.lost = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, note: Note) -> None:
        """Queue a note, or count it as dropped."""
        self.noted += 1
        if len(self._waiting) < self._most:
            self._waiting.append(note)
        else:
            self.dropped += 1

    def take(self, most: int) -> list[Note]:
        """The notes that have waited longest, so many at most."""
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
