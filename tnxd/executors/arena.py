"""Arenas: the memory of one batch on its way to an accelerator and back, laid out so that one copy moves it all.

The inputs of a batch lie one after the other in one block of pinned memory, and after the copy in one block of the
device's: a layout says where. Both are made when a model is loaded, and kept.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.wire import MIB
from tnxd.models.tensors import TORCH_DTYPES

ALIGNMENT = 256
"""Alignment of each tensor in an arena, in bytes: torch aligns as much or more, and chooses kernels by it."""

MOST_PINNED = 16 * MIB
"""Most bytes of an arena in pinned memory. A larger batch goes through it in pieces."""

PIECES = 4
"""Pieces of an arena that are under way at a time, where a batch goes through it in pieces."""

Shape = tuple[int, ...]


class Place(NamedTuple):
    """Place of a tensor in an arena. Attributes: offset: in bytes. datatype: of the wire."""

    offset: int
    nbytes: int
    shape: Shape
    datatype: str


def lay_out(tensors: Sequence[tuple[Shape, str] | None]) -> tuple[list[Place | None], int]:
    """Places of tensors one after the other, and the bytes of all.

    Args:
        tensors: shape and datatype of each; None for one that is not in the arena.
    """
    places: list[Place | None] = []
    at = 0
    for tensor in tensors:
        if tensor is None:
            places.append(None)
            continue
        shape, datatype = tensor
        nbytes = prod(shape) * STORAGE[datatype].itemsize
        places.append(Place(at, nbytes, shape, datatype))
        at += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return places, at


def array_at(block: Array, place: Place) -> Array:
    """The tensor at a place, as a view of an arena's bytes on the host."""
    array: Array = block[place.offset : place.offset + place.nbytes].view(STORAGE[place.datatype]).reshape(place.shape)
    return array


def tensor_at(block: torch.Tensor, place: Place) -> torch.Tensor:
    """The tensor at a place, as a view of an arena's bytes on the device."""
    flat = block[place.offset : place.offset + place.nbytes].view(TORCH_DTYPES[place.datatype])
    return flat.view(place.shape)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as a view."""
    return tensor.view(-1).view(torch.uint8)


class Layout(NamedTuple):
    """Views of an arena on the host and on the device, for batches of certain shapes.

    Attributes:
        arrays: on the host, one for each input; None for one that is not in the arena, all None if the batch is larger
            than the arena. tensors: on the device. source, target: the bytes of all, on the host and on the device.
    """

    places: Sequence[Place | None]
    nbytes: int
    arrays: Sequence[Array | None]
    tensors: Sequence[torch.Tensor | None]
    source: torch.Tensor | None
    target: torch.Tensor


class PinnedBlock:
    """Block of pinned memory. Attributes: tensor, array: views of all its bytes."""

    def __init__(self, allocate: Callable[[int], torch.Tensor], nbytes: int) -> None:
        self.tensor = allocate(nbytes)
        self.array: Array = self.tensor.numpy()
        self.nbytes = nbytes
        self._address = self.tensor.data_ptr()

    def handed_over(self, nbytes: int, give_back: Callable[[PinnedBlock], Any]) -> Array:
        """The first bytes as an array for somebody who will read it for as long as it likes.

        Args:
            give_back: called with this block, on any thread, when nobody has the array or a view of it any more.
        """
        lent = (ctypes.c_uint8 * nbytes).from_address(self._address)  # every view of the array holds this
        weakref.finalize(lent, give_back, self).atexit = False
        array: Array = np.frombuffer(memoryview(lent), np.uint8)
        return array


class Spares:
    """Spare blocks for answers, of one lane: a block goes out with a reply, and comes back when that is gone.

    Any thread may use it.
    """

    def __init__(self) -> None:
        self._blocks: deque[PinnedBlock] = deque()
        self._nbytes = 0

    def fill(self, allocate: Callable[[int], torch.Tensor], count: int, nbytes: int) -> None:
        """Have so many blocks of that size, in the place of smaller ones."""
        if nbytes <= self._nbytes:
            return
        self._nbytes = nbytes
        self._blocks = deque([PinnedBlock(allocate, nbytes) for _ in range(count)])

    def take(self) -> PinnedBlock | None:
        """A block; None: all are out."""
        try:
            return self._blocks.pop()
        except IndexError:
            return None

    def give_back(self, block: PinnedBlock) -> None:
        """Take a block back. One that was made when models were smaller is dropped."""
        if block.nbytes >= self._nbytes:
            self._blocks.append(block)


def grown(nbytes: int) -> int:
    """Size of an arena for so many bytes: the next power of two, so that it seldom grows."""
    return 1 << max(nbytes - 1, 4095).bit_length()


def fill_piece(piece: Array, start: int, sources: Sequence[tuple[int, Array]]) -> None:
    """Copy what belongs there to a piece of a layout.

    Args:
        piece: bytes. start: its offset in the layout.
        sources: offset in the layout, and bytes, of each array, by growing offset.
    """
    stop = start + len(piece)
    for offset, source in sources:
        first, last = max(offset, start), min(offset + len(source), stop)
        if first < last:
            np.copyto(piece[first - start : last - start], source[first - offset : last - offset])


def leak(*objects: object) -> None:
    """Keep objects for good, also when the interpreter ends.

    To free pinned memory is to ask the device whether copies still use it. A device that is lost answers with an error,
    which C++ raises where none may be raised: that would be the end of the process.
    """
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
