"""A model on one device, and on all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tnxd.scheduling.forecast import Forecast
from tnxd.scheduling.request import LEVELS

if TYPE_CHECKING:
    from tnxd.scheduling.device import Batch

# Batches that have to work at a ceiling before twice as many rows are tried. A try that fails costs about three of
# them: the forward that ran out of memory, and both halves.
_PROBE_AFTER = 256


@dataclass(slots=True, eq=False)
class ModelLoad:
    """The work that one model has, on all devices together.

    Attributes:
        queued, queued_bytes: requests that wait, and their inputs. running: in batches that run. hung: of these, in
            batches that were given up.
        max_lanes: lanes of a device that may run it at a time; 0: all.
    """

    queued: int = 0
    queued_bytes: int = 0
    running: int = 0
    hung: int = 0
    max_lanes: int = 0


@dataclass(slots=True, eq=False)
class Placement:
    """One model on one device.

    Attributes:
        load: of the model everywhere. forecast: what its predictions here are corrected by.
        lanes: those that run it now, INLINE and BACKGROUND too, but for those that hang.
        queued: requests that wait for it here. backlog_us: their predicted cost, per priority.
        max_rows: most rows in one forward, since more ran out of memory; 0: as many as the model allows.
        worked: batches that worked at that ceiling.
        most_rows: where that ceiling ends to rise; 0: at what the model allows. On a CPU, memory that has run out is
            the end of the process: nothing may be tried.
    """

    load: ModelLoad
    forecast: Forecast = field(init=False, default_factory=Forecast)
    lanes: list[int] = field(init=False, default_factory=list)
    queued: int = field(init=False, default=0)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    max_rows: int = field(init=False, default=0)
    worked: int = field(init=False, default=0)
    most_rows: int = field(init=False, default=0)

    @property
    def has_all_lanes(self) -> bool:
        """Whether it runs on as many lanes as it may."""
        return 0 < self.load.max_lanes <= len(self.lanes)

    def row_limit(self, limit: int) -> int:
        """Most rows of a batch, of a model that takes so many."""
        return self.max_rows if 0 < self.max_rows < limit else limit

    def bound(self, rows: int) -> None:
        """A forward of more rows than these must never be tried."""
        self.most_rows = self.max_rows = rows

    def lower(self, rows: int) -> None:
        """A forward ran out of memory, and one of so many rows worked."""
        rows = max(rows, 1)
        self.max_rows = min(self.max_rows, rows) if self.max_rows else rows
        self.worked = 0

    def count(self, batch: Batch) -> None:
        """A batch worked: in the end, the ceiling doubles, since others may have left memory meanwhile.

        Down at once to what works, up by doubling: so TCP finds its window (slow start; Jacobson, 1988).
        """
        if batch.max_rows != self.max_rows or not batch.requests:
            return
        if 2 * batch.rows <= self.max_rows:  # requests of several rows need not fill it
            return
        self.worked += 1
        if self.worked == _PROBE_AFTER:
            self.worked = 0
            self.max_rows = min(2 * self.max_rows, self.most_rows or 2 * self.max_rows)
            if self.max_rows >= batch.requests[0].max_batch_size:
                self.max_rows = 0
