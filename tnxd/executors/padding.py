"""Batches of requests of different lengths: padded or packed on the way in, cut back on the way out. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import Internal
from tnxd.executors.batching import Staging, split
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


def pad(staging: Staging, model: Model, group: tuple[int, ...], items: Sequence[Item], rows: int) -> list[Array | None]:
    """Copy the inputs of every item below each other, padded to the longest.

    Args:
        group: lengths of the variable axes that are not ragged. rows: of all items.

    Returns:
        As `Staging.gather`.
    """
    assert model.ragged is not None
    longest = max(lengths(model, items))
    gathered: list[Array | None] = []
    for position, (spec, axis, value) in enumerate(
        zip(model.inputs, model.ragged.axes, model.ragged.pads, strict=True)
    ):
        first = items[0][position]
        if first is None:
            gathered.append(None)
            continue
        parts: list[Array] = [item[position] for item in items]  # type: ignore[misc]
        shape = [rows, *first.shape[1:]]
        if axis:
            shape[axis] = longest
        room = staging.room(model.key, group, position, tuple(shape), STORAGE[spec.datatype])
        if not axis or all(part.shape[axis] == longest for part in parts):
            np.concatenate(parts, out=room)
        else:
            room.fill(stored_pad(value, spec.datatype))
            at = 0
            for part in parts:
                room[(slice(at, at + len(part)), *map(slice, part.shape[1:]))] = part
                at += len(part)
        gathered.append(room)
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
