"""The outcome of a run of requests, in numbers."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from tnxctl.cli.exits import Exit, of_run
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.cli.workload import Answer
    from tnxctl.results import Result

STAGES = ("receive", "queue", "gather", "h2d", "compute", "d2h", "reply", "total")
"""The fields of `wire.Timing` without their unit, in order."""

STEP_TIMES = ("start", "queue", "gather", "h2d", "compute", "d2h")
"""The times of `wire.StepTiming` without their unit, in order."""

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


KEPT = 20
"""Up to so many requests are looked at one by one: listed, and kept with their tensors."""


class Tally:
    """Counts and times of one run. Of a long one it keeps 16 bytes per answer, and none of their tensors.

    Attributes:
        planned, concurrency: requests to send, and how many of them may be outstanding at a time.
        elapsed_s: how long the run took. interrupt: the exit code if the user ended it, else None.
        sent: requests that went out.
        devices: how many requests ran on which device. reasons: why there, as the last answer from it says.
        error_counts: how many requests failed with which code. errors: the last error of each code.
        versions: how many requests which version of which model answered.
        answers: all of them, of a run of at most KEPT requests.
    """

    def __init__(self, planned: int, concurrency: int) -> None:
        self.planned = planned
        self.concurrency = concurrency
        self.elapsed_s = 0.0
        self.interrupt: Exit | None = None
        self.sent = 0
        self.devices: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.error_counts: Counter[str] = Counter()
        self.errors: dict[str, TensorNextError] = {}
        self.versions: Counter[tuple[str, str]] = Counter()
        self.answers: list[Answer] = []
        self._round_trips_ms: array[float] = array("d")
        self._prediction_errors_us: array[float] = array("d")
        self._predicted_sum_us = self._actual_sum_us = 0.0
        self._stage_sums_us = dict.fromkeys(STAGES, 0.0)
        self._rows = 0
        self._step_sums: dict[tuple[str, str], list[float]] = {}

    def add(self, answer: Answer) -> None:
        if self.planned <= KEPT:
            self.answers.append(answer)
        if isinstance(answer.outcome, TensorNextError):
            self.error_counts[answer.outcome.code] += 1
            self.errors[answer.outcome.code] = answer.outcome
        else:
            self._round_trips_ms.append(answer.round_trip_ms)
            self._add_result(answer.outcome)

    def _add_result(self, result: Result) -> None:
        self.versions[result.model, result.version] += 1
        self.devices[result.device] += 1
        self.reasons[result.device] = result.reason
        self._rows += result.batch_size
        for stage in STAGES:
            self._stage_sums_us[stage] += getattr(result.timing, f"{stage}_us")
        for step in result.steps:
            key = step.name, f"{step.model}@{step.version}"
            values = (1.0, step.batch_size, *(getattr(step, f"{time}_us") for time in STEP_TIMES))
            sums = self._step_sums.get(key, [0.0] * len(values))
            self._step_sums[key] = [total + value for total, value in zip(sums, values, strict=True)]
        if result.predicted_us > 0:
            self._prediction_errors_us.append(abs(result.actual_us - result.predicted_us))
            self._predicted_sum_us += result.predicted_us
            self._actual_sum_us += result.actual_us

    @property
    def answered(self) -> int:
        """Requests that got a result."""
        return len(self._round_trips_ms)

    @property
    def failed(self) -> int:
        """Requests that got an error."""
        return self.error_counts.total()

    @property
    def unknown(self) -> int:
        """Requests that were under way when the run ended: the daemon may have computed them or not."""
        return max(0, self.sent - self.answered - self.failed)

    @property
    def rate(self) -> float:
        """Results per second."""
        return self.answered / self.elapsed_s if self.elapsed_s else 0.0

    def percentiles_ms(self) -> dict[str, float]:
        """Percentiles of the round trips. Empty without a result."""
        return _percentiles(self._round_trips_ms)

    def prediction_errors_us(self) -> dict[str, float]:
        """Percentiles of how far the daemon's predictions were off, either way. Empty if it made none."""
        return _percentiles(self._prediction_errors_us)

    def prediction_means_us(self) -> tuple[float, float]:
        """Mean of the times predicted, and of the times that these requests took. Only if there is a prediction."""
        count = len(self._prediction_errors_us)
        return self._predicted_sum_us / count, self._actual_sum_us / count

    def stage_means_us(self) -> dict[str, float]:
        """Mean time in each stage of the daemon, and in all of them together. Empty without a result."""
        return {stage: time / self.answered for stage, time in self._stage_sums_us.items()} if self.answered else {}

    def step_means(self) -> list[tuple[str, str, float, dict[str, float]]]:
        """For each step of a pipeline and version that ran: name, NAME@VERSION, mean rows of its batches, mean times.

        The times are in microseconds. Empty without a pipeline.
        """
        return [
            (name, title, rows / count, {time: total / count for time, total in zip(STEP_TIMES, sums, strict=True)})
            for (name, title), (count, rows, *sums) in self._step_sums.items()
        ]

    def batch_mean(self) -> float:
        """Mean number of rows in the batches that the requests rode in; 0 without a result."""
        return self._rows / self.answered if self.answered else 0.0

    def exit_code(self) -> Exit:
        return of_run(self.answered, self.errors.values()) if self.interrupt is None else self.interrupt


def _percentiles(values: array[float]) -> dict[str, float]:
    """Percentiles by nearest rank: each of them happened."""
    ranked = sorted(values)
    if not ranked:
        return {}
    return {name: ranked[math.ceil(percent * len(ranked) / 100) - 1] for name, percent in PERCENTILES.items()}
