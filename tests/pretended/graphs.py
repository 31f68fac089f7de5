"""Graphs of pretended devices, with the surface of `torch.cuda.CUDAGraph` and of `torch.accelerator.Graph`.

A graph holds the work that was issued to a stream while it was captured, and does it anew on the same memory with each
replay. What the program computed beside, a number for instance, it does not compute again.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from pretended.capture import MODES, Capture
from pretended.errors import CAPTURE_UNSUPPORTED, cuda_error
from pretended.streams import active
from pretended.work import Work

_pools = itertools.count(1)


def pool_handle() -> tuple[int, int]:
    """`torch.cuda.graph_pool_handle`. Memory of a pool is not shared between graphs here."""
    return (0, next(_pools))


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.machine = active.machine
        self._capture: Capture | None = None
        self._captured = False
        self._pool = pool_handle()

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        """Capture what is issued to the current stream from now on, rather than do it."""
        if capture_error_mode not in MODES:
            raise RuntimeError(f"Unknown capture error mode. Expected one of {MODES}, got {capture_error_mode}")
        machine = self.machine
        stream = machine.current_stream()
        if stream == stream.owner.default_stream:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if self._captured or self._capture is not None:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        with machine.lock:
            machine.settle()
            stream.owner.check()
            if stream.capture is not None:
                raise cuda_error(CAPTURE_UNSUPPORTED)
            self._capture = Capture(stream, capture_error_mode)
            machine.capturing.append(self._capture)
        self._pool = pool or self._pool

    def capture_end(self) -> None:
        """End the capture. Raises torch.AcceleratorError: something has spoiled it."""
        if self._capture is None:
            raise RuntimeError("capture_end() called before capture_begin()")
        with self.machine.lock:
            self.machine.settle()
            self.machine.capturing.remove(self._capture)
            try:
                self._capture.end()
            except RuntimeError:
                self.reset()
                raise
            self._captured = True

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        """Issue all work of the graph to the current stream."""
        if not self._captured or self._capture is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        machine = self.machine
        machine.counts["replays"] += 1
        works = self._capture.works
        stream = machine.current_stream(self._capture.origin.device)
        if works:
            machine.issue(stream, Work(stream, lambda: _run(works)))

    def reset(self) -> None:
        """Forget the graph, and free its memory."""
        if self._capture is not None:
            with self.machine.lock:
                self.machine.settle()
                self._capture.origin.owner.memory.free_pool(self._capture)
        self._capture, self._captured = None, False

    def pool(self) -> tuple[int, int]:
        return self._pool

    def enable_debug_mode(self) -> None: ...

    def __del__(self) -> None:
        if self._capture is not None and self._captured:
            capture, memory = self._capture, self._capture.origin.owner.memory
            self.machine.freed.append(lambda: memory.free_pool(capture))


def _run(works: list[Work]) -> None:
    for work in works:
        work.run()


class Graph(CUDAGraph):
    """`torch.accelerator.Graph`: takes when it is made what that of CUDA takes when it captures."""

    def __init__(
        self, keep_graph: bool = False, *, pool: tuple[int, int] | None = None, capture_error_mode: str = "default"
    ) -> None:
        super().__init__(keep_graph)
        self.graph_pool = pool
        self.capture_error_mode = capture_error_mode
        self._before: Any = None

    def capture_begin(self) -> None:  # type: ignore[override]
        mode = "global" if self.capture_error_mode == "default" else self.capture_error_mode
        super().capture_begin(self.graph_pool, mode)

    def __enter__(self) -> Graph:
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        self.capture_begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self.capture_end()
