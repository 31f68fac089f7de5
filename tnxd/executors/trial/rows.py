"""Independence of rows: whether each request gets the same answer in a batch as alone, found out by running batches.

An axis 0 that may vary need not count independent rows: it may be the points of a cloud, the nodes of a graph, or time.
In such a batch each answer would depend on its neighbours, and nothing in the file tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.state import Ask, blame, seeded
from tnxd.models.model import Model
from tnxd.models.rounding import FLOATING, Difference, difference

_TRIES = 4
_COUNTED = 2
"""Differences of values that count or choose that prove a batch wrong: rounding may decide one near tie."""


def rows_apart(model: Model, ask: Ask, makes: Sequence[Make], allowed: float) -> str:
    """The difference between a request's answer in company and alone, in words; "": there is none.

    Two requests with different values, of one row and of two if the model takes so many, are asked alone, and together
    in both orders: each kind of values among its like, and the first kind beside each other one.

    Args:
        model: one with a batch axis. ask: runs the model, and raises whatever the model raises.
        makes: items, see `Make`, of at least one kind of values.
        allowed: difference that rounding may make, relative to the largest value of an output.
    """
    pairs = [(make, make) for make in makes] + [(makes[0], make) for make in makes[1:]]
    counts = any(spec.datatype not in FLOATING for spec in model.outputs)
    doubts = []
    for attempt in range(_TRIES if counts else 1):
        for one, other in pairs:
            found = _apart(model, ask, *pair_of_requests(model, one, other, attempt), allowed)
            if found is not None:
                doubts.append(found)
                if not found.counted or len(doubts) >= _COUNTED:
                    return found.text
    return ""


def lengths_apart(model: Model, ask: Ask, make: Make) -> str:
    """The sign, in a model of several inputs, that their axes 0 count different things, in words; "": there is none.

    The sign is that the model takes one input longer than the others, and answers otherwise then: tensors with a row
    for each request could not have different lengths.

    Args:
        ask: runs the model without a batch axis.
    """
    short, other, long = make(2, 0), make(2, 1), make(3, 0)
    answer = ask(short)[1]

    def changes(position: int, array: Array) -> bool:
        """Whether another array in place of one input changes the answer."""
        item = tuple(array if place == position else own for place, own in enumerate(short))
        try:
            return difference(model.outputs, answer, ask(item)[1], 0.0) is not None
        except Exception as error:  # as it should, for one that is longer than the others
            blame(error)
            return False

    used = [position for position in range(len(model.inputs)) if changes(position, other[position])]
    for position in used if len(used) > 1 else ():  # one that is not looked at may have any length
        if changes(position, long[position]):
            return f"{model.inputs[position].name!r} may have another length than the other inputs"
    return ""


def pair_of_requests(model: Model, one: Make, other: Make, attempt: int) -> tuple[Item, Item]:
    """Two requests that share a batch: one row, and two if the model takes three in all."""
    return one(1, 2 * attempt), other(2 if model.max_batch_size > 2 else 1, 2 * attempt + 1)


def _apart(model: Model, ask: Ask, first: Item, second: Item, allowed: float) -> Difference | None:
    alone = [seeded(ask, item)[1] for item in (first, second)]
    for items, answers in (((first, second), alone), ((second, first), alone[::-1])):
        together = seeded(ask, tuple(map(np.concatenate, zip(*items, strict=True))))[1]
        rows = [len(items[0][0]), len(items[1][0])]
        for answer, part in zip(answers, _parts(together, rows), strict=True):
            found = difference(model.outputs, answer, part, allowed)
            if found is not None:
                return found
    return None


def _parts(outputs: Sequence[Array], rows: Sequence[int]) -> list[list[Array]]:
    """The share of each of two requests in a batch."""
    return [[output[: rows[0]] for output in outputs], [output[rows[0] :] for output in outputs]]
