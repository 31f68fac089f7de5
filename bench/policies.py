"""Policies that a trace can be replayed through: the daemon's scheduler, and simple ones to hold it against."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from tnxctl.errors import DeadlineExceeded, ResourceExhausted
from tnxd.costs import CostModel
from tnxd.executors.trial.warmup import warm_up_sizes
from tnxd.scheduler import Scheduler
from tnxd.work import Batch, Device, Request
from traces import CPU, GPU, Job, Machine


class Run(NamedTuple):
    """A batch that starts: the numbers of its jobs. `token` is the policy's own."""

    device: str
    model: str
    rows: int
    jobs: list[int]
    token: object


class Policy(Protocol):
    """Decides in simulated time. Jobs go by their number in the trace; times are integer nanoseconds."""

    def add(self, number: int, now_ns: int) -> bool:
        """A job arrives. False if it is refused."""

    def start(self, now_ns: int) -> list[Run]:
        """Batches for the lanes that are free now."""

    def finished(self, run: Run, micros: float) -> None:
        """A batch is over after so long."""

    def next_event_ns(self) -> int | None:
        """The time at which to be asked again though nothing happens."""


class _Numbered(Request, kw_only=True):
    number: int


class Scheduled:
    """The daemon's scheduler, driven as the daemon drives it, with costs that it learns as there.

    Args:
        measure: what one batch takes, in microseconds: the warm-up asks it for each size once.
    """

    def __init__(self, machine: Machine, jobs: Sequence[Job], measure: Measure) -> None:
        self._machine = machine
        self._jobs = jobs
        costs = CostModel()
        for device in machine.lanes:
            for model, limit in machine.limits.items():
                for rows in warm_up_sizes(limit):
                    costs.curve(device, model).observe(rows, measure(device, model, rows))
        devices = [
            Device(name, "cpu" if name == CPU else "cuda", lanes, set(machine.limits), memory_free_mb=1e6)
            for name, lanes in machine.lanes.items()
        ]
        self.scheduler = Scheduler(devices, costs, max_requests=16384, max_bytes=1 << 30)

    def add(self, number: int, now_ns: int) -> bool:
        job = self._jobs[number]
        request = _Numbered(
            job.model,
            max_batch_size=self._machine.limits[job.model],
            rows=job.rows,
            client=job.client,
            wanted="auto",
            priority=job.priority,
            deadline_ns=int(job.deadline_us * 1e3),
            number=number,
        )
        try:
            self.scheduler.add(request, now_ns)
        except (DeadlineExceeded, ResourceExhausted):
            return False
        return True

    def start(self, now_ns: int) -> list[Run]:
        batches, late = self.scheduler.next_batches(now_ns)
        late += self.scheduler.expire(now_ns)
        for request in late:
            request.done = True
        return [
            Run(batch.device.name, batch.model, batch.rows, [_number(request) for request in batch.requests], batch)
            for batch in batches
        ]

    def finished(self, run: Run, micros: float) -> None:
        assert isinstance(run.token, Batch)
        self.scheduler.finished(run.token, micros)
        for request in run.token.requests:
            request.done = True

    def next_event_ns(self) -> int | None:
        return self.scheduler.next_event_ns()


def _number(request: Request) -> int:
    assert isinstance(request, _Numbered)
    return request.number


class Measure(Protocol):
    def __call__(self, device: str, model: str, rows: int) -> float:
        """Microseconds that one batch takes."""


class Threshold:
    """Requests of up to `rows` rows go to the CPU, larger ones to the GPU; first come, first served, in batches.

    A free lane takes the request that has waited longest, and with it those that wait for the same model, oldest
    first, while they fit. Nothing is refused, and what is late is computed all the same.

    Args:
        rows: 0 sends everything to the GPU, `math.inf` everything to the CPU.
    """

    def __init__(self, machine: Machine, jobs: Sequence[Job], rows: float) -> None:
        self._machine = machine
        self._jobs = jobs
        self._rows = rows
        self._free = dict(machine.lanes)
        self._queues: dict[str, dict[str, deque[int]]] = {device: {} for device in machine.lanes}

    def add(self, number: int, now_ns: int) -> bool:
        job = self._jobs[number]
        queues = self._queues[CPU if job.rows <= self._rows else GPU]
        queues.setdefault(job.model, deque()).append(number)
        return True

    def start(self, now_ns: int) -> list[Run]:
        runs = []
        for device, queues in self._queues.items():
            while self._free[device] and (model := _oldest(queues.items())) is not None:
                self._free[device] -= 1
                queue = queues[model]
                taken = [queue.popleft()]
                rows = self._jobs[taken[0]].rows
                while queue and rows + self._jobs[queue[0]].rows <= self._machine.limits[model]:
                    rows += self._jobs[queue[0]].rows
                    taken.append(queue.popleft())
                runs.append(Run(device, model, rows, taken, None))
        return runs

    def finished(self, run: Run, micros: float) -> None:
        self._free[run.device] += 1

    def next_event_ns(self) -> int | None:
        return None


def _oldest(queues: Iterable[tuple[str, deque[int]]]) -> str | None:
    return min(((queue[0], model) for model, queue in queues if queue), default=(0, None))[1]
