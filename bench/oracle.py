"""An upper bound: how many deadlines a scheduler could meet that knows the whole trace beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulation import NOISE
from traces import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_SLOTS = 4096
_STEPS = 400
_STEP = 0.015
_FIRST_BLUR, _LAST_BLUR = 0.1, 0.01
_PATIENCE = 0.25
_FINE_STEPS = 600
_AIM = 0.01
# The search for prices looks at batches of so many 64ths of the largest. The bound that they give counts all sizes.
_COARSE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def upper_bound(trace: Trace) -> float:
    """The share of the jobs that any scheduler can do in time, at most.

    Relaxed: a schedule is a set of batches, of one model, so many rows, on a lane of a device, from a start on. Batches
    may be run in part, and a job in parts, in parts of batches; so may those with more rows than a batch has. What is
    left is a linear program: no more batches at a time than there are lanes, and no more of a job than there is. Any
    prices for the time of each device bound its value (weak duality): what all lanes' time costs, and what each job
    gains that buys its share of the batch that is cheapest for it, if that costs less than 1. The search lowers that
    by subgradients; that it ends before the best prices are found makes the bound weaker, never wrong.

    Costs are those of the tables, which batches have on average: a scheduler may beat the bound by luck alone.
    """
    jobs = len(trace.jobs)
    market = _Market(trace, _some_sizes)
    price = _settled(market)
    if not price.any():
        return 1.0
    price = _sharpened(market, price)
    return min(_Market(trace, _all_sizes).bound(price)[0], jobs) / jobs


def _settled(market: _Market) -> Floats:
    """Prices at which demand about equals supply, if jobs choose a little at random."""
    price = np.zeros(market.shape)
    mean = np.zeros(market.shape)
    square = np.zeros(market.shape)
    best_price, best = price, market.bound(price)[0]
    for step in range(1, _STEPS + 1):
        done = step / _STEPS
        load = market.load(price, _FIRST_BLUR * (_LAST_BLUR / _FIRST_BLUR) ** done)
        slope = np.maximum(1 - load, -1)
        # Adam (Kingma and Ba, 2015), with steps that shrink to nothing.
        mean += 0.1 * (slope - mean)
        square += 0.01 * (slope**2 - square)
        direction = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.99**step)) + 1e-3)
        price = np.maximum(price - _STEP * (1 - done) * direction * market.unit, 0)
        if step % 20 == 0 and (bound := market.bound(price)[0]) < best:
            best_price, best = price, bound
        if done >= _PATIENCE and not best_price.any():
            break  # all can be done, as it seems
    return best_price


def _sharpened(market: _Market, price: Floats) -> Floats:
    """The rest is a matter of single slots: subgradients, with steps to a value a little below (Polyak, 1969)."""
    best_price, best = price, np.inf
    for step in range(_FINE_STEPS):
        value, slope = market.bound(price)
        if value < best:
            best_price, best = price, value
        length = float((slope**2).sum())
        if length == 0:
            break
        aim = best * (1 - _AIM * (1 - step / _FINE_STEPS))
        price = np.maximum(price - (value - aim) / length * slope, 0)
    return best_price


@dataclass(frozen=True)
class _Kind:
    """Batches of one size of one model on one device.

    Attributes:
        device: its row in arrays of prices. slots: how long one takes, in slots of time.
        jobs: those that can be in one. first, last: slots in which it may start with each of them.
        level: of the table of minima, for each.
        shares: of such a batch that each needs; more than one if it has more rows.
        possible: slots in which so many rows are there to start with.
    """

    device: int
    slots: float
    jobs: Ints
    first: Ints
    last: Ints
    level: Ints
    shares: Floats
    possible: Bools


_Sizes = Callable[[int], Iterable[int]]
"""Most rows of a batch -> sizes to look at."""


def _all_sizes(limit: int) -> Iterable[int]:
    return range(1, limit + 1)


def _some_sizes(limit: int) -> Iterable[int]:
    return sorted({max(limit * share // 64, 1) for share in _COARSE})


def _kinds(trace: Trace, slot_us: float, sizes: _Sizes) -> list[_Kind]:
    """All that may be useful. Slots are whole, rounded outwards: nobody has less time than there is."""
    machine, jobs = trace.machine, trace.jobs
    kinds = []
    for model, limit in machine.limits.items():
        mine = np.array([number for number, job in enumerate(jobs) if job.model == model], dtype=np.int64)
        if not len(mine):
            continue
        begin = np.array([jobs[number].arrival_us for number in mine])
        end = np.array([jobs[number].deadline_us for number in mine])
        rows = np.array([jobs[number].rows for number in mine])
        for device, name in enumerate(machine.lanes):
            for size in sizes(limit):
                cost_us = machine.cost_us(name, model, size)
                latest = end - (1 - NOISE) * cost_us
                # A batch holds no more rows than have come and can still wait for its end.
                fits = begin <= latest
                first = np.floor(begin / slot_us).astype(np.int64)
                last = np.minimum(np.floor(np.maximum(latest, 0) / slot_us).astype(np.int64), _SLOTS - 1)
                company = np.zeros(_SLOTS + 1)
                np.add.at(company, first[fits], np.minimum(rows, limit)[fits])
                np.add.at(company, last[fits] + 1, -np.minimum(rows, limit)[fits])
                possible = np.cumsum(company)[:_SLOTS] >= size
                # More rows than fit go in several: full ones, and the rest for nothing.
                fits &= (rows <= size) | (size == limit)
                counts = np.concatenate([[0], np.cumsum(possible)])
                fits[fits] = counts[last[fits] + 1] > counts[first[fits]]
                if not fits.any():
                    continue
                shares = np.where(rows <= size, rows / size, rows // size)
                level = np.floor(np.log2(last[fits] - first[fits] + 1)).astype(np.int64)
                kinds.append(
                    _Kind(
                        device,
                        cost_us / slot_us,
                        mine[fits],
                        first[fits],
                        last[fits],
                        level,
                        shares[fits].astype(np.float64),
                        possible,
                    )
                )
    return kinds


class _Market:
    """Devices sell the time of their lanes, and each job buys its share of a batch.

    Prices are for the time of a lane, an array of devices and slots.
    """

    def __init__(self, trace: Trace, sizes: _Sizes) -> None:
        slot_us = max(job.deadline_us for job in trace.jobs) / _SLOTS * (1 + 1e-9)
        devices = trace.machine.lanes
        self.shape = (len(devices), _SLOTS)
        self._count = len(trace.jobs)
        self._lanes = np.array(list(devices.values()), dtype=np.float64)[:, None]
        self._kinds = _kinds(trace, slot_us, sizes)
        cheapest = [
            min((k.slots * float(np.median(k.shares)) for k in self._kinds if k.device == number), default=1.0)
            for number in range(len(devices))
        ]
        self.unit = 1 / np.array(cheapest)[:, None]

    def bound(self, price: Floats) -> tuple[float, Floats]:
        """No schedule does more jobs than this, the value of the dual at these prices; and about its subgradient."""
        spent = np.concatenate([np.zeros((len(price), 1)), np.cumsum(price, axis=1)], axis=1)
        cheapest = np.full(self._count, np.inf)
        kind_of = np.full(self._count, -1)
        start_of = np.zeros(self._count, dtype=np.int64)
        for number, kind in enumerate(self._kinds):
            costs = np.where(kind.possible, cost_by_start(spent[kind.device], kind.slots), np.inf)
            starts = _cheapest(costs, kind)
            paid = costs[starts] * kind.shares
            better = paid < cheapest[kind.jobs]
            jobs = kind.jobs[better]
            cheapest[jobs], kind_of[jobs], start_of[jobs] = paid[better], number, starts[better]
        value = float(np.maximum(1 - cheapest, 0).sum() + (self._lanes * price).sum())
        slope = np.repeat(self._lanes, _SLOTS, axis=1)
        buys = cheapest < 1
        for number, kind in enumerate(self._kinds):
            buyers = (kind_of[kind.jobs] == number) & buys[kind.jobs]
            if buyers.any():
                started = np.bincount(start_of[kind.jobs[buyers]], kind.shares[buyers], _SLOTS)
                slope[kind.device] -= _busy(started.astype(np.float64), kind.slots)
        return value, np.where((price <= 0) & (slope > 0), 0.0, slope)

    def load(self, price: Floats, blur: float) -> Floats:
        """Demand for each slot over what there is of it, if jobs choose a little at random, the cheaper the likelier.

        Without the blur all would run to the one cheapest slot, and prices would never settle.
        """
        spent = np.concatenate([np.zeros((len(price), 1)), np.cumsum(price, axis=1)], axis=1)
        tastes, weights = [], np.ones(self._count)  # one is that of not to buy
        for kind in self._kinds:
            costs = cost_by_start(spent[kind.device], kind.slots) * float(np.median(kind.shares))
            taste = np.where(kind.possible, np.exp(-np.clip((costs - 1) / blur, -300, 300)), 0.0)
            sums = np.concatenate([[0], np.cumsum(taste)])
            weights[kind.jobs] += np.maximum(sums[kind.last + 1] - sums[kind.first], 0) / (kind.last - kind.first + 1)
            tastes.append(taste)
        load = np.zeros(self.shape)
        for kind, taste in zip(self._kinds, tastes, strict=True):
            wanted = kind.shares / weights[kind.jobs] / (kind.last - kind.first + 1)
            edges = np.bincount(kind.first, wanted, _SLOTS + 1) - np.bincount(kind.last + 1, wanted, _SLOTS + 1)
            load[kind.device] += _busy(np.maximum(np.cumsum(edges)[:_SLOTS], 0) * taste, kind.slots)
        return load / self._lanes


def cost_by_start(spent: Floats, slots: float) -> Floats:
    """The least that a batch of that length costs which starts within each slot, given what all before a slot costs.

    That changes evenly with the start, but where its beginning or end comes to the next slot.
    """
    whole, part = int(slots), slots - int(slots)
    padded = np.concatenate([spent, np.full(whole + 2, spent[-1])])
    ends = padded[whole : whole + len(spent)] * (1 - part) + padded[whole + 1 : whole + 1 + len(spent)] * part
    at_edges = ends - spent
    between = padded[whole + 1 : whole + len(spent)] - (spent[:-1] * part + spent[1:] * (1 - part))
    least: Floats = np.minimum(np.minimum(at_edges[:-1], at_edges[1:]), between)
    return least


def _cheapest(costs: Floats, kind: _Kind) -> Ints:
    """The slot in which each job starts cheapest, by a table of minima over powers of two."""
    at = np.arange(_SLOTS)
    table = [at]
    for level in range(int(kind.level.max())):
        left, right = table[-1], table[-1][np.minimum(at + (1 << level), _SLOTS - 1)]
        table.append(np.where(costs[left] <= costs[right], left, right))
    stacked = np.stack(table)
    left, right = stacked[kind.level, kind.first], stacked[kind.level, kind.last - (1 << kind.level) + 1]
    chosen: Ints = np.where(costs[left] <= costs[right], left, right)
    return chosen


def _busy(started: Floats, slots: float) -> Floats:
    """The number of batches that run in each slot, if they start in the middle of theirs."""
    total = np.concatenate([[0.0], np.cumsum(started)])
    middle = np.arange(_SLOTS) + 0.5
    edges = np.arange(_SLOTS + 1)
    running: Floats = np.interp(middle, edges, total) - np.interp(middle - slots, edges, total, left=0.0)
    return running
