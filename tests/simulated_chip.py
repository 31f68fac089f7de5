"""A chip that lanes share, in times that a test makes up, and a scheduler that hands it batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from scheduling_helpers import request
from tnxd.scheduling.device import Batch
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler


@dataclass
class SimulatedChip:
    """Batches of streams that share a chip evenly; those of one stream run one after the other.

    Args:
        streams: of the chip. work_us: what a batch takes if it has the chip to itself.
    """

    streams: int
    work_us: Callable[[str, int], float]
    running: dict[int, list[tuple[Batch, float]]] = field(default_factory=dict)
    first_us: dict[int, float] = field(default_factory=dict)
    now_us: float = 0.0

    def begin(self, batch: Batch) -> None:
        """Run a batch on the stream of its lane."""
        stream = batch.lane % self.streams
        batches = self.running.setdefault(stream, [])
        if not batches:
            self.first_us[stream] = self.now_us
        batches.append((batch, self.work_us(batch.model, batch.rows)))

    def next_us(self) -> float:
        """When the next batch is over, if nothing else happens."""
        heads = [batches[0] for batches in self.running.values() if batches]
        return min([self.now_us + left_us * len(heads) for _, left_us in heads], default=float("inf"))

    def advance(self, until_us: float) -> list[tuple[Batch, float]]:
        """Compute until then, which is no later than `next_us`.

        Returns:
            The batches that are over, and how long each was the first of its stream.
        """
        busy, over = [(stream, batches) for stream, batches in self.running.items() if batches], []
        done_us = (until_us - self.now_us) / len(busy) if busy else 0.0
        self.now_us = until_us
        for stream, batches in busy:
            batch, left_us = batches[0]
            if left_us - done_us <= 1e-6 * left_us + 1e-6:
                del batches[0]
                over.append((batch, until_us - self.first_us[stream]))
                self.first_us[stream] = until_us
            else:
                batches[0] = batch, left_us - done_us
        return over


@dataclass
class Outcome:
    """Outcome of a request: what was predicted when it came, and what it took, in microseconds."""

    request: Request
    predicted_us: float
    took_us: float


def drive(
    scheduler: Scheduler, chip: SimulatedChip, arrivals: Iterable[tuple[float, str, int]], most: int = 8
) -> list[Outcome]:
    """Have the scheduler run requests, each a time in microseconds, a model and its rows, in the order of time."""
    outcomes: list[Outcome] = []
    came: dict[int, tuple[float, float]] = {}

    def dispatch() -> None:
        batches, _ = scheduler.next_batches(int(chip.now_us * 1e3))
        for batch in batches:
            chip.begin(batch)

    def run_until(until_us: float) -> None:
        while (next_us := chip.next_us()) <= until_us and next_us != float("inf"):
            for batch, micros in chip.advance(next_us):
                scheduler.finished(batch, micros, int(chip.now_us * 1e3))
                for one in batch.requests:
                    at_us, predicted_us = came[id(one)]
                    outcomes.append(Outcome(one, predicted_us, chip.now_us - at_us))
            dispatch()
        if until_us != float("inf"):
            chip.advance(until_us)

    for at_us, model, rows in arrivals:
        run_until(at_us)
        one = request(model, rows=rows, max_batch_size=most, wanted="cuda:0")
        scheduler.add(one, int(at_us * 1e3))
        came[id(one)] = at_us, one.predicted_us
        dispatch()
    run_until(float("inf"))
    return outcomes
