"""Copies of the traffic for a version whose answers nobody sees, and how these differ from the answers that were sent.

What is copied is a batch: both versions run on the same rows, and their forwards can be compared. See
`tnxd.deployment.background` for when a copy runs.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.differences import DifferenceTally
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.wire import VERSION, Comparison, Percentiles
from tnxd.deployment.background import Answered, Background, Copy
from tnxd.deployment.version import Version
from tnxd.executors.execution import Execution
from tnxd.models.model import Model

# Forwards that the percentiles are taken from.
_LATENCIES = 1000


class Shadows:
    """Findings about pairs of versions. Args: background: where the copies run."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def offer(self, execution: Execution, version: Version) -> None:
        """Copy an answered batch, if there is room."""
        assert version.model is not None
        answered = Answered(
            execution.model,
            execution.items,
            execution.rows,
            execution.group,
            execution.outcomes,
            len(execution.items),
            execution.latency_us,
        )
        self._background.offer(answered, version, self._tally(execution.model, version.model))

    def keep(self, keys: set[str]) -> None:
        """Drop what was found about models other than these."""
        for pair in [pair for pair in self._tallies if not keys.issuperset(pair)]:
            del self._tallies[pair]

    def report(self, id_: int, baseline: Model, candidate: Model) -> Comparison:
        """Report the findings so far. Raises FailedPrecondition: there are none."""
        tally = self._tallies.get((baseline.key, candidate.key))
        if tally is None:
            raise FailedPrecondition(
                f"nothing to compare: version {candidate.version} of {baseline.name!r} has had no copies of the "
                f"requests of version {baseline.version}; tnxctl models route {baseline.name} "
                f"{baseline.version}=1 --shadow {candidate.version}"
            )
        return tally.report(id_)

    def _tally(self, baseline: Model, candidate: Model) -> _Tally:
        key = (baseline.key, candidate.key)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _Tally(baseline, candidate)
        return tally


def _joined(outputs: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(map(np.concatenate, zip(*outputs, strict=True)))


class _Tally:
    """Findings about one pair of versions.

    `skipped` is the loop's; the rest is written by the thread that compares, and read by the loop.
    """

    plain = False

    def __init__(self, baseline: Model, candidate: Model) -> None:
        self._baseline = baseline
        self._candidate = candidate
        self._requests = 0
        self._errors = 0
        self._last_error = ""
        self._differences = [DifferenceTally(spec) for spec in baseline.outputs]
        self._latencies: tuple[deque[float], deque[float]] = (deque(maxlen=_LATENCIES), deque(maxlen=_LATENCIES))
        self.skipped = 0

    def skip(self, requests: int) -> None:
        self.skipped += requests

    def compare(self, copy: Copy) -> None:
        original = copy.original
        ours: list[tuple[Array, ...]] = []
        theirs: list[tuple[Array, ...]] = []
        for answer, other in zip(original.outcomes, copy.outcomes, strict=False):
            if isinstance(answer, TensorNextError):
                continue
            self._requests += 1
            if isinstance(other, TensorNextError):
                self._errors += 1
                self._last_error = other.message
            else:
                ours.append(answer)
                theirs.append(other)
        if not ours:
            return
        if self._baseline.max_batch_size:
            # Mostly the shapes differ in axis 0 alone, and one look at all of them takes less of the GIL, which the
            # serving loop needs, than one look at each.
            with suppress(ValueError):
                ours, theirs = [_joined(ours)], [_joined(theirs)]
        for first, second in zip(ours, theirs, strict=True):
            for difference, baseline, candidate in zip(self._differences, first, second, strict=True):
                difference.add(baseline, candidate)
        if len(copy.items) == len(original.items):
            self._latencies[0].append(original.latency_us)
            self._latencies[1].append(copy.latency_us)

    def report(self, id_: int) -> Comparison:
        return Comparison(
            v=VERSION,
            id=id_,
            model=self._baseline.name,
            baseline=self._baseline.version,
            candidate=self._candidate.version,
            requests=self._requests,
            errors=self._errors,
            skipped=self.skipped,
            outputs=tuple(difference.report() for difference in self._differences),
            baseline_us=_percentiles(self._latencies[0]),
            candidate_us=_percentiles(self._latencies[1]),
            last_error=self._last_error,
        )


def _percentiles(latencies: deque[float]) -> Percentiles:
    values = list(latencies)
    p50, p90, p99 = np.percentile(values, (50, 90, 99)) if values else (0.0, 0.0, 0.0)
    return Percentiles(count=len(values), p50_us=float(p50), p90_us=float(p90), p99_us=float(p99))
