"""Warm-up: batches of growing size before a version serves. They show the cost of batches, and their largest size."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import TensorNextError, Unavailable
from tnxctl.protocol.wire import MIB, TensorSpec
from tnxd.events import event
from tnxd.executors.execution import Execution
from tnxd.executors.runner import Runner
from tnxd.executors.trial.examples import Item, Make
from tnxd.lanes import INLINE
from tnxd.models.model import Model
from tnxd.models.rounding import difference

log = logging.getLogger(__name__)


# A batch that takes longer than this is run once for warm-up, a shorter one three times: its second run may differ.
_LONG_US = 200_000.0
_ROUNDS = 3

# A batch may take this share of the free memory, divided by the lanes, which may all run one: else larger ones are not
# tried. Other models and the requests themselves need memory, too.
MEMORY_SHARE = 0.25

# So long the rows of a batch are looked at one by one.
_LOOKED_AT_S = 0.03

# Less is noise: of what other threads do, and of what the C library takes at a time.
SHOWS_FROM = 16 * MIB


class Warmed(NamedTuple):
    """Outcome of a warm-up.

    Attributes:
        costs, safe_rows, most_rows: as in `tnxd.executors.execution.LoadReport`.
        mixes: the difference between a row's answer in a batch and alone, in words; "": there was none.
        padded: as in `LoadReport`.
    """

    costs: list[tuple[int, float]]
    safe_rows: int = 0
    most_rows: int = 0
    mixes: str = ""
    padded: Sequence[tuple[int, int, float]] = ()


def warm_up(runner: Runner, model: Model, make: Make, lanes: int, allowed: float | None) -> Warmed:
    """Run batches of growing size on the calling thread, and compare some of their rows with the same rows alone.

    Args:
        runner: of this thread; it has the model. make: makes inputs that the model takes. lanes: of the device.
        allowed: difference that rounding may make, relative to the largest value of an output; None: any.

    Raises:
        TensorNextError: a batch failed.
    """
    costs: list[tuple[int, float]] = []
    row_bytes = 0.0
    for rows in warm_up_sizes(model.max_batch_size) if model.warm_up is None else model.warm_up:
        left = runner.memory_left() * MEMORY_SHARE / lanes
        if costs and left and row_bytes * rows > left:
            log.warning(
                "%s on %s: a batch of %d rows would take %.0f MiB, and may take %.0f: at most %d rows",
                *(model.key, runner.device, rows, row_bytes * rows / MIB, left / MIB, costs[-1][0]),
                extra=event("batches_limited", model.key, device=runner.device, rows=costs[-1][0]),
            )
            return Warmed(costs, most_rows=costs[-1][0])
        with runner.measured() as peak:
            execution = run_example(runner, model, make(rows, 0))
        row_bytes = peak.nbytes / rows if peak.nbytes > SHOWS_FROM else 0.0
        for _ in range(_ROUNDS - 1):
            if execution.exhausted or execution.run_us > _LONG_US:
                break
            execution = run_example(runner, model, make(rows, 0))
        if execution.exhausted:  # it ran in pieces
            return Warmed(costs, safe_rows=max(execution.safe_rows, 1))
        costs.append((rows, execution.run_us))
        if rows > 1 and model.max_batch_size and allowed is not None:
            apart = unlike_alone(runner, model, make(rows, 0), answer(execution), allowed)
            if apart:
                return Warmed(costs, mixes=f"alone and in a batch of {rows}, {apart}")
    return Warmed(costs)


def unlike_alone(runner: Runner, model: Model, item: Item, together: Sequence[Array], allowed: float) -> str:
    """The difference between a row's answer in a batch and alone, in words; "": none was found.

    The first and the last row are compared, and others in between for a while: an expert of limited capacity turns down
    the rows that come last, another mistake may begin anywhere.
    """
    rows = len(item[0])
    began = time.perf_counter()
    for row in dict.fromkeys((0, rows - 1, *range(rows // 2, rows), *range(rows // 2))):
        alone = answer(run_example(runner, model, tuple([array[row : row + 1] for array in item])))
        apart = difference(model.outputs, alone, [output[row : row + 1] for output in together], allowed)
        if apart is not None and not apart.counted:
            return apart.text
        if row and time.perf_counter() - began > _LOOKED_AT_S:
            break
    return ""


def answer(execution: Execution) -> Sequence[Array]:
    """Outputs of the only request of an execution that went well."""
    outputs = execution.outcomes[0]
    assert not isinstance(outputs, TensorNextError)
    return outputs


def run_example(runner: Runner, model: Model, item: Item, threads: int = 1) -> Execution:
    """Run one request on the calling thread, with a team of so many. Raises TensorNextError: the request failed."""
    specs = [TensorSpec(spec.name, spec.datatype, array.shape) for spec, array in zip(model.inputs, item, strict=True)]
    bound = model.bind(specs, item)
    execution = Execution(INLINE, 0, model, [bound.arrays], [bound.rows], bound.group, threads)
    runner.run(execution)
    if execution.fatal:
        raise Unavailable(execution.fatal)
    outcome = execution.outcomes[0]
    if isinstance(outcome, TensorNextError):
        raise outcome
    return execution


def warm_up_sizes(max_batch_size: int) -> Sequence[int]:
    """1, 2, 4, ... up to and with the limit: one batch size for every bucket of the cost model."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    return sizes if max_batch_size <= 1 else [*sizes, max_batch_size]
