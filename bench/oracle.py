"""How many deadlines could be met by a scheduler that knows the whole trace beforehand: an upper bound."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from simulation import NOISE
from traces import Trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_SLOTS = 4096
_STEPS = 400
_STEP = 0.03
_FINE_STEPS = 300
_AIM = 0.005
_FIRST_BLUR, _LAST_BLUR = 0.1, 0.003


def least_work_us(trace: Trace, device: str) -> Floats:
    """Device time that each job takes at least, if it is to be in time: its rows in the best batch it could be in.

    A batch of n rows with the job in it starts after the job arrived and ends by its deadline. So it takes no longer
    than the job has, and no other rows can be in it than those of the same model whose own times allow that. Infinite
    for a job that the device cannot do in time even alone.
    """
    jobs, machine = trace.jobs, trace.machine
    luck = 1 - NOISE
    work = np.full(len(jobs), np.inf)
    for model, limit in machine.limits.items():
        mine = np.array([number for number, job in enumerate(jobs) if job.model == model], dtype=np.int64)
        if not len(mine):
            continue
        rows = np.array([jobs[number].rows for number in mine])
        begin = np.array([jobs[number].arrival_us for number in mine])
        end = np.array([jobs[number].deadline_us for number in mine])
        alone = np.array([machine.cost_us(device, model, int(size)) for size in rows])
        best = np.where(begin + luck * alone <= end, alone, np.inf)
        arrived, ended = _RowsUntil(begin, rows), _RowsUntil(end, rows)
        for size in range(1, limit + 1):
            cost = machine.cost_us(device, model, size)
            latest_start, earliest_end = end - luck * cost, begin + luck * cost
            # All that have arrived by the latest start, less those that were over by then and by the earliest end.
            company = arrived.until(latest_start) - ended.before(np.minimum(latest_start, earliest_end))
            fits = (begin <= latest_start) & (rows <= size) & (size <= company)
            best = np.where(fits, np.minimum(best, rows * (cost / size)), best)
        work[mine] = best
    return work


class _RowsUntil:
    """How many rows have their time by then."""

    def __init__(self, times: Floats, rows: Ints) -> None:
        order = np.argsort(times)
        self._times = times[order]
        self._sums = np.concatenate([[0], np.cumsum(rows[order])])

    def until(self, time: Floats) -> Ints:
        sums: Ints = self._sums[np.searchsorted(self._times, time, side="right")]
        return sums

    def before(self, time: Floats) -> Ints:
        sums: Ints = self._sums[np.searchsorted(self._times, time, side="left")]
        return sums


def upper_bound(trace: Trace) -> float:
    """The share of the jobs that any scheduler can do in time, at most.

    Relaxed: batches always come at their best price (`least_work_us`), a job may be cut up, run in parts, in parallel
    and on several devices at a time, and counts in proportion. What is left is a linear program: the work of each job
    within its own time, and no more work in a slot of time than the lanes can do. Any prices for the slots bound its
    value (weak duality): what all slots cost, and what each job gains that buys its work where it is cheapest. Prices
    rise where there is too much demand and fall where there is too little; the best bound met on the way counts, so
    that a search that ends early makes the bound weaker, never wrong. It ends within a per cent of the exact value.

    Costs are those of the tables, which batches have on average: a scheduler may beat the bound by luck alone.
    """
    market = _Market(trace)
    price, best = _settled(market)
    # The rest is a matter of single slots: subgradients, with steps towards a value a little below the best (Polyak).
    for step in range(_FINE_STEPS):
        value, slope = market.bound(price)
        best = min(best, value)
        length = float((slope**2).sum())
        if length == 0:
            break
        aim = best * (1 - _AIM * (1 - step / _FINE_STEPS))
        price = np.maximum(price - (value - aim) / length * slope, 0)
    return best / len(trace.jobs)


def _settled(market: _Market) -> tuple[Floats, float]:
    """Prices at which demand about equals supply, and the bound that they give."""
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
        price = np.maximum(price - _STEP * (1 - done) * direction, 0)
        if step % 10 == 0 and (bound := market.bound(price)[0]) < best:
            best_price, best = price, bound
    return best_price, best


class _Market:
    """Devices sell the slots of their time, and each job buys its work if that costs less than 1.

    Prices are for the work of a typical job on that device, an array of devices and slots.
    """

    def __init__(self, trace: Trace) -> None:
        begin = np.array([job.arrival_us for job in trace.jobs])
        end = np.array([job.deadline_us for job in trace.jobs])
        slot_us = float(end.max()) / _SLOTS
        devices = trace.machine.lanes
        self.shape = (len(devices), _SLOTS)
        # Whole slots, rounded outwards: nobody has less time than there is.
        self._first = np.floor(begin / slot_us).astype(np.int64)
        self._last = np.minimum(np.ceil(end / slot_us).astype(np.int64) - 1, _SLOTS - 1)
        self._slots = self._last - self._first + 1
        self._windows = _Windows(self._first, self._last)
        self._lanes = np.array(list(devices.values()), dtype=np.float64)[:, None]
        work = np.array([least_work_us(trace, device) for device in devices]) / slot_us
        self._possible = np.isfinite(work)
        self._work = np.where(self._possible, work, 1.0)
        typical = [np.median(w[p]) if p.any() else 1.0 for w, p in zip(self._work, self._possible, strict=True)]
        self._typical = np.array(typical)[:, None]

    def bound(self, price: Floats) -> tuple[float, Floats]:
        """No schedule does more jobs than this, the value of the dual at these prices; and its subgradient there."""
        cheapest = np.array([self._windows.cheapest(row) for row in price])
        costs = self._costs(np.take_along_axis(price, cheapest, axis=1))
        where, gains = costs.argmin(axis=0), 1 - costs.min(axis=0)
        slope = np.repeat(self._lanes, _SLOTS, axis=1)
        for device, (slots, work) in enumerate(zip(cheapest, self._work, strict=True)):
            buys = (where == device) & (gains > 0)
            slope[device] -= np.bincount(slots[buys], work[buys], _SLOTS)
        slope = np.where((price <= 0) & (slope > 0), 0.0, slope / self._typical)
        return float(np.maximum(gains, 0).sum() + (self._lanes * price / self._typical).sum()), slope

    def load(self, price: Floats, blur: float) -> Floats:
        """Demand for each slot over what there is of it, if jobs choose a little at random, the cheaper the likelier.

        Without the blur all would run to the one cheapest slot, and prices would never settle.
        """
        taste = np.exp(-np.minimum(price / blur, 600.0))
        sums = np.concatenate([np.zeros((len(price), 1)), np.cumsum(taste, axis=1)], axis=1)
        average = np.maximum((sums[:, self._last + 1] - sums[:, self._first]) / self._slots, 1e-250)
        choices = np.concatenate([self._costs(-blur * np.log(average)), np.ones((1, len(self._first)))])
        weights = np.exp(-(choices - choices.min(axis=0)) / blur)
        demand = weights[:-1] / weights.sum(axis=0) * self._work / (average * self._slots)
        edges = np.zeros((len(price), _SLOTS + 1))
        for row, amounts in zip(edges, demand, strict=True):
            row += np.bincount(self._first, amounts, _SLOTS + 1) - np.bincount(self._last + 1, amounts, _SLOTS + 1)
        load: Floats = np.maximum(np.cumsum(edges, axis=1)[:, :-1], 0) * taste / self._lanes
        return load

    def _costs(self, prices: Floats) -> Floats:
        costs: Floats = np.where(self._possible, prices * self._work / self._typical, np.inf)
        return costs


class _Windows:
    """The cheapest slot of each of many windows, by a table of minima over powers of two."""

    def __init__(self, first: Ints, last: Ints) -> None:
        self._first = first
        self._level = np.floor(np.log2(last - first + 1)).astype(np.int64)
        self._second = last - (1 << self._level) + 1

    def cheapest(self, price: Floats) -> Ints:
        """Where each window has its lowest price."""
        at = np.arange(len(price))
        table = [at]
        for level in range(int(self._level.max())):
            left, right = table[-1], table[-1][np.minimum(at + (1 << level), len(price) - 1)]
            table.append(np.where(price[left] <= price[right], left, right))
        stacked = np.stack(table)
        left, right = stacked[self._level, self._first], stacked[self._level, self._second]
        chosen: Ints = np.where(price[left] <= price[right], left, right)
        return chosen
