"""Memory of pretended devices, and pinned memory of their host.

Device memory is memory of this process that nothing but work touches. New memory is full of 0xFF, which is NaN in every
floating-point type, and so is memory that was freed. As with torch's allocator, memory is a stream's: what was freed
may be used again at once by the stream on which it was allocated, in the order of that stream, and what is new may
still be in use by what that stream has to do. Only streams that `record_stream` has named are waited for besides.

Of blocks above 2 MiB, the first and the last MiB are filled so: the rest is not touched, and takes no memory.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from pretended import dlpack
from pretended.capture import refuse_in_capture
from pretended.errors import OUT_OF_MEMORY, cuda_error
from pretended.work import Work

if TYPE_CHECKING:
    from pretended.capture import Capture
    from pretended.devices import Device, Machine
    from pretended.streams import Stream

_ROUNDING = 512  # bytes, as torch's allocator rounds
_POISONED = 1 << 20


def _reserve(nbytes: int) -> torch.Tensor:
    """Memory of this process, full of 0xFF as far as `poison` goes."""
    with torch.inference_mode(False):
        bytes_ = torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cpu")
        poison(bytes_)
    return bytes_


def poison(bytes_: torch.Tensor) -> None:
    """Fill memory with 0xFF."""
    if len(bytes_) > 2 * _POISONED:
        bytes_[:_POISONED].fill_(0xFF)
        bytes_[-_POISONED:].fill_(0xFF)
    else:
        bytes_.fill_(0xFF)


class Block:
    """An allocation on a device.

    Attributes:
        bytes: its memory. nbytes: as many as were asked for. held: bytes that it counts for.
        stream: on which it was allocated. users: others that `record_stream` has named.
        capture: of the graph that it belongs to. storages: of torch that lie there.
    """

    def __init__(self, nbytes: int, stream: Stream) -> None:
        self.bytes = _reserve(nbytes)
        self.address = self.bytes.data_ptr()
        self.nbytes = nbytes
        self.held = -(-nbytes // _ROUNDING) * _ROUNDING
        self.stream = stream
        self.users: set[Stream] = set()
        self.capture: Capture | None = stream.capture
        self.storages = 0

    def poison(self) -> None:
        poison(self.bytes)


class DeviceMemory:
    """The allocator of one device. The machine's lock is held by whoever calls.

    Attributes:
        total: bytes of the device. limit: bytes that may be taken. allocated: bytes of living tensors. pooled: bytes of
            dead ones that graphs keep. failing: so many more allocations fail; -1: all of them.
    """

    def __init__(self, device: Device, total: int) -> None:
        self.total = total
        self.limit = total
        self.allocated = 0
        self.pooled = 0
        self.reserved = 0
        self.peak = 0
        self.peak_reserved = 0
        self.failing = 0
        self._device = device
        self._awaited: list[tuple[Block, list[Work]]] = []
        self.stats: dict[str, int] = dict.fromkeys(("num_alloc_retries", "num_ooms", "num_device_alloc"), 0)

    @property
    def held(self) -> int:
        """Bytes that cannot be allocated now."""
        return self.allocated + self.pooled + sum(block.held for block, _ in self._awaited)

    def allocate(self, nbytes: int, stream: Stream) -> Block:
        """Allocate bytes for a stream.

        Raises:
            torch.OutOfMemoryError: there are not so many left, or it was planned.
        """
        machine = self._device.machine
        machine.settle()
        self._device.check()
        machine.counts["allocations"] += 1
        wanted = -(-nbytes // _ROUNDING) * _ROUNDING
        if self.held + wanted > self.limit and self._awaited:
            self.stats["num_alloc_retries"] += 1
            for _, marks in self._awaited:
                for mark in marks:
                    machine.policy.wait(machine, mark)
            machine.settle()
        if self.failing or self.held + wanted > self.limit:
            self.failing -= self.failing > 0
            self.stats["num_ooms"] += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes / 2**20:.2f} MiB. GPU {self._device.index} has a total "
                f"capacity of {self.total / 2**20:.2f} MiB of which {(self.limit - self.held) / 2**20:.2f} MiB is free."
            )
        if self.held + wanted > self.reserved:
            if stream.capture is None:  # else torch's allocator relaxes the mode for the call
                refuse_in_capture(machine)
            self.reserved = self.held + wanted
            self.stats["num_device_alloc"] += 1
        block = Block(nbytes, stream)
        if block.capture is not None:
            block.capture.blocks.append(block)
            block.capture.record(Work(stream, block.poison, chore="used"))
        elif stream.queue:
            stream.queue.append(Work(stream, block.poison, chore="used"))
        self.allocated += block.held
        self.peak = max(self.peak, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def free(self, block: Block) -> None:
        """Free a block, whose last tensor is gone."""
        self.allocated -= block.held
        capture = block.capture
        if capture is not None:
            self.pooled += block.held
            if capture in self._device.machine.capturing:  # what the graph allocates next may lie there
                capture.record(Work(block.stream, block.poison, chore="taken"))
            return
        marks = [user.queue[-1] for user in block.users if user.queue and user != block.stream]
        if marks:
            self._awaited.append((block, marks))
        else:
            self._take(block)

    def free_pool(self, capture: Capture) -> None:
        """Free what a graph keeps, because it is gone."""
        for block in capture.blocks:
            block.capture = None
            if not block.storages:
                self.pooled -= block.held
                self._take(block)

    def settle(self) -> None:
        """Free what no other stream uses any more."""
        awaited, self._awaited = self._awaited, []
        for block, marks in awaited:
            if all(mark.done for mark in marks):
                self._take(block)
            else:
                self._awaited.append((block, marks))

    def _take(self, block: Block) -> None:
        """Overwrite a block as soon as its stream may."""
        work = Work(block.stream, block.poison, chore="taken")
        if block.stream.queue:
            block.stream.queue.append(work)
        else:
            block.poison()

    def empty_cache(self) -> None:
        self.reserved = self.held

    def reset_peak(self) -> None:
        self.peak = self.allocated
        self.peak_reserved = self.reserved

    def statistics(self) -> OrderedDict[str, int]:
        """As of `torch.cuda.memory_stats`, the part that is known here."""
        return OrderedDict(
            {
                "allocated_bytes.all.current": self.allocated,
                "allocated_bytes.all.peak": self.peak,
                "reserved_bytes.all.current": self.reserved,
                "reserved_bytes.all.peak": self.peak_reserved,
                **self.stats,
            }
        )


class HostMemory:
    """Pinned memory. Attributes: failing: so many more allocations fail; -1: all of them. nbytes: that are pinned."""

    def __init__(self, machine: Machine) -> None:
        self.failing = 0
        self.nbytes = 0
        self._machine = machine
        self._pinned: dict[int, int] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Pinned bytes. Raises torch.AcceleratorError: planned."""
        machine = self._machine
        with machine.lock:
            machine.settle()
            refuse_in_capture(machine)
            machine.counts["pinned_allocations"] += 1
            if self.failing:
                self.failing -= self.failing > 0
                raise cuda_error(OUT_OF_MEMORY)
            bytes_ = _reserve(nbytes)
            address = bytes_.data_ptr()
            self._pinned[address] = nbytes
            self.nbytes += nbytes

        def free() -> None:
            del self._pinned[address]
            self.nbytes -= nbytes
            poison(bytes_)

        return dlpack.tensor(address, (nbytes,), (1,), torch.uint8, None, on_free=lambda: machine.freed.append(free))

    def is_pinned(self, address: int) -> bool:
        """Whether an address is within pinned memory."""
        return any(start <= address < start + max(nbytes, 1) for start, nbytes in list(self._pinned.items()))
