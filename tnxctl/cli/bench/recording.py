"""A record of one loop of requests, kept while it runs, and what it comes to in numbers."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf, nan
from typing import TYPE_CHECKING

import numpy as np

from tnxctl.cli.tally import STAGES
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Internal, InvalidArgument, TensorNextError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOST = "LOST"
"""No answer came within the timeout."""

UNSENT = "UNSENT"
"""The client had not come to send it when the step was over."""

OUTSIDE = "outside"
"""The part of the mean latency that no stage of the daemon accounts for."""

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}

_LIMITS = wire.Limits(header_bytes=16 * wire.MIB, tensors=wire.MAX_TENSORS, rank=wire.MAX_RANK)
_NOTICEABLE = 0.05  # of the mean latency of the first step: a stage that grew by less has not

clock_ns = time.perf_counter_ns


@dataclass(frozen=True)
class Load:
    """A closed loop of so many requests outstanding, or an open loop at a rate in requests per second.

    Attributes:
        name: what people call it; "": by its numbers.
    """

    concurrency: int = 0
    rate: float = 0.0
    name: str = ""

    @property
    def title(self) -> str:
        if self.name:
            return self.name
        return f"{self.rate:g}/s" if self.rate else f"{self.concurrency} at a time"


@dataclass(frozen=True)
class Step:
    """One load, measured. Times are in the units that the names end in.

    Attributes:
        requests: that were due. answered: that got a result. unknown: under way when the step was interrupted.
        errors: what the others got, counted by code; LOST and UNSENT are this client's own. messages: the last of each.
        devices: where results were computed, counted.
        seconds: from the first request to the last answer.
        latency_us: by the names of PERCENTILES, of results, in an open loop from when they were due. {}: none came.
        p99_of_all_us: the same for all requests: one without a result is later than any other.
        late_us: the p99 and the maximum of how late an open loop sent. {}: a closed one is never late.
        rows: mean rows per batch.
        stages_us: mean time in each stage of the daemon, in all of them ("total"), and outside of it.
        client_cpu_us: CPU time of this process per request.
        ended: what ended the run with this step, if anything did.
    """

    load: Load
    requests: int
    answered: int
    unknown: int
    errors: Counter[str]
    messages: dict[str, str]
    devices: Counter[str]
    seconds: float
    latency_us: dict[str, float]
    p99_of_all_us: float
    late_us: dict[str, float]
    rows: float
    stages_us: dict[str, float]
    client_cpu_us: float
    ended: KeyboardInterrupt | TensorNextError | None = None

    @property
    def results_per_s(self) -> float:
        return self.answered / self.seconds if self.seconds else 0.0

    @property
    def failed(self) -> int:
        return self.errors.total()


@dataclass
class Recording:
    """A record of what one loop did and saw. Times are in nanoseconds of `clock_ns`.

    Attributes:
        deadline_ns: a result that comes later than that, from when it was sent, is worthless.
        outstanding: by id, when a request was due and when it was sent.
        patient: whether the loop goes on while the daemon takes no requests.
        unavailable: what the daemon said if it takes no more requests, and the loop is not patient.
    """

    deadline_ns: float = inf
    patient: bool = False
    outstanding: dict[int, tuple[int, int]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    devices: Counter[str] = field(default_factory=Counter)
    unavailable: str = ""
    began_ns: int = 0
    _ended_ns: int = 0
    _cpu_ns: int = 0
    _rows: int = 0
    _latency_ns: array[int] = field(default_factory=lambda: array("q"))
    _late_ns: array[int] = field(default_factory=lambda: array("q"))
    _stage_sums_us: list[float] = field(default_factory=lambda: [0.0] * len(STAGES))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The time of the loop itself: its CPU time counts."""
        cpu_ns = time.process_time_ns()
        self.began_ns = self._ended_ns = clock_ns()
        try:
            yield
        finally:
            self._cpu_ns = time.process_time_ns() - cpu_ns

    def send(self, number: int, due_ns: int, now_ns: int) -> None:
        """Note a request that is being sent."""
        self.outstanding[number] = (due_ns, now_ns)
        self._late_ns.append(now_ns - due_ns)

    def take(self, header: bytes, now_ns: int) -> wire.Result | None:
        """Note an answer. One to no request of this loop is for one before it, and is left aside.

        Returns:
            The result, if it is one that counts.

        Raises:
            Internal: it is malformed.
        """
        try:
            reply = wire.decode_reply(header, _LIMITS)
        except TensorNextError as error:
            raise Internal(f"predict got a malformed reply: {error.message}") from None
        sent = self.outstanding.pop(reply.id, None) if reply.id is not None else None
        if isinstance(reply, wire.ErrorReply):
            if reply.id is None:  # to a request that the daemon cannot read, and so to all of them
                raise InvalidArgument(reply.message)
            if sent is not None:
                self._fail(reply.code, reply.message, now_ns)
        elif not isinstance(reply, wire.Result):
            raise Internal(f"predict got a {type(reply).__name__}, expected a Result")
        elif sent is not None:
            due_ns, sent_ns = sent
            if now_ns - sent_ns > self.deadline_ns:
                self._fail("DEADLINE_EXCEEDED", "an answer came too late", now_ns)
            else:
                self._succeed(reply, now_ns - due_ns, now_ns)
                return reply
        return None

    def _fail(self, code: str, message: str, now_ns: int) -> None:
        self._ended_ns = now_ns
        self.errors[code] += 1
        self.messages[code] = message
        if code == "UNAVAILABLE" and not self.patient:
            self.unavailable = message

    def _succeed(self, reply: wire.Result, latency_ns: int, now_ns: int) -> None:
        self._ended_ns = now_ns
        self._latency_ns.append(latency_ns)
        self._rows += reply.batch_size
        self.devices[reply.device] += 1
        sums, timing = self._stage_sums_us, reply.timing
        sums[0] += timing.receive_us
        sums[1] += timing.queue_us
        sums[2] += timing.gather_us
        sums[3] += timing.h2d_us
        sums[4] += timing.compute_us
        sums[5] += timing.d2h_us
        sums[6] += timing.reply_us
        sums[7] += timing.total_us

    def give_up(self, count: int, code: str, message: str) -> None:
        """Note requests that this client has given up, or did not send."""
        if count:
            self.errors[code] += count
            self.messages[code] = message

    @property
    def has_answers(self) -> bool:
        """Whether any request was answered."""
        return bool(self._latency_ns) or any(code not in (LOST, UNSENT) for code in self.errors)

    def step(self, load: Load, ended: KeyboardInterrupt | TensorNextError | None = None) -> Step:
        """The numbers. Requests still outstanding count as unknown."""
        answered = len(self._latency_ns)
        unknown = len(self.outstanding)
        failed = self.errors.total()
        latency_us = np.sort(np.array(self._latency_ns, np.int64)) / 1e3
        stages = {stage: total / answered for stage, total in zip(STAGES, self._stage_sums_us, strict=True) if answered}
        if answered:
            stages[OUTSIDE] = float(latency_us.mean()) - stages["total"]
        late = np.sort(np.array(self._late_ns if load.rate else [], np.int64)) / 1e3
        return Step(
            load=load,
            requests=answered + failed + unknown,
            answered=answered,
            unknown=unknown,
            errors=self.errors,
            messages=self.messages,
            devices=self.devices,
            seconds=(self._ended_ns - self.began_ns) / 1e9,
            latency_us={
                name: _ranked(latency_us, percent, answered) for name, percent in PERCENTILES.items() if answered
            },
            p99_of_all_us=_ranked(latency_us, 99.0, answered + failed),
            late_us={name: _ranked(late, PERCENTILES[name], len(late)) for name in ("p99", "max") if len(late)},
            rows=self._rows / answered if answered else 0.0,
            stages_us=stages,
            client_cpu_us=self._cpu_ns / 1e3 / len(self._late_ns) if self._late_ns else 0.0,
            ended=ended,
        )


def _ranked(values: NDArray[np.float64], percent: float, count: int) -> float:
    """The percentile by nearest rank of so many values, of which the last ones may be missing: then it is infinite."""
    if not count:
        return nan
    rank = max(ceil(round(percent * count / 100, 6)), 1)
    return float(values[rank - 1]) if rank <= len(values) else inf


def grown(step: Step, first: Step) -> tuple[str, float] | None:
    """The stage whose mean grew most against the first step, and by how many microseconds; None: none did."""
    if step is first or not (step.stages_us and first.stages_us):
        return None
    stages = [name for name in first.stages_us if name != "total"]
    growth = {name: step.stages_us[name] - first.stages_us[name] for name in stages}
    most = max(growth, key=growth.__getitem__)
    least = _NOTICEABLE * (first.stages_us["total"] + first.stages_us[OUTSIDE])
    return (most, growth[most]) if growth[most] > least else None
