"""Runs of a benchmark: a sweep over loads, and a search for the highest rate that keeps a bound."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnxctl.cli.bench.loops import Connection, Requests, closed_loop, open_loop
from tnxctl.cli.bench.recording import UNSENT, Load, Recording, Step
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.cli.workload import Options
    from tnxctl.protocol.datatypes import Array
    from tnxctl.results import Result

HIGHEST_RATE = 1_000_000.0
FEWEST = 10
"""Requests that a step has to have on average for its rate to be tried in a search."""

_CLOSE = 0.05  # of a rate: so near to one that is too high, a search ends

_DOUBTFUL = 0.7  # of a miss: three of these make two


@dataclass(frozen=True)
class Bench:
    """Settings that all steps of a run share.

    Attributes:
        timeout: in seconds, of each request. seconds, warm_up: of each step.
        seed: of the times at which the requests of an open loop are due.
    """

    endpoint: str
    timeout: float
    inputs: Mapping[str, Array]
    options: Options
    seconds: float
    warm_up: float
    seed: int

    def probe(self) -> Result:
        """The answer to one request, with as much time as the timeout allows. Raises its error."""
        with Connection(self.endpoint, self.timeout) as connection:
            options: Options = {**self.options, "deadline": None}
            return connection.ask(connection.session.encoder.predict(self.inputs, **options, timeout=None, now=_now()))

    def measure(self, load: Load) -> Step:
        """One step, on a connection of its own, after a warm-up. The error that ends it early, if any, is in it."""
        recording = Recording()
        try:
            with Connection(self.endpoint, self.timeout) as connection:
                call = connection.session.encoder.predict(self.inputs, **self.options, timeout=None, now=_now())
                requests = Requests(call)
                if self.warm_up:
                    self._loop(connection, requests, Recording(requests.deadline_ns), load, self.warm_up, self.seed + 1)
                recording = Recording(requests.deadline_ns)
                self._loop(connection, requests, recording, load, self.seconds, self.seed)
        except (KeyboardInterrupt, TensorNextError) as end:
            return recording.step(load, end)
        return recording.step(load)

    def _loop(
        self, connection: Connection, requests: Requests, recording: Recording, load: Load, seconds: float, seed: int
    ) -> None:
        if load.rate:
            open_loop(connection, requests, recording, load.rate, seconds, seed)
        else:
            closed_loop(connection, requests, recording, load.concurrency, seconds)


class Sweep:
    """Loads one after the other, when it is iterated over, up to the first that is ended early."""

    def __init__(self, bench: Bench, loads: Sequence[Load]) -> None:
        self._bench = bench
        self._loads = loads

    def __iter__(self) -> Iterator[Step]:
        for load in self._loads:
            step = self._bench.measure(load)
            yield step
            if step.ended is not None:
                return


class Search:
    """A search for the highest rate whose p99 stays under a bound, when it is iterated over.

    One request at a time shows where to begin. From there rates double until one is too high, or halve until one is
    not, and then what lies between is halved. A rate is too high if it is so twice, or three times where this client
    was late itself. A request without a result counts as later than the bound.

    Attributes:
        bound_us: the bound. best: the step of the highest rate that kept it so far.
        too_high: the lowest rate that did not; None if none was that.
        over: whether it went to its end.
    """

    def __init__(self, bench: Bench, bound_us: float) -> None:
        self.bound_us = bound_us
        self.best: Step | None = None
        self.too_high: float | None = None
        self.over = False
        self._bench = bench

    def keeps(self, step: Step) -> bool:
        """Whether a step kept the bound."""
        return step.p99_of_all_us <= self.bound_us

    def __iter__(self) -> Iterator[Step]:
        first = self._bench.measure(Load(concurrency=1))
        yield first
        if first.ended is not None:
            return
        rate: float | None = _rounded(max(first.results_per_s / 2, FEWEST / self._bench.seconds))
        while rate is not None:
            misses = 0.0
            while misses < 2 and (self.best is None or self.best.load.rate != rate):
                step = self._bench.measure(Load(rate=rate))
                if step.ended is None and self.keeps(step):
                    self.best = step
                misses += _DOUBTFUL if self._is_doubtful(step) else 1
                yield step
                if step.ended is not None:
                    return
            if self.best is None or self.best.load.rate != rate:
                self.too_high = rate
            rate = self._next()
        self.over = True

    def _is_doubtful(self, step: Step) -> bool:
        """Whether this client was so late itself that the daemon may not be to blame."""
        return UNSENT in step.errors or step.late_us.get("p99", 0.0) > self.bound_us / 2

    def _next(self) -> float | None:
        """The next rate to try, if there is one."""
        low, high = 0.0 if self.best is None else self.best.load.rate, self.too_high
        if high is None:
            return min(2 * low, HIGHEST_RATE) if low < HIGHEST_RATE else None
        if not low:
            return _rounded(high / 2) if high / 2 * self._bench.seconds >= FEWEST else None
        middle = _rounded((low + high) / 2)
        return middle if high - low > _CLOSE * high and low < middle < high else None


def _rounded(rate: float) -> float:
    """Three digits of a rate: more would say nothing."""
    return float(f"{rate:.3g}")


def _now() -> float:
    return time.monotonic()
