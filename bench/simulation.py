"""Replays a trace through a policy in simulated time: a discrete event simulation of lanes that run batches."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from policies import Policy, Run
from traces import Machine, Trace

# Batches take from this share less than their table says upwards, with an exponential tail; as the table on average.
NOISE = 0.03


class Noise:
    """Durations that batches really have: on average what the table says."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self._machine = machine
        self._chance = np.random.default_rng(seed)

    def __call__(self, device: str, model: str, rows: int) -> float:
        """Microseconds of the next batch."""
        return self._machine.cost_us(device, model, rows) * (1 - NOISE + float(self._chance.exponential(NOISE)))


@dataclass(frozen=True)
class Outcome:
    """The fate of the jobs of a trace.

    Attributes:
        done_us: when each was done; infinite for those that never were.
        device: where each ran, "" for those that did not.
        refused: how many were turned away on arrival. computed_late: how many were computed for nothing.
        busy: share of the time that the lanes of each device ran batches.
        rows_per_batch: on average.
    """

    done_us: NDArray[np.float64]
    in_time: NDArray[np.bool_]
    device: list[str]
    refused: int
    computed_late: int
    busy: dict[str, float]
    rows_per_batch: float

    @property
    def share(self) -> float:
        """The part of all jobs that were done by their deadlines."""
        return float(self.in_time.mean()) if len(self.in_time) else 1.0


def replay(trace: Trace, policy: Policy, measure: Noise) -> Outcome:
    """Run the trace until nothing waits and nothing runs."""
    jobs = trace.jobs
    arrivals = [int(job.arrival_us * 1e3) for job in jobs]
    done_us = np.full(len(jobs), np.inf)
    device = [""] * len(jobs)
    used = dict.fromkeys(trace.machine.lanes, 0.0)
    running: list[tuple[int, int, Run, float]] = []
    refused = started = rows = arrived = 0
    while True:
        events = [running[0][0]] if running else []
        if arrived < len(jobs):
            events.append(arrivals[arrived])
        event_ns = policy.next_event_ns()
        if not events:
            break  # what the policy may still wait for concerns none of the jobs
        now_ns = min(events if event_ns is None else [*events, event_ns])
        while running and running[0][0] <= now_ns:
            _, _, run, micros = heappop(running)
            for number in run.jobs:
                done_us[number] = now_ns / 1e3
            policy.finished(run, micros)
        while arrived < len(jobs) and arrivals[arrived] <= now_ns:
            refused += not policy.add(arrived, now_ns)
            arrived += 1
        for run in policy.start(now_ns):
            micros = measure(run.device, run.model, run.rows)
            started += 1
            rows += run.rows
            used[run.device] += micros
            for number in run.jobs:
                device[number] = run.device
            heappush(running, (now_ns + int(micros * 1e3), started, run, micros))
    deadlines_us = np.array([job.deadline_us for job in jobs])
    in_time = done_us <= deadlines_us
    end_us = max(float(done_us[np.isfinite(done_us)].max(initial=0.0)), arrivals[-1] / 1e3, 1.0)
    return Outcome(
        done_us,
        in_time,
        device,
        refused,
        int((np.isfinite(done_us) & ~in_time).sum()),
        {name: used[name] / (end_us * lanes) for name, lanes in trace.machine.lanes.items()},
        rows / max(started, 1),
    )
