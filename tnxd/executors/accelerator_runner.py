"""Runner of an accelerator's lane: the next batch is issued before the last one is over.

A batch takes one copy to the device, a forward and one copy back, on three streams that events put in order. The thread
of the lane only enqueues them (`issue`) and goes on to the next batch, while another one waits for the answers
(`finish`). docs/architecture.md has a picture.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import BYTES, MIB
from tnxd.events import speaker
from tnxd.executors import arena
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.arena import Layout, PinnedBlock, Place, Spares
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.host import Peak
from tnxd.executors.padding import pad, padded_shapes
from tnxd.executors.runner import Failure, Runner
from tnxd.executors.slots import Slot
from tnxd.models.model import Item, Model
from tnxd.models.tensors import Value, check_outputs, to_array

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
        sources: their bytes on the device. pieces: of these, where they are larger than the slot's memory for them.
        held: what else may not be freed before the answers are there.
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
        self.held: object = None
        self.waited_us = 0.0


class Ticket:
    """A batch that was issued.

    Attributes:
        issued_ns: when. flight: its forward; None: the batch is over, its outcomes are there.
        error: met by `finish`; then `recover` has to run the batch again.
    """

    __slots__ = ("error", "execution", "flight", "issued_ns", "slot")

    def __init__(self, execution: Execution, slot: Slot | None) -> None:
        self.execution = execution
        self.slot = slot
        self.issued_ns = time.perf_counter_ns()
        self.flight: Flight | None = None
        self.error: BaseException | None = None


class AcceleratorRunner(Runner):
    """Runner of a lane of an accelerator. A subclass may replace `forward_on_device` and what goes with it.

    Args:
        accelerator: the device. depth: how many batches of the lane may be under way at a time.
    """

    def __init__(self, accelerator: Accelerator, depth: int = 1) -> None:
        super().__init__(accelerator.name, Staging(_plain))
        self.accelerator = accelerator
        self.depth = depth
        self._slots: list[Slot] = []
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._under_way: deque[Ticket] = deque()
        self._spares = Spares()
        self._finishing_mode: torch.inference_mode | None = None

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.set_num_threads(1)
        accelerator = self.accelerator
        accelerator.enter_thread()
        first = not self.yields
        self._compute, self._inbound, self._outbound = (accelerator.stream(first=first) for _ in range(3))
        torch.accelerator.set_stream(self._compute)
        self._current = torch.accelerator.current_stream(self.torch_device)
        self._slots = [Slot(accelerator) for _ in range(self.depth)]
        self._inbound.wait_stream(self._compute)  # memory of the device is that of the stream on which it was made
        for slot in self._slots:
            self._free.put(slot)
        self._slot = self._slots[0]

    @property
    def is_busy(self) -> bool:
        """Whether batches are under way."""
        return bool(self._under_way)

    # --- what graphs replace -------------------------------------------------------------------------------------

    def forward_on_device(self, execution: Execution, inputs: Sequence[Value | None], rows: int) -> object:
        """Call the model, on the lane's stream.

        Args:
            inputs: on the device, views of memory that stays where it is for as long as the slot's does. They have the
                shapes that `shapes_on_device` wants; rows after the first `rows` are copies of the last one.

        Returns:
            What the model returned, for `rows` rows: tensors that stay as they are until the batch is over, also while
            the next batch is computed.
        """
        return self.call(execution)(*inputs)

    def shapes_on_device(
        self, execution: Execution, shapes: Sequence[arena.Shape | None], rows: int
    ) -> Sequence[arena.Shape | None]:
        """Shapes of the inputs as they are wanted on the device, given those of a batch; None where one did not come.

        A wanted shape may have more rows; of a model that pads, also a greater length.
        """
        return shapes

    def prepare(self, model: Model, item: Item) -> None:
        """Prepare for batches like this one, which has just been run on this thread, before the model serves."""

    # --- device --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.accelerator.settle()

    def is_lost(self) -> bool:
        if not self.accelerator.is_lost():
            return False
        arena.leak(self._spares, *[block for slot in self._slots for block in (slot.inbound, slot.answers)])
        return True

    def is_exhausted(self, error: BaseException) -> bool:
        return super().is_exhausted(error) or self.accelerator.is_exhausted(error)

    def free_memory(self, *, emptied: bool) -> None:
        if not emptied:  # it stalls all lanes
            with contextlib.suppress(RuntimeError):  # if the device is gone, the next forward says so
                torch.accelerator.empty_cache()

    def memory_left(self) -> int:
        return int(self.accelerator.memory.sample()[0] * MIB)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        """Measure memory on all streams of the device: forwards of other lanes meanwhile count too."""
        peak, device = Peak(), self.torch_device
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        try:
            yield peak
        finally:
            peak.nbytes = max(torch.accelerator.max_memory_allocated(device) - before, 0)

    def reserve(self) -> None:
        """Have the memory in all slots that the largest batch took in one of them, so that no batch has to wait for it.

        On the lane's thread, while nothing is under way.
        """
        inbound, room, answers = (max(sizes) for sizes in zip(*[slot.sizes for slot in self._slots], strict=True))
        for slot in self._slots:
            slot.grow(inbound, room, answers)
        self._inbound.wait_stream(self._compute)
        if answers > _COPIED:
            self._spares.fill(self.accelerator.pinned, _SPARES, answers)

    # --- batches -------------------------------------------------------------------------------------------------

    def run(self, execution: Execution) -> None:
        if execution.fatal:  # the lane is broken and has no slots
            super().run(execution)
            return
        self._slot = self._free.get()
        try:
            super().run(execution)
        finally:
            self._free.put(self._slot)
        execution.memory_free_mb = self.accelerator.memory.free_mb

    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        return self._landed(execution, self._launched(execution, items, rows))

    def issue(self, execution: Execution) -> Ticket:
        """Enqueue a batch. On the lane's thread.

        Returns:
            A ticket for `finish`; without a flight, the batch is over. Never raises, as `run`.
        """
        speaker.model = execution.model.key
        if execution.fatal:
            self.run(execution)
            return Ticket(execution, None)
        ticket = Ticket(execution, self._free.get())
        assert ticket.slot is not None
        self._slot = ticket.slot
        self._under_way.append(ticket)
        if self._under_way[0] is ticket:
            execution.started_ns = ticket.issued_ns
        try:
            failure = self._try_to_launch(ticket) if self._is_one_forward(execution) else None
            if ticket.flight is not None:
                return ticket
            if failure is None:
                execution.outcomes = self._attempt(execution, 0, len(execution.items))
            else:
                execution.outcomes = self._after(execution, failure, 0, len(execution.items))
        finally:
            if ticket.flight is None:
                self._close(ticket)
        return ticket

    def _try_to_launch(self, ticket: Ticket) -> Failure | None:
        """Begin the flight of a batch. Returns its failure; None: it flies, or is to be run in pieces instead."""
        execution = ticket.execution
        try:
            ticket.flight = self._launched(execution, execution.items, sum(execution.rows))
        except BaseException as error:  # as in `_attempt`
            execution.exhausted = self.is_exhausted(error)
            if execution.exhausted and len(execution.items) == 1 and execution.rows[0] > 1:
                return None
            return self._understood(execution, error, 0, len(execution.items))
        return None

    def finish(self, ticket: Ticket) -> bool:
        """Wait for the answers of a batch, on a thread of its own. False: `recover` must see to it."""
        execution, flight = ticket.execution, ticket.flight
        assert flight is not None
        speaker.model = execution.model.key
        try:
            if self._finishing_mode is None:
                self._enter_finishing_thread()
            outputs = self._landed(execution, flight)
            count = len(execution.items)
            execution.outcomes = [tuple(outputs)] if count == 1 else self._split(execution, outputs, 0, count)
        except BaseException as error:
            ticket.error = error
            return False
        self._close(ticket)
        return True

    def _enter_finishing_thread(self) -> None:
        self.accelerator.enter_thread()
        self._finishing_mode = torch.inference_mode()
        self._finishing_mode.__enter__()

    def recover(self, ticket: Ticket) -> None:
        """Find the outcomes of a batch whose answers did not come. On the lane's thread."""
        execution, error = ticket.execution, ticket.error
        assert ticket.slot is not None
        assert error is not None
        speaker.model = execution.model.key
        self._slot = ticket.slot
        try:
            failure = self._understood(execution, error, 0, len(execution.items))
            ticket.error = error = None  # with its traceback, and the tensors that this holds
            execution.outcomes = self._after(execution, failure, 0, len(execution.items))
        finally:
            self._close(ticket)

    def _close(self, ticket: Ticket) -> None:
        """Note when a batch was over, and give its slot to the next.

        It counts from the moment at which the device was free for it: until then it waited in a queue like any other.
        """
        execution = ticket.execution
        waited_us = 0.0 if ticket.flight is None else ticket.flight.waited_us
        execution.finished_ns = time.perf_counter_ns()
        execution.started_ns = ticket.issued_ns + round(waited_us * 1e3)
        execution.compute_us = execution.run_us - execution.gather_us - execution.h2d_us - execution.d2h_us
        execution.memory_free_mb = self.accelerator.memory.free_mb
        self._under_way.remove(ticket)
        with contextlib.suppress(IndexError):
            following = self._under_way[0].execution
            following.started_ns = following.started_ns or execution.finished_ns
        ticket.flight = None
        assert ticket.slot is not None
        self._free.put(ticket.slot)

    def _is_one_forward(self, execution: Execution) -> bool:
        model, items, rows = execution.model, execution.items, execution.rows
        if not model.max_batch_size:
            return len(items) == 1
        if len(items) == 1:
            return 0 < rows[0] <= self._most_at_once(execution, items[0], rows[0])
        return any(rows)

    def _launched(self, execution: Execution, items: Sequence[Item], rows: int) -> Flight:
        """Enqueue a forward and the copies before and after it."""
        slot, compute = self._slot, self._compute
        flight = Flight(slot, behind=len(self._under_way) > 1)
        try:
            inputs = self._sent(execution, items, rows, flight)
            compute.wait_event(slot.in_ready)
            slot.begun.record(compute)
            try:
                raw = self.forward_on_device(execution, inputs, rows)
            finally:
                self._put_back()
            outputs = check_outputs(execution.model, raw, rows)
            slot.computed.record(compute)
            self._fetch(execution, outputs, flight)
        except BaseException:
            self._wait_for_all(slot)
            raise
        return flight

    def _put_back(self) -> None:
        """Undo what a model's code may have done to the current stream and device."""
        if torch.accelerator.current_device_index() != self.accelerator.index:
            self.accelerator.enter_thread()
        current = torch.accelerator.current_stream(self.torch_device)
        if current != self._current:
            self._compute.wait_stream(current)
            torch.accelerator.set_stream(self._compute)

    def _wait_for_all(self, slot: Slot) -> None:
        """Wait until nothing reads or writes the memory of a slot, after a failure, which stays the one that counts."""
        with contextlib.suppress(RuntimeError):
            for stream in (self._inbound, self._outbound):
                self._compute.wait_stream(stream)
            slot.out_ready.record(self._compute)
            slot.out_ready.synchronize()

    @contextlib.contextmanager
    def _on(self, stream: torch.Stream) -> Iterator[None]:
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(self._compute)

    # --- to the device -------------------------------------------------------------------------------------------

    def _sent(self, execution: Execution, items: Sequence[Item], rows: int, flight: Flight) -> Sequence[Value | None]:
        """Gather the inputs and enqueue their way to the device. Returns them as they will be there; BYTES stay."""
        began = time.perf_counter_ns()
        model, slot, ragged = execution.model, flight.slot, execution.model.ragged
        packed = model.joins and ragged is not None and ragged.packed
        padded = model.joins and not packed
        counted = model.max_batch_size and not packed  # whether axis 0 of what the model gets counts rows
        shapes: Sequence[arena.Shape | None]
        if padded:
            shapes = padded_shapes(model, items, rows)
        else:
            if packed:
                assert ragged is not None
                items = [tuple(ragged.pack(items, model.name))]
            shapes = [
                None if array is None else (rows, *array.shape[1:]) if counted else array.shape for array in items[0]
            ]
        shapes = self.shapes_on_device(execution, shapes, rows)
        layout, fresh = slot.layout(
            tuple(
                [
                    None if shape is None or spec.datatype == BYTES else (shape, spec.datatype)
                    for shape, spec in zip(shapes, model.arguments, strict=True)
                ]
            )
        )
        flight.held = layout
        if fresh:  # what used that memory before, on the lane's stream, may not be done with it
            self._inbound.wait_stream(self._compute)
        if padded:

            def room(position: int, shape: arena.Shape, dtype: np.dtype[Any]) -> Array:
                within = layout.arrays[position]
                if within is None:
                    return self.staging.room(model.key, execution.group, position, (rows, *shape[1:]), dtype)
                return within[:rows]

            items = [tuple(pad(room, model, items, shapes))]
        if layout.source is None:
            self._send_pieces(layout, items, rows, flight)
            execution.gather_us += (time.perf_counter_ns() - began) / 1e3
        else:
            for position, into in enumerate(layout.arrays):
                if into is None:
                    continue
                if not padded:
                    _put_below_each_other([item[position] for item in items], into)
                if counted and len(into) > rows:
                    into[rows:] = into[rows - 1]  # values that the model takes, whatever they are
            execution.gather_us += (time.perf_counter_ns() - began) / 1e3
            with self._on(self._inbound):
                slot.copying.record(self._inbound)
                if layout.nbytes:
                    layout.target.copy_(layout.source, non_blocking=True)
                slot.in_ready.record(self._inbound)
        return [
            tensor if place is not None else _on_host([item[position] for item in items])
            for position, (place, tensor) in enumerate(zip(layout.places, layout.tensors, strict=True))
        ]

    def _send_pieces(self, layout: Layout, items: Sequence[Item], rows: int, flight: Flight) -> None:
        """Send a batch that is larger than the arena: while a piece is gathered, those before it are copied."""
        sources: list[tuple[int, Array]] = []
        for position, place in enumerate(layout.places):
            if place is None:
                continue
            at = place.offset
            parts: list[Array] = [item[position] for item in items]  # type: ignore[misc]
            flat = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts]
            missing = place.nbytes - sum(map(len, flat))
            if missing:  # rows beyond those of the batch
                flat += [np.ascontiguousarray(parts[-1][-1]).reshape(-1).view(np.uint8)] * (place.shape[0] - rows)
            for source in flat:
                sources.append((at, source))
                at += len(source)
        slot, inbound = flight.slot, flight.slot.inbound
        size = inbound.nbytes // arena.PIECES
        with self._on(self._inbound):
            for number, start in enumerate(range(0, layout.nbytes, size)):
                turn = number % arena.PIECES
                copied = slot.pieces[turn]
                if number >= arena.PIECES:
                    copied.synchronize()
                count = min(size, layout.nbytes - start)
                at = turn * size
                arena.fill_piece(inbound.array[at : at + count], start, sources)
                slot.copying.record(self._inbound)
                layout.target[start : start + count].copy_(inbound.tensor[at : at + count], non_blocking=True)
                copied.record(self._inbound)
            slot.in_ready.record(self._inbound)

    # --- from the device -----------------------------------------------------------------------------------------

    def _fetch(self, execution: Execution, outputs: Sequence[Value], flight: Flight) -> None:
        """Enqueue the way of the outputs to the host."""
        slot = flight.slot
        found: list[tuple[int, torch.Tensor]] = []
        for position, (spec, value) in enumerate(zip(execution.model.outputs, outputs, strict=True)):
            if isinstance(value, torch.Tensor) and value.device.type == self.torch_device.type:
                found.append((position, value.contiguous()))
                flight.outputs.append(Place(0, value.nbytes, tuple(value.shape), spec.datatype))
            else:
                array = to_array(value)
                flight.outputs.append(array.copy() if isinstance(value, torch.Tensor) else array)
        self._arrange(found, flight)
        slot.packed.record(self._compute)
        self._outbound.wait_event(slot.packed)
        slot.grow(0, 0, flight.nbytes)
        flight.pieces = [] if flight.nbytes <= slot.answers.nbytes else _pieces(flight.sources, slot.answers.nbytes)
        if flight.pieces:
            for number in range(min(arena.PIECES, len(flight.pieces))):
                self._fetch_piece(flight, number)
            return
        with self._on(self._outbound):
            for place, source in flight.sources:
                slot.answers.tensor[place.offset : place.offset + place.nbytes].copy_(source, non_blocking=True)
            slot.out_ready.record(self._outbound)

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
        with self._on(self._outbound):
            at = turn * size
            slot.answers.tensor[at : at + count].copy_(source[start : start + count], non_blocking=True)
            slot.pieces[turn].record(self._outbound)
            slot.out_ready.record(self._outbound)

    def _landed(self, execution: Execution, flight: Flight) -> list[Array]:
        """Wait for the answers of a forward, and note how long its stages took."""
        slot = flight.slot
        block = self._block_of_pieces(flight) if flight.pieces else None
        slot.out_ready.synchronize()
        if block is None:
            block = self._block(flight)
        execution.h2d_us += slot.copying.elapsed_time(slot.in_ready) * 1e3
        execution.latency_us += slot.begun.elapsed_time(slot.computed) * 1e3
        execution.d2h_us += slot.computed.elapsed_time(slot.out_ready) * 1e3
        if flight.behind:
            flight.waited_us = max(slot.in_ready.elapsed_time(slot.begun) * 1e3, 0.0)
        return [arena.array_at(block, output) if isinstance(output, Place) else output for output in flight.outputs]

    def _block(self, flight: Flight) -> Array:
        """The bytes of the answers, in memory that no later batch writes."""
        slot, nbytes = flight.slot, flight.nbytes
        if nbytes > _COPIED:
            spare = self._spares.take()
            if spare is not None and spare.nbytes >= slot.answers.nbytes:
                block = slot.answers.handed_over(nbytes, self._give_back)
                slot.answers = spare
                return block
            if spare is not None:
                self._spares.give_back(spare)
        return slot.answers.array[:nbytes].copy()

    def _give_back(self, block: PinnedBlock) -> None:
        if self.accelerator.lost:
            arena.leak(block)
        else:
            self._spares.give_back(block)

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


def _plain(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.empty(shape, dtype)


def _put_below_each_other(parts: Sequence[Array | None], into: Array) -> None:
    if len(parts) == 1:
        part = parts[0]
        assert part is not None
        if part.shape:
            into[: len(part)] = part
        else:
            into[...] = part
    else:
        np.concatenate(parts, out=into[: sum(map(len, parts))])  # type: ignore[arg-type]


def _on_host(parts: Sequence[Array | None]) -> Array | None:
    """An input that does not go to the device."""
    return parts[0] if parts[0] is None or len(parts) == 1 else np.concatenate(parts)  # type: ignore[arg-type]


Piece = tuple[torch.Tensor, int, int, int]
"""Piece of the answers: the bytes of a tensor, their offset in the answers, and start and number of those to copy."""


def _pieces(sources: Sequence[tuple[Place, torch.Tensor]], arena_nbytes: int) -> list[Piece]:
    size = arena_nbytes // arena.PIECES
    return [
        (source, place.offset, start, min(size, place.nbytes - start))
        for place, source in sources
        for start in range(0, place.nbytes, size)
    ]
