"""Batches of requests of different lengths: padded or packed on the way in, cut back on the way out. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import Internal
from tnxd.executors.batching import split
from tnxd.models.model import Item, Model
from tnxd.models.ragged import stored_pad


def lengths(model: Model, items: Sequence[Item]) -> list[int]:
    """Length of the ragged axes of each request."""
    assert model.ragged is not None
    for position, axis in enumerate(model.ragged.axes):
        if axis and items[0][position] is not None:
            return [item[position].shape[axis] for item in items]  # type: ignore[union-attr]
    return [0] * len(items)  # those inputs may be left out, and were


def units(model: Model, items: Sequence[Item], rows: int) -> int:
    """Units of a forward, as scheduling counts them: see `tnxd.models.model.BoundInputs`. Args: rows: of all items."""
    ragged = model.ragged
    if ragged is None or not ragged.joins:
        return rows
    if ragged.packed:
        return sum([int(ragged.lengths(item, model.name).sum()) for item in items])
    return rows * max([*lengths(model, items), 1])


Room = Callable[[int, tuple[int, ...], np.dtype[Any]], Array]
"""Maker of an array for the input at a position, given its shape and dtype."""


def padded_shapes(model: Model, items: Sequence[Item], rows: int) -> list[tuple[int, ...] | None]:
    """Shapes of the inputs of every item below each other, padded to the longest; None for one that did not come."""
    assert model.ragged is not None
    longest = max(lengths(model, items))
    shapes: list[tuple[int, ...] | None] = []
    for first, axis in zip(items[0], model.ragged.axes, strict=True):
        if first is None:
            shapes.append(None)
        elif axis:
            shapes.append((rows, *first.shape[1:axis], longest, *first.shape[axis + 1 :]))
        else:
            shapes.append((rows, *first.shape[1:]))
    return shapes


def pad(
    room: Room, model: Model, items: Sequence[Item], shapes: Sequence[tuple[int, ...] | None]
) -> list[Array | None]:
    """Copy the inputs of every item below each other, padded to the longest.

    Args:
        room: makes the arrays. shapes: as `padded_shapes` tells them.

    Returns:
        One array per input, in the memory that `room` made; None for an input that did not come.
    """
    assert model.ragged is not None
    gathered: list[Array | None] = []
    for position, (shape, spec, axis, value) in enumerate(
        zip(shapes, model.inputs, model.ragged.axes, model.ragged.pads, strict=True)
    ):
        if shape is None:
            gathered.append(None)
            continue
        parts: list[Array] = [item[position] for item in items]  # type: ignore[misc]
        into = room(position, shape, STORAGE[spec.datatype])
        if not axis or all(part.shape[axis] == shape[axis] for part in parts):
            np.concatenate(parts, out=into)
        else:
            into.fill(stored_pad(value, spec.datatype))
            at = 0
            for part in parts:
                into[(slice(at, at + len(part)), *map(slice, part.shape[1:]))] = part
                at += len(part)
        gathered.append(into)
    return gathered


def split_ragged(
    model: Model, outputs: Sequence[Array], items: Sequence[Item], rows: Sequence[int]
) -> list[tuple[Array, ...]]:
    """Split each output into one array per request, cut back to its length where model.toml says so.

    Raises:
        Internal: an output that is to be cut back is not as long as the longest request.
    """
    ragged = model.ragged
    assert ragged is not None
    if not any(ragged.cuts):
        return split(outputs, rows)
    own = lengths(model, items)
    longest = max(own)
    for spec, output, axis in zip(model.outputs, outputs, ragged.cuts, strict=True):
        if axis and output.shape[axis] != longest:
            raise Internal(
                f"model {model.name!r}: output {spec.name!r} is {output.shape[axis]} long along axis {axis}, the "
                f"inputs are {longest}: it cannot be cut back (ragged.outputs)"
            )
    bounds = pairwise(accumulate(rows, initial=0))
    return [
        tuple(
            [
                np.ascontiguousarray(output[(slice(*bound), *[slice(None)] * (axis - 1), slice(length))])
                if axis
                else output[slice(*bound)]
                for output, axis in zip(outputs, ragged.cuts, strict=True)
            ]
        )
        for bound, length in zip(bounds, own, strict=True)
    ]
