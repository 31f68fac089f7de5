"""Copies of the traffic for a version whose answers nobody sees, and how these differ from the answers that were sent.

What is copied is a batch: both versions run on the same rows, and their forwards can be compared. A copy runs beside
the lanes, on a thread that the operating system lets run last, and begins only while a lane is free and nothing waits;
what finds no such moment is dropped and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from tnxctl.errors import FailedPrecondition, TensorNextError
from tnxctl.frames import Array
from tnxctl.wire import VERSION, Comparison, OutputDifference, Percentiles, TensorSpec
from tnxd.executors.execution import Execution
from tnxd.models.model import Model
from tnxd.registry import READY, Version
from tnxd.scheduler import Scheduler
from tnxd.work import Batch

log = logging.getLogger(__name__)

# What may wait to be computed, and as much again to be compared. Bytes are those of the requests and their answers.
_MAX_WAITING = 64
_MAX_WAITING_BYTES = 64 * 1024 * 1024

# Forwards that the percentiles are taken from.
_LATENCIES = 1000


class Copy(Execution):
    """A batch that has been answered, on its way through another version.

    Attributes:
        original: the batch. nbytes: of its inputs and outputs.
    """

    __slots__ = ("nbytes", "original")

    def __init__(self, batch: Batch, model: Model, original: Execution, count: int, nbytes: int) -> None:
        super().__init__(batch, model, original.items[:count], original.rows[:count], original.group)
        self.original = original
        self.nbytes = nbytes


class Shadows:
    """Copies that wait, and what came of the others. `finished` hands the comparing to a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Execution, Version, Model, int]] = deque()
        self._nbytes = 0
        self._stopped: set[str] = set()
        self._tallies: dict[tuple[str, str], _Tally] = {}
        self._to_compare: queue.SimpleQueue[Copy] | None = None
        # Their difference waits to be compared. Each is written by one thread alone, so neither needs a lock.
        self._handed_nbytes = 0
        self._compared_nbytes = 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def stop(self, candidate: Model) -> None:
        """A copy hangs on the one SPARE lane of its device: no more of them, which would do so on the next device."""
        self._stopped.add(candidate.key)

    def offer(self, execution: Execution, version: Version) -> None:
        """A batch has been answered: copy it if there is room."""
        candidate = version.model
        assert candidate is not None
        if candidate.key in self._stopped:
            return
        nbytes = sum([array.nbytes for item in execution.items for array in item if array is not None])
        nbytes += sum([array.nbytes for answer in execution.outcomes if isinstance(answer, tuple) for array in answer])
        tally = self._tally(execution.model, candidate)
        if len(self._waiting) >= _MAX_WAITING or self._nbytes + nbytes > _MAX_WAITING_BYTES:
            tally.skipped += len(execution.items)
            return
        self._waiting.append((execution, version, candidate, nbytes))
        self._nbytes += nbytes

    def next(self, scheduler: Scheduler, now_ns: int) -> Copy | None:
        """A copy to run now, where it is in nobody's way; None if there is none."""
        while self._waiting:
            original, version, model, nbytes = self._waiting[0]
            if version.state != READY or version.model is not model or model.key in self._stopped:
                self._waiting.popleft()  # it goes, or hangs
                self._nbytes -= nbytes
                continue
            count, rows = _fitting(original.rows, model.max_batch_size)
            batch = scheduler.spare(model.key, original.group, rows, now_ns)
            if batch is None:
                return None
            self._waiting.popleft()
            self._nbytes -= nbytes
            self._tally(original.model, model).skipped += len(original.items) - count
            return Copy(batch, model, original, count, nbytes)
        return None

    def finished(self, copy: Copy) -> None:
        """A copy has been computed."""
        if self._to_compare is None:
            self._to_compare = queue.SimpleQueue()
            threading.Thread(target=self._compare, args=(self._to_compare,), name="compare", daemon=True).start()
        waiting = self._handed_nbytes - self._compared_nbytes
        if self._to_compare.qsize() < _MAX_WAITING and waiting + copy.nbytes <= _MAX_WAITING_BYTES:
            self._handed_nbytes += copy.nbytes
            self._to_compare.put(copy)
        else:
            self._tally(copy.original.model, copy.model).skipped += len(copy.items)

    def keep(self, keys: set[str]) -> None:
        """Drop what was found about models other than these."""
        self._stopped &= keys
        for pair in [pair for pair in self._tallies if not keys.issuperset(pair)]:
            del self._tallies[pair]

    def report(self, id_: int, baseline: Model, candidate: Model) -> Comparison:
        """What has been found so far. Raises FailedPrecondition: nothing has."""
        tally = self._tallies.get((baseline.key, candidate.key))
        if tally is None:
            raise FailedPrecondition(
                f"nothing to compare: version {candidate.version} of {baseline.name!r} has had no copies of what "
                f"version {baseline.version} answered; tnxctl models route {baseline.name} "
                f"{baseline.version}=1 --shadow {candidate.version}"
            )
        return tally.report(id_)

    def _tally(self, baseline: Model, candidate: Model) -> _Tally:
        key = (baseline.key, candidate.key)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _Tally(baseline, candidate)
        return tally

    def _compare(self, inbox: queue.SimpleQueue[Copy]) -> None:
        while True:
            copy = inbox.get()
            nbytes = copy.nbytes
            try:
                tally = self._tallies.get((copy.original.model.key, copy.model.key))
                if tally is not None:  # else one of them has gone meanwhile
                    tally.add(copy)
            except Exception:
                log.exception("comparing %s with %s", copy.original.model.key, copy.model.key)
            del copy  # hold no request's memory while waiting for the next
            self._compared_nbytes += nbytes


def _fitting(rows: Sequence[int], limit: int) -> tuple[int, int]:
    """How many requests, from the first, fit into a batch, and their rows; one always does."""
    count, total = 1, rows[0]
    while count < len(rows) and total + rows[count] <= limit:
        total += rows[count]
        count += 1
    return count, total


def _joined(outputs: list[tuple[Array, ...]]) -> tuple[Array, ...]:
    return outputs[0] if len(outputs) == 1 else tuple(map(np.concatenate, zip(*outputs, strict=True)))


class _Difference:
    """Of one output."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.elements = 0
        self.max_abs = 0.0
        self.sum_abs = 0.0
        self.finite = 0
        self.rows = 0
        self.agreeing = 0
        self.misfits = 0

    def add(self, baseline: Array, candidate: Array) -> None:
        if baseline.shape != candidate.shape or baseline.dtype != candidate.dtype:
            self.misfits += 1
            return
        first, second = _as_float(baseline, self.spec), _as_float(candidate, self.spec)
        finite = np.isfinite(first) & np.isfinite(second)
        if not np.array_equal(np.isfinite(first), np.isfinite(second)):
            self.misfits += 1
        self.elements += first.size
        apart = np.abs(first[finite] - second[finite])
        if apart.size:
            self.max_abs = max(self.max_abs, float(apart.max()))
            self.sum_abs += float(apart.sum())
            self.finite += apart.size
        if first.ndim > 1 and first.shape[-1] > 1 and first.size:
            agreeing = first.argmax(axis=-1) == second.argmax(axis=-1)
            self.rows += agreeing.size
            self.agreeing += int(agreeing.sum())

    def report(self) -> OutputDifference:
        return OutputDifference(
            name=self.spec.name,
            elements=self.elements,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / self.finite if self.finite else 0.0,
            argmax_agreement=self.agreeing / self.rows if self.rows else None,
            misfits=self.misfits,
        )


def _as_float(array: Array, spec: TensorSpec) -> Array:
    if spec.datatype == "BF16":  # stored as the upper halves of float32, see `tnxctl.frames.STORAGE`
        array = (array.astype(np.uint32) << 16).view(np.float32)
    floats: Array = array.astype(np.float64)
    return floats


class _Tally:
    """All that is known of one pair of versions.

    `skipped` is the loop's; the rest is written by the thread that compares, and read by the loop.
    """

    def __init__(self, baseline: Model, candidate: Model) -> None:
        self._baseline = baseline
        self._candidate = candidate
        self._requests = 0
        self._errors = 0
        self._last_error = ""
        self._differences = [_Difference(spec) for spec in baseline.outputs]
        self._latencies: tuple[deque[float], deque[float]] = (deque(maxlen=_LATENCIES), deque(maxlen=_LATENCIES))
        self.skipped = 0

    def add(self, copy: Copy) -> None:
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
