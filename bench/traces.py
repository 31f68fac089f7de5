"""Traces of requests, and the machines that they are replayed on: what arrives when, and what a batch really costs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CPU, GPU = "cpu", "cuda:0"

Table = Mapping[int, float]
"""Rows of a batch -> microseconds."""


@dataclass(frozen=True)
class Job:
    """One request of a trace. Times in microseconds from the beginning of the trace.

    Attributes:
        arrival_us, deadline_us: it is worth something from the one to the other.
        client, priority: as in `tnxd.scheduling.request.Request`.
    """

    arrival_us: float
    deadline_us: float
    model: str
    rows: int = 1
    client: str = "client"
    priority: int = 1


@dataclass(frozen=True)
class Machine:
    """Devices and true costs.

    Attributes:
        lanes: batches that run at a time, per device.
        limits: most rows of a batch, per model.
        tables: what a batch costs, per device and model; straight lines between the sizes given.
    """

    lanes: Mapping[str, int]
    limits: Mapping[str, int]
    tables: Mapping[tuple[str, str], Table]
    _points: dict[tuple[str, str], tuple[list[int], list[float]]] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for key, table in self.tables.items():
            sizes = sorted(table)
            self._points[key] = (sizes, [table[rows] for rows in sizes])

    def cost_us(self, device: str, model: str, rows: int) -> float:
        """The least that a batch takes. What exceeds the model's limit runs in pieces, one after the other."""
        sizes, times = self._points[device, model]
        limit = self.limits[model]
        if rows > limit:
            pieces, rest = divmod(rows, limit)
            return pieces * self.cost_us(device, model, limit) + (self.cost_us(device, model, rest) if rest else 0.0)
        at = bisect_left(sizes, rows)
        if at == 0:
            return times[0]
        if at == len(sizes):
            return times[-1] * rows / sizes[-1]
        share = (rows - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])

    def rows_per_us(self, model: str) -> float:
        """Rows of that model that all devices together do in full batches."""
        limit = self.limits[model]
        return sum(lanes * limit / self.cost_us(device, model, limit) for device, lanes in self.lanes.items())


@dataclass(frozen=True)
class Trace:
    """Jobs in the order of their arrival, and the machine."""

    name: str
    says: str
    machine: Machine
    jobs: list[Job]


def _affine(fixed_us: float, per_row_us: float, limit: int) -> Table:
    return {rows: fixed_us + per_row_us * rows for rows in (1, limit)}


# The model `mlp`, as measured on two cores of a Xeon, one thread; --measure takes this machine's own.
MLP_CPU: Table = {1: 60, 2: 69, 4: 100, 8: 150, 16: 255, 32: 390, 64: 640}

_TABLES: dict[tuple[str, str], Table] = {
    (CPU, "mlp"): MLP_CPU,
    (GPU, "mlp"): _affine(130, 0.5, 64),
    # A ranker: the CPU is done sooner with a row or two, the GPU with more.
    (CPU, "ranker"): _affine(300, 120, 64),
    (GPU, "ranker"): _affine(800, 8, 64),
    # An image model, dear everywhere.
    (CPU, "vision"): _affine(2_000, 10_000, 32),
    (GPU, "vision"): _affine(2_500, 350, 32),
}


def machine(mlp_cpu: Table = MLP_CPU) -> Machine:
    """Two CPU lanes and a GPU with one lane."""
    return Machine({CPU: 2, GPU: 1}, {"mlp": 64, "ranker": 64, "vision": 32}, {**_TABLES, (CPU, "mlp"): mlp_cpu})


# --- arrivals --------------------------------------------------------------------------------------------------

Random = np.random.Generator
Times = NDArray[np.float64]


def _poisson(chance: Random, count: int, per_us: float) -> Times:
    return np.cumsum(chance.exponential(1 / per_us, count))


def _bursts(chance: Random, count: int, per_us: float, on_us: float, off_us: float) -> Times:
    """Arrivals at `per_us` during times of about `on_us`, and none during the pauses between them."""
    busy = _poisson(chance, count, per_us)
    pauses = np.cumsum(chance.exponential(off_us, count))
    begins = np.cumsum(chance.exponential(on_us, count))
    ended = np.searchsorted(begins, busy)
    times: Times = busy + np.where(ended > 0, pauses[np.maximum(ended - 1, 0)], 0.0)
    return times


def _mixture(chance: Random, count: int, *parts: tuple[float, float, float]) -> Times:
    """Durations: (share, shortest, longest) of each part, log-uniform within a part."""
    which = chance.choice(len(parts), count, p=[share for share, _, _ in parts])
    low = np.array([math.log(shortest) for _, shortest, _ in parts])[which]
    high = np.array([math.log(longest) for _, _, longest in parts])[which]
    times: Times = np.exp(chance.uniform(low, high))
    return times


def _jobs(model: str, arrivals: Times, patience_us: Times) -> list[Job]:
    return [Job(float(at), float(at + patience), model) for at, patience in zip(arrivals, patience_us, strict=True)]


# --- the traces ------------------------------------------------------------------------------------------------


def _poisson_at(load: float) -> Callable[[Machine, Random, int], list[Job]]:
    def jobs(machine: Machine, chance: Random, count: int) -> list[Job]:
        arrivals = _poisson(chance, count, load * machine.rows_per_us("ranker"))
        return _jobs("ranker", arrivals, _mixture(chance, count, (1.0, 2_000, 10_000)))

    return jobs


def _measured(machine: Machine, chance: Random, count: int) -> list[Job]:
    arrivals = _poisson(chance, count, 0.6 * machine.rows_per_us("mlp"))
    return _jobs("mlp", arrivals, _mixture(chance, count, (1.0, 500, 5_000)))


def _in_bursts(machine: Machine, chance: Random, count: int) -> list[Job]:
    arrivals = _bursts(chance, count, 2.5 * machine.rows_per_us("ranker"), 20_000, 40_000)
    return _jobs("ranker", arrivals, _mixture(chance, count, (1.0, 2_000, 20_000)))


def _heavy_tails(machine: Machine, chance: Random, count: int) -> list[Job]:
    rows = np.minimum(np.ceil(chance.pareto(1.1, count)).clip(1), 1024).astype(int)
    load = 0.85 * machine.rows_per_us("ranker") / float(rows.mean())
    arrivals = _poisson(chance, count, load)
    patience = _mixture(chance, count, (1.0, 4_000, 40_000)) + 60.0 * rows  # the large ones know that they are
    return [
        Job(float(at), float(at + wait), "ranker", int(size))
        for at, wait, size in zip(arrivals, patience, rows, strict=True)
    ]


def _mixed_models(machine: Machine, chance: Random, count: int) -> list[Job]:
    arrivals: list[tuple[float, str]] = []
    rates = {
        model: load * machine.rows_per_us(model) for model, load in (("vision", 0.5), ("ranker", 0.15), ("mlp", 0.02))
    }
    end = count / sum(rates.values())
    for model, rate in rates.items():
        expected = int(rate * end)
        arrivals += [(float(at), model) for at in np.sort(chance.uniform(0, end, expected))]
    patience = {"vision": (30_000, 200_000), "ranker": (5_000, 30_000), "mlp": (4_000, 20_000)}
    jobs = []
    for at, model in sorted(arrivals):
        (wait,) = _mixture(chance, 1, (1.0, *patience[model]))
        jobs.append(Job(at, at + float(wait), model))
    return jobs


def _urgent(machine: Machine, chance: Random, count: int) -> list[Job]:
    arrivals = _poisson(chance, count, 1.05 * machine.rows_per_us("ranker"))
    return _jobs("ranker", arrivals, _mixture(chance, count, (0.2, 2_500, 4_000), (0.8, 10_000, 40_000)))


def _clients(machine: Machine, chance: Random, count: int) -> list[Job]:
    """One client asks for more than the machine can do, at the lowest priority; twenty others for little."""
    share = 0.7
    flood = int(share * count)
    rate = 1.3 * machine.rows_per_us("ranker")
    jobs = [
        Job(float(at), float(at + wait), "ranker", client="flood", priority=3)
        for at, wait in zip(
            _bursts(chance, flood, 2 * share * rate, 10_000, 10_000),
            _mixture(chance, flood, (1.0, 5_000, 40_000)),
            strict=True,
        )
    ]
    others = count - flood
    for at, wait in zip(
        _poisson(chance, others, (1 - share) * rate), _mixture(chance, others, (1.0, 2_500, 15_000)), strict=True
    ):
        number = int(chance.integers(20))
        jobs.append(Job(float(at), float(at + wait), "ranker", client=f"client {number}", priority=number % 3))
    return sorted(jobs, key=lambda job: job.arrival_us)


_MAKERS: dict[str, tuple[str, Callable[[Machine, Random, int], list[Job]]]] = {
    "light": ("single rows, Poisson, 20 % of what full batches could do", _poisson_at(0.2)),
    "busy": ("the same at 80 %", _poisson_at(0.8)),
    "overload": ("the same at 150 %", _poisson_at(1.5)),
    "mlp": ("the model mlp, single rows, Poisson, 60 %", _measured),
    "bursts": ("20 ms at 250 %, then 40 ms nothing, and so on", _in_bursts),
    "heavy tails": ("1 to 1,024 rows, Pareto, 85 %", _heavy_tails),
    "mixed": ("a cheap, a middling and a dear model together, 67 %", _mixed_models),
    "urgent": ("105 %; a fifth has 2.5 to 4 ms, the rest 10 to 40 ms", _urgent),
    "clients": ("one client floods at the lowest priority, twenty others on three priorities ask for little", _clients),
}

NAMES = tuple(_MAKERS)


def make(name: str, machine: Machine, count: int, seed: int) -> Trace:
    """The trace of that name, with about `count` jobs; the same for the same arguments."""
    says, maker = _MAKERS[name]
    chance = np.random.default_rng([seed, NAMES.index(name)])
    return Trace(name, says, machine, maker(machine, chance, count))
