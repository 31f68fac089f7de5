"""Counts of versions: what became of their requests, and how long each stage took.

What a request tells is put aside as plain numbers, in one place that is used again and again: objects that outlive
their request cost the loop more by the memory that they touch than by what is done to them. What has gathered becomes
histograms piece by piece, many values at a time: to count each by itself would take several times as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from struct import Struct

import numpy as np
from msgspec.structs import astuple

from tnxctl.protocol.errors import DeadlineExceeded
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.statistics import STAGES, SlowRequest, VersionStats
from tnxctl.protocol.wire import Timing
from tnxd.executors.execution import Execution
from tnxd.scheduling.request import NEVER
from tnxd.serving.histogram_counts import HistogramCounts, as_array
from tnxd.serving.pending import Answer, Pending, StepRequest
from tnxd.serving.slowest import Slowest

_HISTOGRAMS = (*STAGES, "prediction_error")
_RECEIVE, _REPLY, _TOTAL = [STAGES.index(stage) for stage in ("receive", "reply", "total")]
_PREDICTED = len(STAGES)

# Line of numbers of a request: the microseconds of all stages, and the predicted ones.
_LINE = Struct(f"{len(_HISTOGRAMS)}d")
_LINE_BYTES, _write_line = _LINE.size, _LINE.pack_into

MOST_AT_A_TIME = 256
"""Requests whose times become histograms at a time: some 40 microseconds, once in so many requests. Fewer at a time
cost more for each, and show in the 99th percentile; more make a longer pause, and take more memory for each version."""

_ERROR_WEIGHT = 0.05


class RecentError:
    """Moving average of the distance between predicted and actual time, of the last requests. Attributes: mean_us."""

    def __init__(self) -> None:
        self.mean_us = 0.0

    def observe(self, mean_us: float, requests: int) -> None:
        """Take in so many requests at once."""
        self.mean_us += (1.0 - (1.0 - _ERROR_WEIGHT) ** requests) * (mean_us - self.mean_us)


class VersionCounts:
    """Counts of one version since the start.

    Args:
        recent: shared by all versions.

    Attributes:
        requests: taken in. refused: those that were not. replies: results sent. errors: sent, by code, refusals too.
        abandoned: taken in and never answered: nobody waited any more.
        rows_of_wholes: of requests to a pipeline, which has no batches.
        steals, splits, deadlines_met: see `VersionStats`. results_late: that went out after their deadline.
        slowest: of its requests.
    """

    __slots__ = (
        "_lines",
        "_lines_end",
        "_recent",
        "_rows",
        "_rows_of_batches",
        "_times",
        "_told",
        "abandoned",
        "deadlines_met",
        "errors",
        "refused",
        "replies",
        "requests",
        "results_late",
        "rows_of_wholes",
        "slowest",
        "splits",
        "steals",
    )

    def __init__(self, recent: RecentError) -> None:
        self.requests = self.refused = self.replies = self.abandoned = 0
        self.errors: Counter[str] = Counter()
        self.rows_of_wholes = self.steals = self.splits = 0
        self.deadlines_met = self.results_late = 0
        self.slowest = Slowest()
        self._recent = recent
        self._rows_of_batches: list[int] = []
        self._lines = bytearray()
        self._lines_end = 0
        # Made with the first piece: most versions of a large repository are never asked.
        self._times: HistogramCounts | None = None
        self._rows: HistogramCounts | None = None
        self._told: dict[str, Histogram] = {}

    # --- what happens ------------------------------------------------------------------------------------------

    def refuse(self, code: str) -> None:
        """Count a request that was not taken in."""
        self.refused += 1
        self.errors[code] += 1

    def add_results(self, answers: Sequence[Answer]) -> None:
        """Count results that went out, of one batch. Args: answers: no more than `MOST_AT_A_TIME`."""
        lines, at = self._room(len(answers))
        worst_us, worst = self.slowest.floor_us, None
        for answer in answers:
            request, timing = answer[0], answer[1].timing
            _write_line(lines, at, *astuple(timing), request.predicted_us)
            at += _LINE_BYTES
            if request.deadline_ns != NEVER:
                self._hold_against_deadline(request, timing.total_us)
            if timing.total_us > worst_us:
                worst_us, worst = timing.total_us, answer
        self._lines_end = at
        if worst is not None:  # it stands for all that were answered with it: what made it slow made them so
            request, result, _, _ = worst
            self._keep(request, result.timing, result.device, result.reason, result.batch_size)
        self.replies += len(answers)

    def add_batch(self, rows: int) -> None:
        """Count a batch. Args: rows: of its requests with results."""
        self._rows_of_batches.append(rows)
        if len(self._rows_of_batches) >= MOST_AT_A_TIME:  # as where nobody may be sent what it gave
            self.fold()

    def add_step(self, request: StepRequest, execution: Execution, batch_rows: int) -> None:
        """Count the result of a step of a pipeline."""
        queue_us = (execution.started_ns - request.queued_ns) / 1e3
        total_us = (execution.finished_ns - request.queued_ns) / 1e3
        stages = (execution.gather_us, execution.h2d_us, execution.compute_us, execution.d2h_us)
        timing = Timing(0.0, queue_us, *stages, 0.0, total_us)
        lines, at = self._room(1)
        _write_line(lines, at, *astuple(timing), request.predicted_us)
        self._lines_end = at + _LINE_BYTES
        if request.deadline_ns != NEVER:
            self._hold_against_deadline(request, total_us)
        if total_us > self.slowest.floor_us:
            self._keep(request, timing, request.device, request.reason, batch_rows)
        self.replies += 1

    def _room(self, requests: int) -> tuple[bytearray, int]:
        """Room for the lines of so many requests, and where it begins."""
        if not self._lines:
            self._lines = bytearray(MOST_AT_A_TIME * _LINE_BYTES)
        elif self._lines_end + requests * _LINE_BYTES > len(self._lines):
            self.fold()
        return self._lines, self._lines_end

    def _hold_against_deadline(self, request: Pending, total_us: float) -> None:
        if request.received_ns + total_us * 1e3 <= request.deadline_ns:
            self.deadlines_met += 1
        else:
            self.results_late += 1

    def _keep(self, request: Pending, timing: Timing, device: str, reason: str, batch_size: int) -> None:
        deadline_us = None if request.deadline_ns == NEVER else (request.deadline_ns - request.came_ns) / 1e3
        model = request.served
        slow = SlowRequest(
            id=request.id,
            model=model.name,
            version=model.version,
            device=device,
            reason=reason,
            batch_size=batch_size,
            predicted_us=request.predicted_us,
            timing=timing,
            rows=request.rows,
            priority=request.priority,
            deadline_us=deadline_us,
            attempt=request.attempt,
        )
        self.slowest.add(slow, request.connection.client.name)

    # --- histograms --------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Put what has gathered into histograms."""
        if self._lines_end:
            if self._times is None:
                self._times = HistogramCounts(len(_HISTOGRAMS))
            times = np.frombuffer(self._lines, count=self._lines_end // 8).reshape(-1, len(_HISTOGRAMS))
            receive_us, reply_us, total_us, predicted_us = times[:, [_RECEIVE, _REPLY, _TOTAL, _PREDICTED]].T
            errors_us = np.abs(predicted_us - (total_us - receive_us - reply_us))
            times[:, _PREDICTED] = errors_us
            self._times.add(times)
            self._recent.observe(float(errors_us.mean()), len(errors_us))
            self._lines_end = 0
            self._told = {}
        if self._rows_of_batches:
            if self._rows is None:
                self._rows = HistogramCounts(1)
            self._rows.add(as_array(self._rows_of_batches, 1))
            self._rows_of_batches.clear()
            self._told = {}

    def _histograms(self) -> dict[str, Histogram]:
        """All histograms, by name. They are kept: of many versions, few were asked since the last report."""
        self.fold()
        if not self._told:
            if self._times is not None:
                self._told.update({what: self._times.histogram(place) for place, what in enumerate(_HISTOGRAMS)})
            if self._rows is not None:
                self._told["batch_rows"] = self._rows.histogram(0)
        return self._told

    def report(
        self, name: str, version: str, evictions: int, queued_rows: int, predicted_wait_us: float
    ) -> VersionStats:
        """All counts, as they are told."""
        told = self._histograms()
        batch_rows = told.get("batch_rows", Histogram())
        return VersionStats(
            name=name,
            version=version,
            requests=self.requests + self.refused,
            replies=self.replies,
            errors=dict(self.errors),
            abandoned=self.abandoned,
            rows=int(batch_rows.sum) + self.rows_of_wholes,
            batches=batch_rows.count,
            batch_rows=batch_rows,
            stages={stage: told[stage] for stage in STAGES if stage in told},
            prediction_error=told.get("prediction_error", Histogram()),
            deadlines_met=self.deadlines_met,
            deadlines_missed=self.results_late + self.errors[DeadlineExceeded.code],
            steals=self.steals,
            splits=self.splits,
            evictions=evictions,
            queued_rows=queued_rows,
            predicted_wait_us=predicted_wait_us,
        )
