"""Outbound: the way of a batch's answers from an accelerator, and the memory that they are handed over in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import MIB, TensorSpec
from tnxd.executors import arena
from tnxd.executors.accelerator import Accelerator, on_stream
from tnxd.executors.arena import PinnedBlock, Place, Spares
from tnxd.executors.slots import Slot
from tnxd.models.tensors import Value, to_array

_COPIED = 256 * 1024
"""Answers of a batch that are copied out of the arena, in bytes. More are handed over in it, see `Spares`: up to here
a copy costs no more than that, and replies take a copy anyway."""

_PACKED = MIB
"""Answers that are put below each other on the device first, so that one copy brings them back. With more bytes the
copies take longer by themselves than by their number."""

_SPARES = 2
"""Blocks for answers beside those of the slots."""


class Flight:
    """One forward that has been enqueued.

    Attributes:
        slot: that it has. behind: whether another one was under way before it.
        outputs: for each output the array if it is on the host already, or its place in the answers.
        nbytes: of the answers.
        held: what else may not be freed before the answers are there: the call with its weights, which others may give
            up meanwhile, and outputs, whose memory may be that of a stream which the model chose.
        sources: their bytes on the device. pieces: of these, where they are larger than the slot's memory for them.
        waited_us: time that it waited on the device for those before it.
    """

    __slots__ = ("behind", "held", "nbytes", "outputs", "pieces", "slot", "sources", "waited_us")

    def __init__(self, slot: Slot, behind: bool) -> None:
        self.slot = slot
        self.behind = behind
        self.outputs: list[Array | Place] = []
        self.nbytes = 0
        self.sources: list[tuple[Place, torch.Tensor]] = []
        self.pieces: list[Piece] = []
        self.held: list[object] = []
        self.waited_us = 0.0


class Outbound:
    """Way of the answers of a lane's batches from the device.

    Args:
        stream: that copies. compute: that the lane's thread computes on.
    """

    def __init__(self, accelerator: Accelerator, stream: torch.Stream, compute: torch.Stream) -> None:
        self.stream = stream
        self._accelerator = accelerator
        self._compute = compute
        self.spares = Spares()

    def reserve(self, nbytes: int) -> None:
        """Have spare blocks for answers of so many bytes."""
        if nbytes > _COPIED:
            self.spares.fill(self._accelerator.pinned, _SPARES, nbytes)

    def fetch(self, specs: Sequence[TensorSpec], outputs: Sequence[Value], flight: Flight) -> None:
        """Enqueue the way of the outputs to the host; `flight.slot.out_ready` tells when they are there.

        On the lane's thread. Args: specs: of the outputs.
        """
        slot = flight.slot
        found: list[tuple[int, torch.Tensor]] = []
        for position, (spec, value) in enumerate(zip(specs, outputs, strict=True)):
            if not isinstance(value, torch.Tensor):
                flight.outputs.append(to_array(value))
            elif value.device == self._accelerator.torch_device:
                found.append((position, value.contiguous()))
                flight.outputs.append(Place(0, value.nbytes, tuple(value.shape), spec.datatype))
            else:  # of the host, or of another device, which the model has left it on
                flight.outputs.append(to_array(value.cpu()).copy())
        self._arrange(found, flight)
        slot.packed.record(self._compute)
        self.stream.wait_event(slot.packed)
        slot.grow(0, 0, flight.nbytes)
        flight.pieces = [] if flight.nbytes <= slot.answers.nbytes else _pieces(flight.sources, slot.answers.nbytes)
        if flight.pieces:
            for number in range(min(arena.PIECES, len(flight.pieces))):
                self._fetch_piece(flight, number)
            return
        with on_stream(self.stream, self._compute):
            for place, source in flight.sources:
                slot.answers.tensor[place.offset : place.offset + place.nbytes].copy_(source, non_blocking=True)
            slot.out_ready.record(self.stream)

    @staticmethod
    def _arrange(found: list[tuple[int, torch.Tensor]], flight: Flight) -> None:
        """Give every output its place in the answers; small ones go below each other on the device, as one."""
        together = len(found) > 1 and sum([tensor.nbytes for _, tensor in found]) <= _PACKED
        if together:  # without gaps; by falling size of elements, so that each is aligned
            found.sort(key=lambda each: -each[1].itemsize)
        at = 0
        for position, tensor in found:
            place = flight.outputs[position]
            assert isinstance(place, Place)
            place = flight.outputs[position] = place._replace(offset=at)
            at += place.nbytes if together else -(-place.nbytes // arena.ALIGNMENT) * arena.ALIGNMENT
            if place.nbytes:
                flight.sources.append((place, arena.bytes_of(tensor)))
        flight.nbytes = at
        if together and len(flight.sources) > 1:
            packed = torch.cat([source for _, source in flight.sources])
            flight.sources = [(Place(0, at, (at,), "UINT8"), packed)]

    def _fetch_piece(self, flight: Flight, number: int) -> None:
        """Enqueue the copy of one piece of answers that are larger than the arena."""
        slot, size = flight.slot, flight.slot.answers.nbytes // arena.PIECES
        turn = number % arena.PIECES
        source, _, start, count = flight.pieces[number]
        with on_stream(self.stream, self._compute):
            at = turn * size
            slot.answers.tensor[at : at + count].copy_(source[start : start + count], non_blocking=True)
            slot.pieces[turn].record(self.stream)
            slot.out_ready.record(self.stream)

    def land(self, flight: Flight) -> list[Array]:
        """Wait for the answers of a flight, on any thread. Returns them, in memory that no later batch writes."""
        slot = flight.slot
        block = self._block_of_pieces(flight) if flight.pieces else None
        slot.out_ready.synchronize()
        if block is None:
            block = self._block(flight)
        return [arena.array_at(block, output) if isinstance(output, Place) else output for output in flight.outputs]

    def _block(self, flight: Flight) -> Array:
        """The bytes of the answers, in memory that no later batch writes."""
        slot, nbytes = flight.slot, flight.nbytes
        if nbytes > _COPIED:
            spare = self.spares.take()
            if spare is not None and spare.nbytes >= slot.answers.nbytes:
                block = slot.answers.handed_over(nbytes, self._give_back)
                slot.answers = spare
                return block
            if spare is not None:
                self.spares.give_back(spare)
        return slot.answers.array[:nbytes].copy()

    def _give_back(self, block: PinnedBlock) -> None:
        if self._accelerator.lost:
            arena.leak(block)
        else:
            self.spares.give_back(block)

    def _block_of_pieces(self, flight: Flight) -> Array:
        slot, size = flight.slot, flight.slot.answers.nbytes // arena.PIECES
        block = np.empty(flight.nbytes, np.uint8)
        for number, (_, offset, start, count) in enumerate(flight.pieces):
            turn = number % arena.PIECES
            slot.pieces[turn].synchronize()
            np.copyto(block[offset + start : offset + start + count], slot.answers.array[turn * size :][:count])
            if number + arena.PIECES < len(flight.pieces):
                self._fetch_piece(flight, number + arena.PIECES)
        return block


Piece = tuple[torch.Tensor, int, int, int]
"""Piece of the answers: the bytes of a tensor, their offset in the answers, and start and number of those to copy."""


def _pieces(sources: Sequence[tuple[Place, torch.Tensor]], arena_nbytes: int) -> list[Piece]:
    size = arena_nbytes // arena.PIECES
    return [
        (source, place.offset, start, min(size, place.nbytes - start))
        for place, source in sources
        for start in range(0, place.nbytes, size)
    ]
