"""Requests of different lengths in one batch: the proof that padding changes no answer, and the cost of batches.

A model that looks at what fills a shorter row up, such as a mean over all places without a mask or a recurrent network
that is not told where a row ends, answers otherwise in company than alone. It is found out when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, ResourceExhausted, TensorNextError
from tnxd.executors.execution import Execution
from tnxd.executors.padding import units
from tnxd.executors.runner import Runner
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.warmup import MEMORY_SHARE, SHOWS_FROM, Warmed, answer, run_example, unlike_alone
from tnxd.lanes import INLINE
from tnxd.models.model import Model
from tnxd.models.rounding import difference

_STRICTER = 0.05
"""Times what rounding may change between batches: 1e-5 in float32. Padding that is masked changes 1e-7."""

_PROOF_LENGTH = 4
"""Shortest row, if the model takes such, that the proof pads to twice its length."""

_KINDS = 4
"""Examples that a long row is put together from: all places alike would hide what depends on places."""

_ROWS = (1, 4, 16)
_LONGEST_US = 150_000.0
_LONGEST_ALONE_US = 1_000_000.0
"""Batches that are expected to take longer are not run for the warm-up, and neither are single rows; only a row of the
largest length is, however long it takes: it has to be possible."""

_ROUNDS = 3
_SHORT_US = 40_000.0
"""A batch that takes longer than this is run once, a shorter one three times, of which the shortest counts."""

_USUAL_LENGTH = 32
"""Tokens of a row in the batches that a packed model is warmed up with."""


def row_of_length(model: Model, make: Make, rows: int, length: int, variant: int = 0) -> Item:
    """An example whose ragged axes have that length, and whose mask says that all of it is there."""
    assert model.ragged is not None
    made = [make(rows, _KINDS * variant + kind) for kind in range(_KINDS)]
    item: list[Array] = []
    for position, axis in enumerate(model.ragged.axes):
        parts = [one[position] for one in made]
        if not axis:
            item.append(parts[0])
            continue
        joined = np.concatenate(parts, axis)
        if not joined.shape[axis]:
            shape = list(joined.shape)
            shape[axis] = 1
            joined = np.zeros(shape, joined.dtype)
        row = np.ascontiguousarray(np.take(joined, range(length), axis, mode="wrap"))
        item.append(np.ones_like(row) if position == model.ragged.mask else row)
    return tuple(item)


def padding_apart(runner: Runner, model: Model, make: Make, tolerance: float) -> str:
    """The difference between a row's answer alone and beside longer ones, in words; "": there is none.

    Args:
        runner: of this thread; it has the model.
        tolerance: difference that rounding may make between batches, relative to the largest value of an output.
    """
    assert model.ragged is not None
    most = model.ragged.max_length
    length = min(max(_PROOF_LENGTH, max(_lengths(model, make), default=1)), most // 2)
    if not length:
        return ""
    row, longer, shorter = (
        row_of_length(model, make, 1, each, variant)
        for variant, each in enumerate((length, 2 * length, -(-length // 2)))
    )
    alone = {}
    for name, item in (("row", row), ("shorter", shorter)):
        found = _answers(runner, model, [item])
        if isinstance(found, str):
            return found
        alone[name] = found[0]
    for items, places in (([longer, row, shorter], {"row": 1, "shorter": 2}), ([row, longer], {"row": 0})):
        together = _answers(runner, model, items)
        if isinstance(together, str):
            return together
        for name, place in places.items():
            apart = difference(model.outputs, alone[name], together[place], _STRICTER * tolerance)
            if apart is not None:
                return apart.text
    return ""


def _lengths(model: Model, make: Make) -> Iterator[int]:
    assert model.ragged is not None
    for array, axis in zip(make(1, 0), model.ragged.axes, strict=True):
        if axis:
            yield array.shape[axis]


def _answers(runner: Runner, model: Model, items: list[Item]) -> list[tuple[Array, ...]] | str:
    """Answers to requests of one row in one batch; a complaint where there is none."""
    execution = Execution(INLINE, 0, model, items, [1] * len(items), _group(model, items[0]))
    runner.run(execution)
    answers = []
    for outcome in execution.outcomes:
        if isinstance(outcome, TensorNextError):
            return f"it fails: {outcome.message}"
        answers.append(outcome)
    return answers


def _group(model: Model, item: Item) -> tuple[int, ...]:
    assert model.ragged is not None
    return model.ragged.group(model.inputs, item, 1)


def warm_up_lengths(runner: Runner, model: Model, make: Make, lanes: int, allowed: float | None) -> Warmed:
    """Run batches of some rows and lengths on the calling thread: `warm_up` of a model whose lengths share batches.

    What they cost is told by tokens, and where they are padded by rows and length, too.

    Args:
        runner: of this thread; it has the model. lanes: of the device.
        allowed: difference that rounding may make, relative to the largest value of an output; None: any.

    Raises:
        FailedPrecondition: a row of a length that model.toml allows fails.
    """
    assert model.ragged is not None
    costs: list[tuple[int, float]] = []
    padded: list[tuple[int, int, float]] = []
    most_units = safe = 0
    token_bytes = 0.0
    known: dict[int, float] = {}
    for rows, length in _sizes(model):
        tokens = rows * length
        smaller = [(tokens / size) * micros for size, micros in known.items() if size <= tokens]
        longest_us = _LONGEST_US if rows > 1 else _LONGEST_ALONE_US
        required = rows == 1 and length == model.ragged.max_length
        if not required and (min(smaller, default=0.0) > longest_us or (most_units and tokens > most_units)):
            continue
        left = runner.memory_left() * MEMORY_SHARE / lanes
        if costs and left and token_bytes * tokens > left:
            most_units = max(size for size, _ in costs)
            continue
        item = row_of_length(model, make, rows, length)
        try:
            with runner.measured() as peak:
                execution = run_example(runner, model, item)
            micros = execution.run_us
            for _ in range(_ROUNDS - 1):
                if micros > _SHORT_US:
                    break
                execution = run_example(runner, model, item)
                micros = min(micros, execution.run_us)
            if execution.exhausted:  # it ran in pieces
                safe = max(execution.safe_rows, 1)
                break
        except ResourceExhausted:
            safe = max((size for size, _ in costs), default=1)
            break
        except TensorNextError as error:
            raise FailedPrecondition(
                f"{model.name}/model.toml: ragged.max_length: {model.ragged.max_length}, but "
                f"{rows} row{'s' * (rows > 1)} of length {length}: {error.message}"
            ) from None
        if peak.nbytes > SHOWS_FROM:
            token_bytes = peak.nbytes / tokens
        if rows > 1 and length == min(_PROOF_LENGTH, model.ragged.max_length) and allowed is not None:
            apart = unlike_alone(runner, model, item, answer(execution), allowed)
            if apart:
                return Warmed(costs, mixes=f"alone and in a batch of {rows}, {apart}")
        known[tokens] = micros
        costs.append((units(model, [item], rows), micros))
        padded.append((rows, length, micros))
    return Warmed(costs, safe_rows=safe, most_rows=most_units, padded=padded)


def _sizes(model: Model) -> Iterator[tuple[int, int]]:
    """Rows and lengths of the batches to run, by growing number of tokens for each number of rows."""
    ragged = model.ragged
    assert ragged is not None
    lengths = [1 << power for power in range(ragged.max_length.bit_length())]
    if lengths[-1] != ragged.max_length:
        lengths.append(ragged.max_length)
    if not ragged.packed:
        for rows in _ROWS:
            if rows <= model.max_batch_size:
                yield from ((rows, length) for length in lengths if rows * length <= ragged.max_tokens)
        return
    yield from ((1, length) for length in lengths)
    length = min(_USUAL_LENGTH, ragged.max_length)
    rows = 2
    while rows * length <= ragged.max_tokens and rows <= model.max_batch_size:
        yield rows, length
        rows *= 2
