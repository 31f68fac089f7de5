"""A pretended machine and its devices: current streams, faults, and what was counted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from pretended.capture import Capture, refuse_in_capture
from pretended.errors import ASSERT, LAUNCH_FAILURE, Unpretended, cuda_error
from pretended.memory import Block, DeviceMemory, HostMemory
from pretended.streams import Stream
from pretended.work import Policy, Work, policy_named


@dataclass(frozen=True)
class Properties:
    """As of `torch.cuda.get_device_properties`. Bytes."""

    name: str
    total_memory: int
    multi_processor_count: int = 132
    major: int = 9
    minor: int = 0
    warp_size: int = 32
    L2_cache_size: int = 50 << 20
    is_integrated: int = 0


class Device:
    """One pretended device.

    Args:
        total: bytes of its memory.

    Attributes:
        memory: what is allocated on it. default_stream: CUDA's stream 0. generator: of its random numbers; a seed is
            drawn from it when an operation is issued, so late work draws what early work would.
        lost: code of the error that every call gets since then; 0: it works.
    """

    def __init__(self, machine: Machine, index: int, total: int) -> None:
        self.machine = machine
        self.index = index
        self.torch_device = torch.device("cuda", index)
        self.properties = Properties("Pretended GPU", total)
        self.memory = DeviceMemory(self, total)
        self.generator = torch.Generator(device="cpu")
        self.lost = 0
        self.gap: Unpretended | None = None
        self._lost_in = -1
        self._lost_with = LAUNCH_FAILURE
        self._hangs_in = -1
        self._released = threading.Event()
        self._released.set()
        self.streams: list[Stream] = []
        self.default_stream = Stream(owner=self)

    def lose(self, after: int = 0, code: int = LAUNCH_FAILURE) -> None:
        """Lose the device in the middle of its work. Args: after: so many more pieces of work are done."""
        self._lost_in, self._lost_with = after, code

    def hang(self, after: int = 0) -> None:
        """Let every wait hang, and let no more work be done. Args: after: so many more pieces of work are done."""
        self._hangs_in = after
        if not after:
            self._released.clear()

    def release(self) -> None:
        """End all waits that hang."""
        self._hangs_in = -1
        self._released.set()

    @property
    def hangs(self) -> bool:
        return not self._released.is_set()

    def check(self) -> None:
        """Raise what every call gets from a lost device.

        Raises:
            Unpretended: it was asked for what it cannot do.
        """
        if self.gap is not None:
            raise self.gap
        if self.lost:
            raise cuda_error(self.lost) from self.machine.last_assert

    def hold_up(self) -> None:
        """Wait for ever, if the device hangs. The machine's lock may not be held."""
        self._released.wait()

    def works(self) -> bool:
        """Count one piece of work. Returns whether it is done."""
        if self._lost_in == 0:
            self.lost = self.lost or self._lost_with
        if self._hangs_in == 0:
            self._released.clear()
        self._lost_in -= self._lost_in > 0
        self._hangs_in -= self._hangs_in > 0
        return not self.lost


class Machine:
    """Devices of a pretended machine, and what is known of all of them.

    Args:
        totals: bytes of memory of each device. policy, seed: see `pretended.work`.

    Attributes:
        counts: how often something happened; see `pretended`. capturing: graphs that are being captured.
        last_assert: what a kernel ran into that lost its device. blocks: of living tensors, by address. host: pinned
            memory. freed: what is to be done about memory that is gone.
        lock: held by whoever changes a queue or runs work. One for all, so that no order of streams can lock up.
    """

    blocks: ClassVar[dict[int, Block]] = {}  # of all machines: a program may keep tensors of one that was removed

    def __init__(self, totals: Sequence[int], policy: str, seed: int) -> None:
        self.lock = threading.RLock()
        self.policy: Policy = policy_named(policy, seed)
        self.counts: Counter[str] = Counter()
        self.capturing: list[Capture] = []
        self.last_assert: Exception | None = None
        self.host = HostMemory(self)
        self.freed: deque[Callable[[], None]] = deque()
        self._thread = threading.local()
        self.devices = [Device(self, index, total) for index, total in enumerate(totals)]

    # --- what threads have chosen --------------------------------------------------------------------------------

    def current_index(self) -> int:
        return getattr(self._thread, "index", 0)

    def set_index(self, index: int) -> None:
        if not 0 <= index < len(self.devices):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        self._thread.index = index

    def index_of(self, device: object = None) -> int:
        """Number of a device, given as torch takes it; None and "cuda" are the current one of the thread."""
        if device is None:
            return self.current_index()
        if isinstance(device, int):
            index = device
        else:
            found = torch.device(device)
            if found.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")
            index = self.current_index() if found.index is None else found.index
        if index < 0:
            return self.current_index()
        if index >= len(self.devices):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return index

    def device(self, device: object = None) -> Device:
        return self.devices[self.index_of(device)]

    def current_stream(self, device: object = None) -> Stream:
        chosen = self.device(device)
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return streams.get(chosen.index, chosen.default_stream)

    def set_stream(self, stream: Stream) -> None:
        """Make a stream the current one of its device, and that device the current one."""
        self.set_index(stream.device_index)
        self._thread.__dict__.setdefault("streams", {})[stream.device_index] = stream

    def streams(self) -> Iterator[Stream]:
        for device in self.devices:
            yield from device.streams

    # --- work ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take note of all memory that has been freed. The lock is held."""
        while self.freed:
            self.freed.popleft()()
        for device in self.devices:
            device.memory.settle()

    def issue(self, stream: Stream, work: Work) -> Work:
        """Put work into the queue of its stream, or into the graph that is captured from it.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        with self.lock:
            self.settle()
            stream.owner.check()
            self.counts["issued"] += 1
            if stream.capture is not None:
                stream.capture.record(work)
                return work
            stream.queue.append(work)
            self.policy.issued(self, work)
        return work

    def execute(self, work: Work) -> None:
        """Do one piece of work. The lock is held."""
        device = work.stream.owner
        if work.chore:
            work.run()
        elif device.works():
            with torch.inference_mode(False), torch.no_grad():
                try:
                    work.run()
                except (NotImplementedError, Unpretended) as error:
                    device.gap = Unpretended(str(error))
                except Exception as error:  # a kernel cannot raise: it ends the device's context
                    self.counts["asserts"] += 1
                    self.last_assert = error
                    device.lost = ASSERT
        work.at = time.perf_counter()
        work.done = True

    def ask(self, work: Work) -> bool:
        """Whether work is done."""
        with self.lock:
            self.settle()
            if not work.done and not work.stream.owner.hangs:
                self.policy.asked(self, work)
            return work.done

    def drain(self, stream: Stream) -> None:
        """Wait until all that is in the queue of a stream is done."""
        with self.lock:
            self.settle()
            last = stream.queue[-1] if stream.queue else None
        if last is not None:
            self.wait(last)
        stream.owner.hold_up()
        stream.owner.check()

    def synchronize(self, device: Device) -> None:
        """Wait until a device is idle. A core spins meanwhile."""
        self.counts["device_synchronize"] += 1
        refuse_in_capture(self, device=device)
        for stream in list(device.streams):
            self.drain(stream)

    def wait(self, work: Work) -> None:
        """Wait until work is done. Raises torch.AcceleratorError: its device is lost."""
        device = work.stream.owner
        while True:
            device.hold_up()
            with self.lock:
                self.settle()
                if not work.done and not device.hangs:
                    self.policy.wait(self, work)
            if work.done and not device.hangs:
                break
        device.check()

    @contextlib.contextmanager
    def as_current(self, index: int) -> Iterator[None]:
        before = self.current_index()
        self.set_index(index)
        try:
            yield
        finally:
            self.set_index(before)
