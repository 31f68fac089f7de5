"""Policies that a trace can be replayed through: the daemon's scheduler, and simple ones to hold it against."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple, Protocol

from tnxctl.protocol.errors import DeadlineExceeded, ResourceExhausted
from tnxd.executors.trial.warmup import warm_up_sizes
from tnxd.lanes import INLINE, NO_TEAMS, Teams
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.forecast import Forecast
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler
from traces import CPU, GPU, Job, Machine


class Run(NamedTuple):
    """A batch that starts: the numbers of its jobs.

    Attributes:
        token: the policy's own. inline: whether it runs on the serving thread. threads: that work on it.
    """

    device: str
    model: str
    rows: int
    jobs: list[int]
    token: object
    inline: bool = False
    threads: int = 1


class Policy(Protocol):
    """Decides in simulated time. Jobs go by their number in the trace; times are integer nanoseconds.

    Attributes:
        given_up: jobs that were taken in and given up since their time had passed.
    """

    given_up: int

    def add(self, number: int, now_ns: int, deadline_ns: int) -> bool:
        """A job is taken in. False if it is refused."""

    def start(self, now_ns: int) -> list[Run]:
        """Batches for the lanes that are free now."""

    def wanted(self, run: Run) -> list[int]:
        """The jobs of a batch that are to be answered: those that were not given up meanwhile."""

    def finished(self, run: Run, micros: float, now_ns: int) -> None:
        """A batch is over after so long, and its jobs have their answers now."""

    def next_event_ns(self) -> int | None:
        """The time at which to be asked again though nothing happens."""


class _Numbered(Request, kw_only=True):
    number: int


class _Uncorrected(Forecast):
    """A forecast as the daemon's was before it corrected any."""

    def observe(self, predicted_us: float, actual_us: float) -> None:
        pass

    def answered(self, predicted_us: float, actual_us: float) -> None:
        pass

    def fared(self, late: int, in_time: int) -> None:
        pass


class Scheduled:
    """The daemon's scheduler, driven as the daemon drives it, with costs that it learns as there.

    Args:
        measure: what one batch takes, in microseconds: the warm-up asks it for each size once.
        inline_limit_us: CPU batches that are expected to take no longer run on the serving thread; 0: none does.
        corrects: whether predictions are corrected by how requests fared, as the daemon's are.
        teams: of the CPU. part: time of a wide batch relative to a narrow one.
        threads: that each batch is to have; 0: chosen for each.
    """

    def __init__(
        self,
        machine: Machine,
        jobs: Sequence[Job],
        measure: Measure,
        *,
        inline_limit_us: float = 0.0,
        corrects: bool = True,
        teams: Teams = NO_TEAMS,
        part: float = 1.0,
        threads: int = 0,
    ) -> None:
        self.given_up = 0
        self._machine = machine
        self._jobs = jobs
        costs = CostModel()
        for device in machine.lanes:
            for model, limit in machine.limits.items():
                for rows in warm_up_sizes(limit):
                    micros = measure(device, model, rows)
                    costs.curve(device, model).observe(rows, part * micros if device == CPU and threads > 1 else micros)
        devices = [
            Device(
                name,
                "cpu" if name == CPU else "cuda",
                lanes,
                set(machine.limits),
                memory_free_mb=1e6,
                inline_limit_us=inline_limit_us if name == CPU else 0.0,
                teams=teams if name == CPU else NO_TEAMS,
            )
            for name, lanes in machine.lanes.items()
        ]
        self.scheduler = Scheduler(devices, costs, max_requests=16384, max_bytes=1 << 30)
        if teams.lanes:
            for model, limit in machine.limits.items():
                narrow = [(rows, measure(CPU, model, rows)) for rows in warm_up_sizes(limit)]
                self.scheduler.models.add(
                    CPU, model, widths=[(rows, micros, part * micros) for rows, micros in narrow], threads=threads
                )
        if not corrects:
            for one, model in product(devices, machine.limits):
                self.scheduler._routing.placement(one, model).forecast = _Uncorrected()

    def add(self, number: int, now_ns: int, deadline_ns: int) -> bool:
        job = self._jobs[number]
        request = _Numbered(
            job.model,
            max_batch_size=self._machine.limits[job.model],
            rows=job.rows,
            client=job.client,
            wanted="auto",
            priority=job.priority,
            deadline_ns=deadline_ns,
            came_ns=deadline_ns - int((job.deadline_us - job.arrival_us) * 1e3),
            number=number,
        )
        try:
            self.scheduler.add(request, now_ns)
        except (DeadlineExceeded, ResourceExhausted):
            return False
        return True

    def start(self, now_ns: int) -> list[Run]:
        batches, late = self.scheduler.next_batches(now_ns)
        self._give_up(late)
        self._give_up(self.scheduler.expire(now_ns))
        return [
            Run(
                batch.device.name,
                batch.model,
                batch.rows,
                [_number(request) for request in batch.requests],
                batch,
                batch.lane == INLINE,
                batch.threads,
            )
            for batch in batches
        ]

    def wanted(self, run: Run) -> list[int]:
        assert isinstance(run.token, Batch)
        return [_number(request) for request in run.token.requests if not request.done]

    def finished(self, run: Run, micros: float, now_ns: int) -> None:
        assert isinstance(run.token, Batch)
        self.scheduler.finished(run.token, micros, now_ns)
        for request in run.token.requests:
            request.done = True

    def next_event_ns(self) -> int | None:
        return self.scheduler.next_event_ns()

    def _give_up(self, late: Iterable[Request]) -> None:
        for request in late:
            request.done = True
            self.given_up += 1


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
        self.given_up = 0
        self._machine = machine
        self._jobs = jobs
        self._rows = rows
        self._free = dict(machine.lanes)
        self._queues: dict[str, dict[str, deque[int]]] = {device: {} for device in machine.lanes}

    def add(self, number: int, now_ns: int, deadline_ns: int) -> bool:
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

    def wanted(self, run: Run) -> list[int]:
        return run.jobs

    def finished(self, run: Run, micros: float, now_ns: int) -> None:
        self._free[run.device] += 1

    def next_event_ns(self) -> int | None:
        return None


def _oldest(queues: Iterable[tuple[str, deque[int]]]) -> str | None:
    return min(((queue[0], model) for model, queue in queues if queue), default=(0, None))[1]
