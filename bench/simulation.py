"""Replays a trace through a policy in simulated time: a discrete event simulation of a serving loop and its lanes."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies import Policy, Run
from traces import Machine, Trace

# Batches take from this share less than their table says upwards, with an exponential tail; as the table on average.
NOISE = 0.03

# What comes first on the cores leaves that much: the scheduler of an operating system starves nobody.
_LEAST_CORES = 0.1


class Noise:
    """Durations that batches really have: on average what the table says."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self._machine = machine
        self._chance = np.random.default_rng(seed)

    def __call__(self, device: str, model: str, rows: int) -> float:
        """Microseconds of the next batch."""
        return self._machine.cost_us(device, model, rows) * (1 - NOISE + float(self._chance.exponential(NOISE)))


@dataclass(frozen=True)
class Loop:
    """A serving loop, as `tnxd.serving.server` is one: a thread that does one thing at a time, and what that costs it.

    Costs are microseconds of CPU time. Without arguments nothing costs anything: then no message waits to be taken in,
    and only lanes take time.

    Attributes:
        receive_us: to receive a message and decode it. admit_us: to take the request in. refuse_us: to find out that it
            cannot be done, and to say so. answer_us: of one result. give_up_us: of an answer that there will be none.
        turn_us: of a turn, whatever there is to do in it.
        intake_us: in each turn, messages are taken in for so long at most.
        inline_limit_us: CPU batches that are expected to take no longer run on the loop's thread; 0: none does.
        cores: that the loop, the lanes and what follows share; infinite: each has its own.
        beside_us: per message, of other threads on these cores, above all ZeroMQ's own. They come first: they never
            have much to do at a time.
        lane_share: of its speed that a lane keeps while the loop is at work.
        from_arrival: whether a deadline counts from when its message arrived; else from when the loop took it up.
        lanes_first: whether a lane that is done gets its next batch before more messages are taken in.
        serial: part of a batch that only one thread of a team can do.
        short_share: of its speed that a team keeps which gets less than a core for each of its threads: they wait for
            each other.
    """

    receive_us: float = 0.0
    admit_us: float = 0.0
    refuse_us: float = 0.0
    answer_us: float = 0.0
    give_up_us: float = 0.0
    turn_us: float = 0.0
    intake_us: float = 2_000.0
    inline_limit_us: float = 0.0
    cores: float = math.inf
    beside_us: float = 0.0
    lane_share: float = 1.0
    from_arrival: bool = True
    lanes_first: bool = False
    serial: float = 0.25
    short_share: float = 0.4

    def part(self, threads: int) -> float:
        """The time of a batch with so many threads, relative to one (Amdahl, 1967)."""
        return self.serial + (1.0 - self.serial) / threads


IDEAL = Loop()


@dataclass(frozen=True)
class Outcome:
    """The fate of the jobs of a trace.

    Attributes:
        done_us: when each was answered; infinite for those that were never computed.
        unread_us: how long the message of each waited to be taken in.
        device: where each ran, "" for those that did not.
        refused: how many were turned away on arrival. given_up: how many were taken in, and had to be answered that
            their time had passed. computed_late: how many were computed for nothing.
        busy: share of the time that the lanes of each device ran batches. Those that the loop runs itself count, too.
        rows_per_batch: on average.
    """

    done_us: NDArray[np.float64]
    unread_us: NDArray[np.float64]
    in_time: NDArray[np.bool_]
    device: list[str]
    refused: int
    given_up: int
    computed_late: int
    busy: dict[str, float]
    rows_per_batch: float

    @property
    def share(self) -> float:
        """The part of all jobs that were done by their deadlines."""
        return float(self.in_time.mean()) if len(self.in_time) else 1.0


def replay(trace: Trace, policy: Policy, measure: Noise, loop: Loop = IDEAL) -> Outcome:
    """Run the trace until nothing waits and nothing runs."""
    return _Replay(trace, policy, measure, loop).run()


@dataclass(eq=False)
class _Running:
    """A batch on a lane. work_ns: what is left of it at full speed. micros: what it takes, and has taken more."""

    run: Run
    work_ns: float
    micros: float


class _Replay:
    """The state of one replay. Its methods are named as those of `tnxd.serving.server.Server` that they stand for."""

    def __init__(self, trace: Trace, policy: Policy, measure: Noise, loop: Loop) -> None:
        self._trace, self._policy, self._measure, self._loop = trace, policy, measure, loop
        self._jobs = trace.jobs
        self._arrivals = [int(job.arrival_us * 1e3) for job in trace.jobs]
        seconds = (self._arrivals[-1] - self._arrivals[0]) / 1e9 if len(self._arrivals) > 1 else math.inf
        self._beside = loop.beside_us / 1e6 * len(self._arrivals) / seconds if seconds else 0.0  # cores, on average
        self._now_ns = 0
        self._received = 0
        self._running: list[_Running] = []
        self._completed: deque[_Running] = deque()
        self._done_us = np.full(len(self._jobs), np.inf)
        self._unread_us = np.zeros(len(self._jobs))
        self._device = [""] * len(self._jobs)
        self._used = dict.fromkeys(trace.machine.lanes, 0.0)
        self._refused = self._batches = self._rows = 0

    def run(self) -> Outcome:
        busy = False
        while busy or self._wait():
            self._work(self._loop.turn_us)
            ran = bool(self._completed) and self._loop.lanes_first
            while self._completed:
                self._finish(self._completed.popleft())
            ran = ran and self._dispatch()
            self._receive()
            busy = self._dispatch() or ran
        return self._outcome()

    # --- time --------------------------------------------------------------------------------------------------

    def _threads(self) -> int:
        """Those of all batches that run."""
        return sum(running.run.threads for running in self._running)

    def _own_speed(self, running: _Running, speed: float) -> float:
        """That of a batch, where a thread has this speed."""
        return speed * self._loop.short_share if running.run.threads > 1 and speed < 1.0 else speed

    def _speed(self, threads: int) -> float:
        """That of each of so many threads."""
        cores = self._loop.cores
        if self._received < len(self._arrivals):
            cores -= self._beside
        return min(max(cores, _LEAST_CORES) / threads, 1.0)

    def _work(self, micros: float) -> None:
        """The loop does something."""
        if micros:
            speed = self._speed(1 + self._threads())
            self._pass(math.ceil(micros * 1e3 / speed), speed * self._loop.lane_share)

    def _pass(self, ns: int, lane_speed: float) -> None:
        """Time passes. Lanes go on, and end what they have to do."""
        self._now_ns += ns
        ended = []
        for running in self._running:
            own_speed = self._own_speed(running, lane_speed)
            done_ns = min(ns * own_speed, running.work_ns)
            running.work_ns -= done_ns
            longer_us = (done_ns / own_speed - done_ns) / 1e3
            running.micros += longer_us
            self._used[running.run.device] += longer_us
            if running.work_ns <= 0:
                ended.append(running)
        for running in ended:
            self._running.remove(running)
            self._completed.append(running)

    def _wait(self) -> bool:
        """Let time pass until there is something to do. False if there never is."""
        arrivals, received = self._arrivals, self._received
        if self._completed:
            return True
        events = []
        speed = self._speed(self._threads() or 1)
        if received < len(arrivals):
            events.append(arrivals[received])
        if self._running:
            left_ns = min(one.work_ns / self._own_speed(one, speed) for one in self._running)
            events.append(self._now_ns + math.ceil(left_ns))
        if not events:
            return False  # what the policy may still wait for concerns none of the jobs
        event_ns = self._policy.next_event_ns()
        self._pass(max(min(events if event_ns is None else [*events, event_ns]) - self._now_ns, 0), speed)
        return True

    # --- what a turn consists of -------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in what has arrived, for a while at most."""
        loop, policy, arrivals = self._loop, self._policy, self._arrivals
        until_ns = self._now_ns + loop.intake_us * 1e3
        while self._received < len(arrivals) and arrivals[self._received] <= self._now_ns <= until_ns:
            if loop.lanes_first and self._completed:
                break
            number = self._received
            waited_ns = self._now_ns - arrivals[number]
            self._received += 1
            self._unread_us[number] = waited_ns / 1e3
            self._work(loop.receive_us)
            deadline_ns = int(self._jobs[number].deadline_us * 1e3) + (0 if loop.from_arrival else waited_ns)
            if policy.add(number, self._now_ns, deadline_ns):
                self._work(loop.admit_us)
            else:
                self._refused += 1
                self._work(loop.refuse_us)

    def _dispatch(self) -> bool:
        """Put batches on free lanes. True if one ran right here: there may be another one now."""
        before = self._policy.given_up
        runs = self._policy.start(self._now_ns)
        self._work((self._policy.given_up - before) * self._loop.give_up_us)
        inline = None
        for run in runs:
            micros = self._measure(run.device, run.model, run.rows) * self._loop.part(run.threads)
            self._batches += 1
            self._rows += run.rows
            self._used[run.device] += micros
            for number in run.jobs:
                self._device[number] = run.device
            running = _Running(run, int(micros * 1e3), micros)
            if run.inline:
                inline = running
            else:
                self._running.append(running)
        self._running.sort(key=lambda running: running.work_ns)  # the order in which they end, if all go on
        if inline is not None:
            begin_ns = self._now_ns
            self._work(inline.micros)
            micros = (self._now_ns - begin_ns) / 1e3
            self._used[inline.run.device] += micros - inline.micros
            inline.micros = micros
            self._finish(inline)
        return inline is not None

    def _finish(self, running: _Running) -> None:
        """Answer the requests of a batch that is over."""
        for number in running.run.jobs:
            self._done_us[number] = self._now_ns / 1e3
        for number in self._policy.wanted(running.run):
            self._work(self._loop.answer_us)
            self._done_us[number] = self._now_ns / 1e3
        self._policy.finished(running.run, running.micros, self._now_ns)

    def _outcome(self) -> Outcome:
        done_us, lanes = self._done_us, self._trace.machine.lanes
        in_time = done_us <= np.array([job.deadline_us for job in self._jobs])
        end_us = max(float(done_us[np.isfinite(done_us)].max(initial=0.0)), self._arrivals[-1] / 1e3, 1.0)
        return Outcome(
            done_us,
            self._unread_us,
            in_time,
            self._device,
            self._refused,
            self._policy.given_up,
            int((np.isfinite(done_us) & ~in_time).sum()),
            {name: self._used[name] / (end_us * count) for name, count in lanes.items()},
            self._rows / max(self._batches, 1),
        )
