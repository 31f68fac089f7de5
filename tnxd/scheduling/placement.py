"""Placement: a model on one device, and its load on all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field

from tnxd.scheduling.costs import CostCurve
from tnxd.scheduling.forecast import Forecast
from tnxd.scheduling.request import LEVELS
from tnxd.scheduling.width import Width

# Batches that have to work at a ceiling before twice as many rows are tried. A try that fails costs about three of
# them: the forward that ran out of memory, and both halves.
_PROBE_AFTER = 256

# An out-of-memory beside other batches costs about two of them: the forward that failed, and the wait until it has the
# device alone. So among so many batches that worked it says nothing of how many rows fit.
_CROWDED_AFTER = 16


@dataclass(slots=True, eq=False)
class ModelLoad:
    """Load of one model, on all devices together.

    Attributes:
        queued, queued_bytes: requests that wait, and their inputs.
        running: requests in batches that run. hung: of these, those in batches that hang.
        max_lanes: lanes of a device that may run the model at a time; 0: all.
        held: by how many the model is needed that have no request of it here yet, see `LoadedModels.hold`.
        inline: whether batches of it may run on the caller's thread.
    """

    queued: int = 0
    queued_bytes: int = 0
    running: int = 0
    hung: int = 0
    max_lanes: int = 0
    held: int = 0
    inline: bool = True


@dataclass(slots=True, eq=False)
class Placement:
    """Placement of one model on one device.

    Attributes:
        load: of the model on all devices.
        width: what is known about narrow and wide batches of the model here; None: the device has no teams.
        forecast: corrects the predictions for the model here.
        lanes: those that run the model now, INLINE and BACKGROUND too, without those that hang.
        queued: requests that wait for the model here. backlog_us: their predicted cost, per priority.
        max_rows: most rows in one forward, since more ran out of memory; 0: as many as the model allows.
        worked: batches that worked at that ceiling.
        preparation: microseconds of batches until they are on a device whose lanes share a chip.
        crowded: batches that have to work until an out-of-memory beside others says nothing of the ceiling again.
        most_rows: bound of that ceiling as it rises; 0: what the model allows. On a CPU, memory that has run out is
            the end of the process: nothing may be tried.
    """

    load: ModelLoad
    width: Width | None = None
    forecast: Forecast = field(init=False, default_factory=Forecast)
    lanes: list[int] = field(init=False, default_factory=list)
    queued: int = field(init=False, default=0)
    backlog_us: list[float] = field(init=False, default_factory=lambda: [0.0] * LEVELS)
    max_rows: int = field(init=False, default=0)
    worked: int = field(init=False, default=0)
    preparation: CostCurve = field(init=False, default_factory=CostCurve)
    crowded: int = field(init=False, default=0)
    most_rows: int = field(init=False, default=0)

    @property
    def has_all_lanes(self) -> bool:
        """Whether the model runs on as many lanes as it may."""
        return 0 < self.load.max_lanes <= len(self.lanes)

    def row_limit(self, limit: int) -> int:
        """Most rows of a batch here, of a model that takes `limit`."""
        return self.max_rows if 0 < self.max_rows < limit else limit

    def bound_ceiling(self, rows: int) -> None:
        """Set the ceiling, for good: a forward of more rows must never be tried."""
        self.most_rows = self.max_rows = rows

    def lower_ceiling(self, rows: int) -> None:
        """Lower the ceiling: a forward ran out of memory, and one of so many rows worked."""
        rows = max(rows, 1)
        self.max_rows = min(self.max_rows, rows) if self.max_rows else rows
        self.worked = 0

    def note_crowded(self, rows: int) -> None:
        """Note that a batch of so many rows ran out of memory beside others. Where that is rare, it was their peak.

        Where it is not, two batches do not fit side by side: smaller ones do.
        """
        if self.crowded:
            self.lower_ceiling(rows // 2)
        self.crowded = _CROWDED_AFTER

    def count_worked(self, rows: int, max_rows: int, limit: int) -> None:
        """Count a batch that worked. In the end the ceiling doubles, since others may have left memory meanwhile.

        Down at once to what works, up by doubling: so TCP finds its window (slow start; Jacobson, 1988).

        Args:
            rows, max_rows: of the batch, and its ceiling when it was formed.
            limit: most rows that the model takes.
        """
        if max_rows != self.max_rows:
            return
        if 2 * rows <= self.max_rows:  # requests of several rows need not fill it
            return
        self.worked += 1
        if self.worked == _PROBE_AFTER:
            self.worked = 0
            self.max_rows = min(2 * self.max_rows, self.most_rows or 2 * self.max_rows)
            if self.max_rows >= limit:
                self.max_rows = 0
