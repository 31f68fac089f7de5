"""Input binding: the inputs of requests, from frames to arrays that fit a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.wire import BYTES, Limits, TensorSpec
from tnxd.models.model import BoundInputs, Model

if TYPE_CHECKING:
    from typing_extensions import Buffer


_LOOKED_INTO = frozenset({"BOOL", BYTES})
"""Datatypes whose frames may hold what is no value of them: all of it has to be looked at, every time.

An array of objects over a frame would even take its bytes for pointers.
"""


class _Layout(msgspec.Struct, frozen=True, gc=False):
    """The layout of inputs that a header announces.

    Attributes:
        model, specs: for whom, and what was announced.
        tensors: in the signature's order, which frame is one, its shape, datatype and length in bytes.
        others: of inputs that did not come, the place in the signature, and what stands there.
        rows, group, nbytes, units, length: as in `BoundInputs`.
    """

    model: Model
    specs: tuple[TensorSpec, ...]
    tensors: list[tuple[int, tuple[int, ...], np.dtype[Any], int]]
    others: list[tuple[int, Array | None]]
    rows: int
    group: tuple[int, ...]
    nbytes: int
    units: int
    length: int


class InputBinder:
    """Turns the inputs of requests for one model into arrays.

    The layout of the last request is kept: most requests announce what the one before them did, and then the lengths of
    the frames are all that is left to check. That takes a third of the time.
    """

    __slots__ = ("_layout",)

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def bind(
        self, model: Model, specs: tuple[TensorSpec, ...], frames: Sequence[Buffer], limits: Limits
    ) -> BoundInputs:
        """Arrays that fit the signature, without a copy. Raises as `view_tensors` and `Model.bind` do."""
        layout = self._layout
        if layout is not None and specs == layout.specs and model is layout.model and len(frames) == len(specs):
            arrays: list[Array | None] = []
            for position, shape, dtype, nbytes in layout.tensors:
                frame: Any = frames[position]  # bytes, or what ZeroMQ calls a frame
                if len(frame) != nbytes:
                    break
                arrays.append(np.ndarray(shape, dtype, frame))
            else:
                if layout.others:
                    for place, array in layout.others:
                        # A copy: the model may write to what it gets.
                        arrays.insert(place, None if array is None else array.copy())
                return BoundInputs(tuple(arrays), layout.rows, layout.group, layout.nbytes, layout.units, layout.length)
        views = view_tensors(specs, frames, limits)
        bound = model.bind(specs, views)
        looked_at = model.ragged is not None and model.ragged.packed  # the mask, which has another sum in each request
        if not looked_at and not any(spec.datatype in _LOOKED_INTO for spec in specs):
            positions = {id(array): position for position, array in enumerate(views)}
            tensors = [
                (positions[id(array)], array.shape, array.dtype, array.nbytes)
                for array in bound.arrays
                if array is not None and id(array) in positions
            ]
            others = [
                (place, None if array is None else array.copy())
                for place, array in enumerate(bound.arrays)
                if id(array) not in positions
            ]
            self._layout = _Layout(
                model, specs, tensors, others, bound.rows, bound.group, bound.nbytes, bound.units, bound.length
            )
        return bound
