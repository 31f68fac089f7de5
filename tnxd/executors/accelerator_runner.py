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
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import MIB
from tnxd.events import speaker
from tnxd.executors import arena
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.host import Peak
from tnxd.executors.inbound import Inbound
from tnxd.executors.outbound import Flight, Outbound
from tnxd.executors.runner import Failure, Runner, infer_only, outcomes_of
from tnxd.executors.slots import Slot
from tnxd.models.model import Item
from tnxd.models.tensors import Value, check_outputs


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
        self._finishes = False

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.set_num_threads(1)
        accelerator = self.accelerator
        accelerator.enter_thread()
        first = not self.yields
        self._compute, inbound, outbound = (accelerator.stream(first=first) for _ in range(3))
        self._inbound = Inbound(inbound, self._compute, self.staging)
        self._outbound = Outbound(accelerator, outbound, self._compute)
        torch.accelerator.set_stream(self._compute)
        self._current = torch.accelerator.current_stream(self.torch_device)
        self._slots = [Slot(accelerator) for _ in range(self.depth)]
        self._inbound.order()
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

    # --- device --------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        self.accelerator.settle()

    def is_lost(self) -> bool:
        if not self.accelerator.is_lost():
            return False
        arena.leak(self._outbound.spares, *[block for slot in self._slots for block in (slot.inbound, slot.answers)])
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
        self._inbound.order()
        self._outbound.reserve(answers)

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
            alone = len(execution.items) == 1 and execution.rows[0] > 1
            if execution.exhausted and alone and not execution.crowded:
                return None
            return self._understood(execution, error, 0, len(execution.items))
        return None

    def finish(self, ticket: Ticket) -> bool:
        """Wait for the answers of a batch, on a thread of its own. False: `recover` must see to it."""
        execution, flight = ticket.execution, ticket.flight
        assert flight is not None
        speaker.model = execution.model.key
        try:
            if not self._finishes:
                self._enter_finishing_thread()
            outputs = self._landed(execution, flight)
            items = execution.items
            if len(items) == 1:
                execution.outcomes = [tuple(outputs)]
            else:
                execution.outcomes = outcomes_of(execution.model, outputs, items, execution.rows)
        except BaseException as error:
            ticket.error = error
            return False
        self._close(ticket)
        return True

    def _enter_finishing_thread(self) -> None:
        self.accelerator.enter_thread()
        infer_only()
        self._finishes = True

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
            wanted = partial(self.shapes_on_device, execution, rows=rows)
            inputs = self._inbound.send(slot, execution, items, rows, wanted)
            compute.wait_event(slot.in_ready)
            slot.begun.record(compute)
            flight.held.append(self.call(execution))
            try:
                raw = self.forward_on_device(execution, inputs, rows)
            finally:
                self._put_back()
            outputs = check_outputs(execution.model, raw, rows)
            slot.computed.record(compute)
            flight.held.append(outputs)
            self._outbound.fetch(execution.model.outputs, outputs, flight)
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
            for stream in (self._inbound.stream, self._outbound.stream):
                self._compute.wait_stream(stream)
            slot.out_ready.record(self._compute)
            slot.out_ready.synchronize()

    def _landed(self, execution: Execution, flight: Flight) -> list[Array]:
        """Wait for the answers of a forward, and note how long its stages took."""
        slot, outputs = flight.slot, self._outbound.land(flight)
        execution.h2d_us += slot.copying.elapsed_time(slot.in_ready) * 1e3
        execution.latency_us += slot.begun.elapsed_time(slot.computed) * 1e3
        execution.d2h_us += slot.computed.elapsed_time(slot.out_ready) * 1e3
        if flight.behind:
            flight.waited_us = max(slot.in_ready.elapsed_time(slot.begun) * 1e3, 0.0)
        return outputs


def _plain(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.empty(shape, dtype)
