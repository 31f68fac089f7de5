"""Capture of work into graphs, and what may not happen meanwhile.

After the rules of CUDA's programming guide on stream capture: nothing may wait for a stream that is captured, or ask
about it. A thread may do nothing potentially unsafe (wait for or ask about anything, allocate) while it captures, in
mode "thread_local"; in mode "global" no thread may. What is refused spoils the capture.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pretended.errors import CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, CAPTURED_EVENT, cuda_error

if TYPE_CHECKING:
    from pretended.devices import Device, Machine
    from pretended.memory import Block
    from pretended.streams import Stream
    from pretended.work import Work

MODES = ("global", "thread_local", "relaxed")


class Capture:
    """Capture into a graph that is under way.

    Attributes:
        works: what was captured, in the order in which it was issued. blocks: device memory that was allocated
            meanwhile; it stays the graph's. valid: whether nothing has spoiled it.
    """

    def __init__(self, origin: Stream, mode: str) -> None:
        self.origin = origin
        self.mode = mode
        self.thread = threading.get_ident()
        self.works: list[Work] = []
        self.blocks: list[Block] = []
        self.valid = True
        self._streams = [origin]
        origin.capture = self

    def record(self, work: Work) -> None:
        work.capture = self
        self.works.append(work)

    def join(self, stream: Stream) -> None:
        """Capture another stream, too, that waits for an event of this capture."""
        if stream.capture is None:
            stream.capture = self
            self._streams.append(stream)

    def end(self) -> None:
        """Let all streams go on. Raises torch.AcceleratorError: something has spoiled the capture."""
        for stream in self._streams:
            stream.capture = None
        if not self.valid:
            raise cuda_error(CAPTURE_INVALIDATED)


def refuse_in_capture(
    machine: Machine, stream: Stream | None = None, mark: Work | None = None, *, device: Device | None = None
) -> None:
    """Raise what a call gets that is not allowed while a graph is captured.

    Args:
        stream, mark, device: what the call waits for or asks about, if it does. A mark is part of its graph for good.
    """
    for capture in list(machine.capturing):
        concerns = (
            (mark is not None and mark.capture is capture)
            or (mark is None and stream is not None and stream.capture is capture)
            or (device is not None and capture.origin.owner is device)
        )
        unsafe = capture.mode == "global" or (
            capture.mode == "thread_local" and capture.thread == threading.get_ident()
        )
        if concerns or unsafe:
            capture.valid = False
            machine.counts["refused_in_capture"] += 1
            raise cuda_error(CAPTURE_UNSUPPORTED)
    if mark is not None and mark.capture is not None:
        raise cuda_error(CAPTURED_EVENT)
