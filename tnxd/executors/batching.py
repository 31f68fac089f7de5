"""Gathering the rows of a batch in reused buffers, and splitting its outputs. numpy only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.wire import BYTES, MIB, TensorSpec

Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Array]


class Staging:
    """Staging buffers of one lane: one set per model and shape group, kept for the next batch.

    Args:
        allocate: makes an aligned (for CUDA: pinned) array of a shape and dtype.
        max_bytes: most bytes of all sets that are kept. The least recently used set goes when room is needed: sequence
            models bring a new shape group with every length, so the number of models does not bound that of sets.
    """

    def __init__(self, allocate: Allocate, max_bytes: int = 256 * MIB) -> None:
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._sets: dict[tuple[str, tuple[int, ...]], list[Array | None]] = {}
        self._nbytes = 0

    def gather(
        self,
        model: str,
        specs: Sequence[TensorSpec],
        group: tuple[int, ...],
        items: Sequence[Sequence[Array | None]],
        rows: int,
    ) -> list[Array | None]:
        """Copy the inputs of every item below each other.

        Args:
            model: key of the model. specs: its inputs. group: lengths of their variable axes.
            items: the arrays of each request in the order of `specs`, each `[rows_i, ...]`; None in all requests for an
                input that did not come.
            rows: sum of all rows_i.

        Returns:
            One array `[rows, ...]` per input, with the datatype as it is stored on the wire; None for an input that did
            not come. The arrays are views of buffers that the next gather of this lane writes again.
        """
        buffers = self._buffers(model, specs, group, items[0], rows)
        if len(items) == 1:
            for buffer, array in zip(buffers, items[0], strict=True):
                if buffer is not None:
                    buffer[:rows] = array
        else:
            for position, buffer in enumerate(buffers):
                if buffer is not None:
                    np.concatenate([item[position] for item in items], out=buffer[:rows])  # type: ignore[misc]
        return [None if buffer is None else buffer[:rows] for buffer in buffers]

    def room(
        self, model: str, group: tuple[int, ...], position: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Array:
        """A buffer of any shape for one input, kept for the next batch whatever shape that has.

        Args:
            model: key of the model. group: lengths of its variable axes that do not differ within a batch.
            position: of the input.
        """
        key = (f"{model}\0{position}", group)
        size = math.prod(shape)
        kept = self._sets.pop(key, None)
        if kept is not None:
            self._nbytes -= _nbytes(kept)
        if kept is None or _capacity(kept) < size:
            kept = [self._allocate((1 << max(size - 1, 0).bit_length(),), dtype)]
        self._keep(key, kept)
        assert kept[0] is not None
        return kept[0][:size].reshape(shape)

    def forget(self, model: str) -> None:
        """Free the buffers of a model. Args: model: its key."""
        for key in [key for key in self._sets if key[0].partition("\0")[0] == model]:
            self._nbytes -= _nbytes(self._sets.pop(key))

    def _buffers(
        self,
        model: str,
        specs: Sequence[TensorSpec],
        group: tuple[int, ...],
        example: Sequence[Array | None],
        rows: int,
    ) -> list[Array | None]:
        key = (model, group)
        buffers = self._sets.pop(key, None)
        if buffers is not None:
            self._nbytes -= _nbytes(buffers)
        if buffers is None or _capacity(buffers) < rows:
            capacity = 1 << max(rows - 1, 0).bit_length()
            buffers = [
                None if array is None else self._new((capacity, *array.shape[1:]), spec.datatype)
                for spec, array in zip(specs, example, strict=True)
            ]
            if any(spec.datatype == BYTES for spec in specs):
                return buffers  # kept, they would keep the strings of requests that are over
        self._keep(key, buffers)
        return buffers

    def _keep(self, key: tuple[str, tuple[int, ...]], buffers: list[Array | None]) -> None:
        self._sets[key] = buffers  # last in the dict: most recently used
        self._nbytes += _nbytes(buffers)
        while self._nbytes > self._max_bytes:
            oldest = next(iter(self._sets))  # in the end the new one itself: too large to be kept
            self._nbytes -= _nbytes(self._sets.pop(oldest))

    def _new(self, shape: tuple[int, ...], datatype: str) -> Array:
        dtype = STORAGE[datatype]
        return np.empty(shape, dtype) if dtype.hasobject else self._allocate(shape, dtype)


def _capacity(buffers: Sequence[Array | None]) -> int:
    """Rows that a set of buffers has room for."""
    for buffer in buffers:
        if buffer is not None:
            return len(buffer)
    return 0


def _nbytes(buffers: Sequence[Array | None]) -> int:
    return sum([buffer.nbytes for buffer in buffers if buffer is not None])


def split(outputs: Sequence[Array], rows: Sequence[int]) -> list[tuple[Array, ...]]:
    """Split each output `[sum(rows), ...]` into one view `[rows_i, ...]` per request."""
    if len(rows) == 1:
        return [tuple(outputs)]
    bounds = list(pairwise(accumulate(rows, initial=0)))
    columns = [[output[start:stop] for start, stop in bounds] for output in outputs]
    return list(zip(*columns, strict=True)) if columns else [()] * len(rows)
