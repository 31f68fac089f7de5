"""Streams and events of pretended devices, with the surface of torch's own."""

from __future__ import annotations

import itertools
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from pretended.capture import refuse_in_capture
from pretended.errors import CAPTURED_EVENT, Unpretended, cuda_error
from pretended.work import Work

if TYPE_CHECKING:
    from pretended.capture import Capture
    from pretended.devices import Device, Machine

_ids = itertools.count()


class active:
    """The machine that is installed."""

    machine: Machine


class Stream:
    """A stream: `torch.Stream`, which takes a device.

    Those of CUDA come from a pool of 32 for each priority; here each is another one.
    """

    def __init__(self, device: Any = None, priority: int = 0, *, owner: Device | None = None) -> None:
        self.owner: Device = active.machine.device(device) if owner is None else owner
        self.machine: Machine = self.owner.machine
        self.device_index = self.owner.index
        self.device = torch.device("cuda", self.device_index)
        self.device_type = 1
        self.priority = priority
        self.queue: deque[Work] = deque()
        self.capture: Capture | None = None
        self.stream_id = next(_ids)
        self._entered: list[tuple[int, Stream]] = []
        with self.machine.lock:
            self.owner.streams.append(self)

    @property
    def cuda_stream(self) -> int:
        """The handle, as of CUDA. It points to nothing."""
        return self.stream_id

    def __repr__(self) -> str:
        return f"<pretended stream {self.stream_id} of {self.device}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def query(self) -> bool:
        """Whether all work is done."""
        refuse_in_capture(self.machine, self)
        done = self.machine.ask(self.queue[-1]) if self.queue else True
        self.owner.check()
        return done

    def synchronize(self) -> None:
        """Wait for all work. A core spins meanwhile, as CUDA's does by default."""
        self.machine.counts["stream_synchronize"] += 1
        refuse_in_capture(self.machine, self)
        self.machine.drain(self)

    def is_capturing(self) -> bool:
        return self.capture is not None

    def wait_event(self, event: Event) -> None:
        """Do later work only once what an event has recorded is done."""
        mark = event.mark
        if mark is None:
            return
        if mark.capture is not None:
            if mark.capture not in self.machine.capturing:
                raise cuda_error(CAPTURED_EVENT)
            mark.capture.join(self)
        self.machine.issue(self, Work(self, _nothing, () if mark.stream == self else (mark,)))

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        machine = self.machine
        self._entered.append((machine.current_index(), machine.current_stream(self.device)))
        machine.set_stream(self)
        return self

    def __exit__(self, *exception: object) -> None:
        index, stream = self._entered.pop()
        self.machine.set_stream(stream)
        self.machine.set_index(index)


class CudaStream(Stream):
    """A stream: `torch.cuda.Stream`."""

    def record_event(self, event: Event | None = None) -> Event:
        return super().record_event(CudaEvent() if event is None else event)


def as_kind(stream: Stream, kind: type[Stream]) -> Stream:
    """The same stream as an object of that class."""
    if type(stream) is kind:
        return stream
    twin = object.__new__(kind)
    twin.__dict__ = stream.__dict__
    return twin


def _nothing() -> None: ...


class Event:
    """An event: `torch.Event`. A core spins while a thread waits for one, blocking or not (torch 2.13)."""

    _sleeps = False

    def __init__(
        self,
        device: Any = None,
        *,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
    ) -> None:
        self.machine = active.machine
        self.mark: Work | None = None
        self.event_id = next(_ids)
        self._timing = enable_timing
        self._device = None if device is None else torch.device("cuda", self.machine.index_of(device))

    @property
    def device(self) -> torch.device | None:
        return self._device

    def record(self, stream: Stream | None = None) -> None:
        """Record what has been issued to a stream; None: the current one."""
        if stream is None:
            index = None if self._device is None else self._device.index
            stream = self.machine.current_stream(index)
        if self._device is None:
            self._device = stream.device
        if stream.device != self._device:
            raise RuntimeError(f"Event device {self._device} does not match recording stream's device {stream.device}.")
        self.machine = stream.machine  # a thread that outlived its machine may ask with what it has of that one
        self.mark = self.machine.issue(stream, Work(stream, _nothing))

    def wait(self, stream: Stream | None = None) -> None:
        (self.machine.current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        """Whether what was recorded is done."""
        if self.mark is None:
            return True
        refuse_in_capture(self.machine, self.mark.stream, self.mark)
        done = self.machine.ask(self.mark)
        self.mark.stream.owner.check()
        return done

    def synchronize(self) -> None:
        """Wait until what was recorded is done."""
        self.machine.counts["event_synchronize_blocking" if self._sleeps else "event_synchronize_spinning"] += 1
        if self.mark is not None:
            refuse_in_capture(self.machine, self.mark.stream, self.mark)
            self.machine.wait(self.mark)

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to another. They are those of the CPU that did the work."""
        if not self._timing or not end_event._timing:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.mark is None or end_event.mark is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not self.query() or not end_event.query():
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return max((end_event.mark.at - self.mark.at) * 1e3, 1e-6)


class CudaEvent(Event):
    """An event: `torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        super().__init__(enable_timing=enable_timing)
        self._sleeps = blocking

    def record(self, stream: Stream | None = None) -> None:
        _expect_cuda(stream)
        super().record(stream)

    def wait(self, stream: Stream | None = None) -> None:
        _expect_cuda(stream)
        super().wait(stream)


def _expect_cuda(stream: Stream | None) -> None:
    if stream is not None and not isinstance(stream, CudaStream):
        raise Unpretended("torch.cuda.Event with a torch.Stream: torch 2.13 reads beyond the end of that object")
