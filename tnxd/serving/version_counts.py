"""Counts of versions: what became of their requests, and how long each stage took.

A request appends five numbers to a list and a batch six. What has gathered becomes histograms piece by piece, many
values at a time: to count each by itself would take ten times as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tnxctl.protocol.errors import DeadlineExceeded
from tnxctl.protocol.statistics import STAGES, SlowRequest, VersionStats
from tnxctl.protocol.wire import Timing
from tnxd.executors.execution import Execution
from tnxd.scheduling.request import NEVER
from tnxd.serving.histogram_counts import HistogramCounts
from tnxd.serving.pending import Answer, Pending, StepRequest
from tnxd.serving.slowest import Slowest

# What each request tells: these four stages, and its prediction. What each batch tells: how many requests of it had
# results, these four stages, and its rows, negative if it is none of this version's own.
_OF_REQUESTS = ("receive", "queue", "reply", "total")
_OF_BATCHES = ("gather", "h2d", "compute", "d2h")
_REQUEST_NUMBERS = len(_OF_REQUESTS) + 1
_BATCH_NUMBERS = len(_OF_BATCHES) + 2

# Requests, or batches, whose numbers are put into histograms at a time: 50 microseconds.
_PIECE = 256

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
        rows, batches, steals, splits, deadlines_met, results_late: see `VersionStats`.
        slowest: of its requests.
    """

    __slots__ = (
        "_batch_numbers",
        "_batches",
        "_errors",
        "_recent",
        "_request_numbers",
        "_requests",
        "_rows",
        "abandoned",
        "batches",
        "deadlines_met",
        "errors",
        "refused",
        "replies",
        "requests",
        "results_late",
        "rows",
        "slowest",
        "splits",
        "steals",
    )

    def __init__(self, recent: RecentError) -> None:
        self.requests = self.refused = self.replies = self.abandoned = 0
        self.errors: Counter[str] = Counter()
        self.rows = self.batches = self.steals = self.splits = 0
        self.deadlines_met = self.results_late = 0
        self.slowest = Slowest()
        self._recent = recent
        self._request_numbers: list[float] = []
        self._batch_numbers: list[float] = []
        # Made with the first piece: most versions of a large repository are never asked.
        self._requests: HistogramCounts | None = None
        self._errors: HistogramCounts | None = None
        self._batches: HistogramCounts | None = None
        self._rows: HistogramCounts | None = None

    # --- what happens ------------------------------------------------------------------------------------------

    def refuse(self, code: str) -> None:
        """Count a request that was not taken in."""
        self.refused += 1
        self.errors[code] += 1

    def add_results(self, answers: Sequence[Answer]) -> None:
        """Count results that went out. What they share with the rest of their batch is for `add_batch`."""
        numbers, worst_us, worst = self._request_numbers, self.slowest.floor_us, None
        for answer in answers:
            request, timing = answer[0], answer[1].timing
            total_us = timing.total_us
            numbers += (timing.receive_us, timing.queue_us, timing.reply_us, total_us, request.predicted_us)
            if request.deadline_ns != NEVER:
                self._hold_against_deadline(request, total_us)
            if total_us > worst_us:
                worst_us, worst = total_us, answer
        if worst is not None:  # it stands for all that were answered with it: what made it slow made them so
            request, result, _, _ = worst
            self._keep(request, result.timing, result.device, result.reason, result.batch_size)
        self.replies += len(answers)
        if len(numbers) >= _PIECE * _REQUEST_NUMBERS:
            self.fold()

    def add_step(self, request: StepRequest, execution: Execution, batch_rows: int) -> None:
        """Count the result of a step of a pipeline."""
        queue_us = (execution.started_ns - request.queued_ns) / 1e3
        total_us = (execution.finished_ns - request.queued_ns) / 1e3
        self.replies += 1
        self._request_numbers += (0.0, queue_us, 0.0, total_us, request.predicted_us)
        if request.deadline_ns != NEVER:
            self._hold_against_deadline(request, total_us)
        if total_us > self.slowest.floor_us:
            stages = (execution.gather_us, execution.h2d_us, execution.compute_us, execution.d2h_us)
            timing = Timing(0.0, queue_us, *stages, 0.0, total_us)
            self._keep(request, timing, request.device, request.reason, batch_rows)

    def add_batch(self, execution: Execution, rows: int, results: int) -> None:
        """Count a batch. Args: rows: of the requests with results. results: sent to clients, or handed on."""
        self.batches += 1
        self.rows += rows
        self._batch_numbers += (
            results,
            execution.gather_us,
            execution.h2d_us,
            execution.compute_us,
            execution.d2h_us,
            rows,
        )
        if len(self._batch_numbers) >= _PIECE * _BATCH_NUMBERS:
            self.fold()

    def add_whole(self, timing: Timing, rows: int) -> None:
        """Count the stages of a pipeline, whose batches are those of its steps."""
        self.rows += rows
        self._batch_numbers += (1, timing.gather_us, timing.h2d_us, timing.compute_us, timing.d2h_us, -1)

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
        """Put the numbers that have gathered into histograms."""
        if self._request_numbers:
            self._fold_requests()
        if self._batch_numbers:
            self._fold_batches()

    def _fold_requests(self) -> None:
        if self._requests is None or self._errors is None:
            self._requests, self._errors = HistogramCounts(len(_OF_REQUESTS)), HistogramCounts(1)
        numbers = np.array(self._request_numbers).reshape(-1, _REQUEST_NUMBERS)
        self._request_numbers.clear()
        self._requests.add(numbers[:, :-1])
        receive_us, _, reply_us, total_us, predicted_us = numbers.T
        errors = abs(predicted_us - (total_us - receive_us - reply_us))[predicted_us > 0.0]
        if errors.size:
            self._errors.add(errors[:, None])
            self._recent.observe(float(errors.mean()), errors.size)

    def _fold_batches(self) -> None:
        if self._batches is None or self._rows is None:
            self._batches, self._rows = HistogramCounts(len(_OF_BATCHES)), HistogramCounts(1)
        numbers = np.array(self._batch_numbers, np.float64).reshape(-1, _BATCH_NUMBERS)
        self._batch_numbers.clear()
        self._batches.add(numbers[:, 1:-1], numbers[:, 0])
        rows = numbers[:, -1:]
        self._rows.add(rows[rows[:, 0] >= 0.0])

    def report(
        self, name: str, version: str, evictions: int, queued_rows: int, predicted_wait_us: float
    ) -> VersionStats:
        """All counts, as they are told."""
        self.fold()
        stages = {}
        for names, counts in ((_OF_REQUESTS, self._requests), (_OF_BATCHES, self._batches)):
            if counts is not None:
                stages.update({stage: counts.histogram(place) for place, stage in enumerate(names)})
        known = {} if self._rows is None else {"batch_rows": self._rows.histogram(0)}
        if self._errors is not None:
            known["prediction_error"] = self._errors.histogram(0)
        return VersionStats(
            name=name,
            version=version,
            requests=self.requests + self.refused,
            replies=self.replies,
            errors=dict(self.errors),
            abandoned=self.abandoned,
            rows=self.rows,
            batches=self.batches,
            stages={stage: stages[stage] for stage in STAGES if stage in stages},
            deadlines_met=self.deadlines_met,
            deadlines_missed=self.results_late + self.errors[DeadlineExceeded.code],
            steals=self.steals,
            splits=self.splits,
            evictions=evictions,
            queued_rows=queued_rows,
            predicted_wait_us=predicted_wait_us,
            **known,
        )
