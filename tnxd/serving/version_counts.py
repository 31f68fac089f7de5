"""Counts of versions: what became of their requests, and how long each stage took.

A request appends five numbers to a list and a batch six. What has gathered becomes histograms piece by piece, many
values at a time: to count each by itself would take ten times as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tnxctl.protocol.errors import DeadlineExceeded
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.statistics import STAGES, SlowRequest, VersionStats
from tnxctl.protocol.wire import Timing
from tnxd.executors.execution import Execution
from tnxd.scheduling.request import NEVER
from tnxd.serving.histogram_counts import HistogramCounts, as_array
from tnxd.serving.pending import Answer, Pending, StepRequest
from tnxd.serving.slowest import Slowest

# What each request tells: four stages, and its prediction, of which the error is made. What each batch tells: four
# stages, its rows, and how many of its requests have results.
_OF_REQUESTS = ("receive", "queue", "reply", "total", "prediction_error")
_OF_BATCHES = ("gather", "h2d", "compute", "d2h", "batch_rows")
_REQUEST_NUMBERS = len(_OF_REQUESTS)
_BATCH_NUMBERS = len(_OF_BATCHES) + 1

# Requests, or batches, whose numbers become histograms at a time: some 30 microseconds.
_PIECE = 256

_NO_BATCH = -1.0

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
        "_batch_numbers",
        "_batches",
        "_recent",
        "_request_numbers",
        "_requests",
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
        self._request_numbers: list[float] = []
        self._batch_numbers: list[float] = []
        # Made with the first piece: most versions of a large repository are never asked.
        self._requests: HistogramCounts | None = None
        self._batches: HistogramCounts | None = None
        self._told: dict[str, Histogram] = {}

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
        stages = (execution.gather_us, execution.h2d_us, execution.compute_us, execution.d2h_us, rows, results)
        self._batch_numbers += stages
        if len(self._batch_numbers) >= _PIECE * _BATCH_NUMBERS:
            self.fold()

    def add_whole(self, timing: Timing, rows: int) -> None:
        """Count the stages of a pipeline, whose batches are those of its steps."""
        self.rows_of_wholes += rows
        self._batch_numbers += (timing.gather_us, timing.h2d_us, timing.compute_us, timing.d2h_us, _NO_BATCH, 1)

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
        self._told = {}

    def _fold_requests(self) -> None:
        if self._requests is None:
            self._requests = HistogramCounts(_REQUEST_NUMBERS)
        numbers = as_array(self._request_numbers, _REQUEST_NUMBERS).copy()
        self._request_numbers.clear()
        receive_us, _, reply_us, total_us, predicted_us = numbers.T
        errors_us = np.abs(predicted_us - (total_us - receive_us - reply_us))
        numbers[:, -1] = errors_us
        self._requests.add(numbers)
        self._recent.observe(float(errors_us.mean()), len(errors_us))

    def _fold_batches(self) -> None:
        if self._batches is None:
            self._batches = HistogramCounts(_BATCH_NUMBERS - 1)
        numbers = as_array(self._batch_numbers, _BATCH_NUMBERS)
        self._batch_numbers.clear()
        weights = np.empty((len(numbers), _BATCH_NUMBERS - 1))
        weights[:] = numbers[:, -1:]
        weights[:, -1] = numbers[:, -2] != _NO_BATCH
        self._batches.add(numbers[:, :-1], weights)

    def _histograms(self) -> dict[str, Histogram]:
        """All histograms, by name. They are kept: of many versions, few were asked since the last report."""
        if self._request_numbers or self._batch_numbers or not self._told:
            self.fold()
            for names, counts in ((_OF_REQUESTS, self._requests), (_OF_BATCHES, self._batches)):
                if counts is not None:
                    self._told.update({what: counts.histogram(place) for place, what in enumerate(names)})
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
