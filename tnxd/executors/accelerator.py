"""Accelerators: devices with streams of their own, as far as torch knows them all alike.

What is one maker's alone is in a module of its own, such as `cuda`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator

import torch

from tnxctl.protocol.wire import MIB
from tnxd.device_kinds import DeviceKind
from tnxd.error_text import first_line

_MEMORY_PERIOD_S = 1.0

_LOSS_S = 10.0
"""So long a device may take to do nothing, before it counts as lost."""


capturing = threading.Lock()
"""Held while a graph is captured: torch allows one capture at a time in a process, and gives no memory back then."""


class Accelerator:
    """A device that torch.accelerator knows, and what all its lanes share. A subclass has what torch does otherwise.

    Args:
        name: as torch has it.

    Attributes:
        lost: whether the device was found to be lost for good. failure: the driver's words, if no batch ran into that.

    Raises:
        RuntimeError: the driver does not answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.torch_device = torch.device(name)
        self.index = self.torch_device.index or 0
        self.lost = False
        self.failure = ""
        self.memory = Memory(self)  # which has torch begin to use the device
        self._probe = self.stream(first=True)

    # --- what a kind of device may do otherwise ------------------------------------------------------------------

    @property
    def description(self) -> str:
        """Its name, for an operator."""
        return self.name

    def stream(self, *, first: bool) -> torch.Stream:
        """A new stream. Args: first: whether its work goes before that of others, where the device has priorities."""
        return torch.Stream(self.torch_device, priority=-1 if first else 0)

    def current_stream(self) -> torch.Stream:
        """The calling thread's stream, as `stream` makes them: events of `event` can be recorded on it."""
        return torch.accelerator.current_stream(self.torch_device)

    def event(self) -> torch.Event:
        """A new event that tells the time, and for which a thread can wait without using a core, where torch can."""
        return torch.Event(self.torch_device, enable_timing=True)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Bytes on the host that the device reads and writes while the host does something else."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def memory_info(self) -> tuple[int, int]:
        """Free and total memory in bytes, as the driver says. May block. Raises RuntimeError: the device is gone."""
        return torch.accelerator.get_memory_info(self.torch_device)

    def is_exhausted(self, error: BaseException) -> bool:
        """Whether an error that torch has no class for says that memory has run out."""
        return False

    # --- what they all do alike ----------------------------------------------------------------------------------

    def enter_thread(self) -> None:
        """Make the device the calling thread's own."""
        torch.accelerator.set_device_index(self.index)

    def settle(self) -> None:
        """Wait until what the calling thread has enqueued is done: weights that it copied, for one.

        Streams of lanes know nothing of the thread's.
        """
        event = self.event()
        event.record(self.current_stream())
        event.synchronize()

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Put a module on the device."""
        moved = module.to(self.torch_device)
        self.settle()
        return moved

    def is_lost(self) -> bool:
        """Whether the device is lost for good. Asked on another thread: what is lost may also not answer at all."""
        answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

        def ask() -> None:
            try:
                event = self.event()
                event.record(self._probe)
                event.synchronize()
            except RuntimeError:
                answers.put(True)
            else:
                answers.put(False)  # an error of one call, such as a refused launch, and not of the device

        threading.Thread(target=ask, name=f"{self.name}/probe", daemon=True).start()
        try:
            self.lost = answers.get(timeout=_LOSS_S) or self.lost
        except queue.Empty:
            self.lost = True
        return self.lost


def accelerator_names(kind: DeviceKind) -> list[str]:
    """Names of the devices of a kind on this machine, if that is the one which this torch was built for."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != kind.name:
        return []
    return (
        [f"{kind.name}:{index}" for index in range(torch.accelerator.device_count())] if kind.numbered else [kind.name]
    )


@contextlib.contextmanager
def on_stream(stream: torch.Stream, then: torch.Stream) -> Iterator[None]:
    """Enqueue the block's work on a stream, and what follows on the other one. For the calling thread."""
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(then)


class Memory:
    """Free and total memory of one device in MiB, sampled on a thread: the driver may block, the serving loop may not.

    Memory that torch's allocator holds and could give back counts as free: it does that before it runs out.

    Raises:
        RuntimeError: the driver does not answer.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._is_idle: Callable[[], bool] | None = None
        self.free_mb, self.total_mb = self.sample()
        threading.Thread(target=self._watch, name=f"{accelerator.name}/memory", daemon=True).start()

    def sample(self) -> tuple[float, float]:
        """Ask the driver for free and total memory in MiB. May block. Raises RuntimeError: the device is gone."""
        device = self._accelerator.torch_device
        free, total = self._accelerator.memory_info()
        stats = torch.accelerator.memory_stats(device)
        held = stats.get("reserved_bytes.all.current", 0) - stats.get("allocated_bytes.all.current", 0)
        stuck = stats.get("inactive_split_bytes.all.current", 0)  # beside memory in use, within one block
        return (free + max(held - stuck, 0)) / MIB, total / MIB

    def latest(self) -> tuple[float, float]:
        """The newest sample: free and total memory in MiB. Never blocks."""
        return self.free_mb, self.total_mb

    def give_back(self, is_idle: Callable[[], bool]) -> None:
        """Have memory that torch's allocator keeps given back once the device is idle, since that stalls all lanes."""
        self._is_idle = is_idle

    def _watch(self) -> None:
        while True:
            time.sleep(_MEMORY_PERIOD_S)
            try:
                if self._is_idle is not None and self._is_idle() and capturing.acquire(blocking=False):
                    try:
                        self._is_idle = None
                        torch.accelerator.empty_cache()
                    finally:
                        capturing.release()
                self.free_mb, self.total_mb = self.sample()
            except Exception as error:  # drivers fail in many ways
                self.free_mb = 0.0
                if self._accelerator.is_lost():
                    self._accelerator.failure = first_line(error)
                    return
