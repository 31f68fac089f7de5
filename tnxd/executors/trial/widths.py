"""Batches run both ways before a version serves, on one core and with the team of a lane: what a wide one gains."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tnxd.executors.execution import Execution
from tnxd.executors.runner import Runner
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.warmup import answer, run_example
from tnxd.models.model import Model
from tnxd.models.process_state.restoration import settings_restored
from tnxd.models.rounding import difference

# Each way is tried so often, by turns, and the best try counts: of three, ResNet-50 gained anything from 1.09 to 1.81.
# It is tried more often where the outcome is close: of five, MiniLM gained 1.10 beside others, and 1.41 by itself.
_TRIES = 5
_MOST_TRIES = 20
_CLOSE = (0.9, 1.3)

# A batch that takes less gains nothing by more threads, and mostly runs on the serving thread.
_LEAST_US = 200.0

# So long all batches of a model may take. The first size is run in any case, once each way at least.
_BUDGET_S = 2.0


_Pair = tuple[Execution, Execution]
"""A batch that was run in two ways: narrow and wide, or by a model and by a variant of it."""


class Widths(NamedTuple):
    """Outcome. Attributes: costs: as in `LoadReport.widths`. apart: how answers of a wide batch differ, in words."""

    costs: tuple[tuple[int, float, float], ...] = ()
    apart: str = ""


def measure_widths(
    call: Callable[[Callable[[Runner], _Pair]], _Pair],
    model: Model,
    make: Make,
    costs: Sequence[tuple[int, float]],
    threads: int,
    allowed: float | None,
) -> Widths:
    """Run batches narrow and wide on a lane that has a team, the only thread that may have one, between its batches.

    Args:
        call: has that lane call a function with its runner, which has the model. make: makes inputs that it takes.
        costs: (rows, microseconds) on one core, as far as known: what would take too long is left out.
        threads: of the team.
        allowed: difference that rounding may make, relative to the largest value of an output; None: any.

    Raises:
        TensorNextError: a batch failed.
    """
    until = time.perf_counter() + _BUDGET_S
    measured: list[tuple[int, float, float]] = []
    for rows, micros in costs:
        if micros < _LEAST_US:
            continue
        if measured and time.perf_counter() + 2 * _TRIES * micros / 1e6 > until:
            break
        tries: list[_Pair] = []
        while len(tries) < _TRIES or (len(tries) < _MOST_TRIES and _CLOSE[0] < _gain(tries) < _CLOSE[1]):
            tries.append(call(partial(_run_both, model, make(rows, 0), threads)))
            if len(tries) == 1 and allowed is not None:
                narrow, wide = map(answer, tries[0])
                apart = difference(model.outputs, narrow, wide, allowed)
                if apart is not None and not apart.counted:
                    return Widths(apart=apart.text)
            if time.perf_counter() > until:
                break
        measured.append((rows, *_best(tries)))
    return Widths(tuple(measured))


def _best(tries: Sequence[_Pair]) -> tuple[float, float]:
    """Microseconds of the best try in each way."""
    one, other = zip(*tries, strict=True)
    return min(run.run_us for run in one), min(run.run_us for run in other)


def _gain(tries: Sequence[_Pair]) -> float:
    narrow_us, wide_us = _best(tries)
    return narrow_us / wide_us


def _run_both(model: Model, item: Item, threads: int, runner: Runner) -> _Pair:
    with settings_restored("a forward"):
        wide = run_example(runner, model, item, threads)
        return run_example(runner, model, item), wide  # narrow at last: it leaves the thread as it was


def race(
    call: Callable[[Callable[[Runner], _Pair]], _Pair], model: Model, variant: Call, item: Item, threads: int
) -> tuple[float, float]:
    """The least times of a model's batch and of a variant's, by turns on a lane that has a team, between its batches.

    Args:
        call, threads: as for `measure_widths`. variant: a call that takes the model's inputs, and answers alike.

    Returns:
        Seconds of the model with the team, and of the variant.

    Raises:
        TensorNextError: a batch failed.
    """
    until = time.perf_counter() + _BUDGET_S
    tries: list[_Pair] = []
    while not tries or (len(tries) < _TRIES and time.perf_counter() < until):
        tries.append(call(partial(_run_rivals, model, variant, item, threads)))
    module_us, variant_us = _best(tries)
    return module_us / 1e6, variant_us / 1e6


def _run_rivals(model: Model, variant: Call, item: Item, threads: int, runner: Runner) -> _Pair:
    rival = replace(model, generation=-1 - model.generation)  # a key that no other has
    runner.calls[rival.key] = variant
    try:
        with settings_restored("a forward"):
            pair = run_example(runner, model, item, threads), run_example(runner, rival, item, threads)
            run_example(runner, model, item)  # narrow: it leaves the thread as it was
            return pair
    finally:
        del runner.calls[rival.key]


def wide_costs(
    costs: Sequence[tuple[int, float]], widths: Sequence[tuple[int, float, float]]
) -> list[tuple[int, float]]:
    """(rows, microseconds) of wide batches of all sizes: as measured, beyond that with the gain of the largest."""
    measured = {rows: wide_us for rows, _, wide_us in widths}
    share = widths[-1][2] / widths[-1][1] if widths else 1.0
    return [(rows, measured.get(rows, share * micros)) for rows, micros in costs]
