"""Executors of CUDA devices: each lane is a thread with a stream and pinned staging buffers of its own.

Copies are asynchronous and ordered by the stream. While the batch of one lane computes, that of another is copied.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.wire import BYTES, MIB
from tnxd.config import Config
from tnxd.device_kinds import CUDA
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.host import Peak
from tnxd.executors.lane import OnDone
from tnxd.executors.optimizer import optimizer_for
from tnxd.executors.pool import LanePool
from tnxd.executors.runner import Runner
from tnxd.models.model import Item
from tnxd.models.tensors import Value, check_outputs, to_array, to_tensor

_MEMORY_PERIOD_S = 1.0
_CUDA_ERROR_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    pinned = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    array: Array = pinned.numpy().view(dtype).reshape(shape)
    return array


class CudaMemory:
    """Free and total memory of one device in MiB, sampled on a thread: the driver may block, the serving loop may not.

    Memory that torch's allocator holds but does not use counts as free: the next batch takes it from there.

    Raises:
        RuntimeError: the driver does not answer.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self.free_mb, self.total_mb = self.sample()
        threading.Thread(target=self._watch, name=f"cuda:{index}/memory", daemon=True).start()

    def sample(self) -> tuple[float, float]:
        """Ask the driver for free and total memory in MiB. May block. Raises RuntimeError: the device is gone."""
        free, total = torch.cuda.mem_get_info(self._index)
        unused = torch.cuda.memory_reserved(self._index) - torch.cuda.memory_allocated(self._index)
        return (free + unused) / MIB, total / MIB

    def latest(self) -> tuple[float, float]:
        """The newest sample: free and total memory in MiB. Never blocks."""
        return self.free_mb, self.total_mb

    def _watch(self) -> None:
        while True:
            time.sleep(_MEMORY_PERIOD_S)
            try:
                self.free_mb, self.total_mb = self.sample()
            except RuntimeError:  # if the device is gone, its lanes report that with the next batch
                self.free_mb = 0.0


class CudaRunner(Runner):
    """Runner of a CUDA device, with a stream of its own. Args: index: of the device."""

    def __init__(self, index: int, memory: CudaMemory) -> None:
        super().__init__(f"cuda:{index}", Staging(_pinned))
        self._device = self.torch_device
        self._memory = memory
        self._stream: torch.cuda.Stream | None = None
        self._events: list[torch.cuda.Event] = []

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.set_num_threads(1)
        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        torch.cuda.set_stream(self._stream)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]

    def is_lost(self) -> bool:
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False  # an error of one call, such as a refused launch, and not of the device

    def is_exhausted(self, error: BaseException) -> bool:
        if super().is_exhausted(error):
            return True
        # What torch's allocator has no part in: pinned memory (pytorch/pytorch#128601).
        if isinstance(error, torch.AcceleratorError):
            return getattr(error, "error_code", 0) == _CUDA_ERROR_MEMORY_ALLOCATION
        return False

    def free_memory(self) -> None:
        with contextlib.suppress(RuntimeError):  # if the device is gone, the next forward says so
            torch.cuda.empty_cache()

    def memory_left(self) -> int:
        return int(self._memory.sample()[0] * MIB)

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        """Measure memory on all streams of the device: forwards of other lanes meanwhile count too."""
        peak = Peak()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        try:
            yield peak
        finally:
            peak.nbytes = max(torch.cuda.max_memory_allocated(self._device) - before, 0)

    def _moved(self, value: Value) -> Value:
        """An input on the device. Strings stay on the host."""
        return value.to(self._device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    def run(self, execution: Execution) -> None:
        super().run(execution)
        execution.memory_free_mb = self._memory.free_mb

    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        model = execution.model
        begin = time.perf_counter_ns()
        if model.max_batch_size:
            staged = self.staged(execution, items, rows, copy=True)
        else:
            staged = []
            for array, spec in zip(items[0], model.inputs, strict=True):
                if array is None:
                    staged.append(None)
                    continue
                if spec.datatype == BYTES:
                    staged.append(array)
                    continue
                buffer = _pinned(array.shape, STORAGE[spec.datatype])
                np.copyto(buffer, array)
                staged.append(buffer)
        execution.gather_us += (time.perf_counter_ns() - begin) / 1e3
        start, copied, computed, returned = self._events
        try:
            start.record()
            inputs = [
                None if array is None else self._moved(to_tensor(array, spec.datatype))
                for array, spec in zip(staged, model.arguments, strict=True)
            ]
            copied.record()
            tensors = check_outputs(model, self.call(execution)(*inputs), rows)
            computed.record()
            hosts = [_returned(tensor) for tensor in tensors]
            returned.record()
        finally:
            # Also after a failure: the staging buffers may not be written while a copy still reads them.
            assert self._stream is not None
            self._stream.synchronize()
        execution.h2d_us += start.elapsed_time(copied) * 1e3
        execution.latency_us += copied.elapsed_time(computed) * 1e3
        execution.d2h_us += computed.elapsed_time(returned) * 1e3
        return [to_array(host) for host in hosts]


def _returned(value: Value) -> Value:
    """An output on the host."""
    if not isinstance(value, torch.Tensor):
        return value
    # Fresh from torch's pinned-memory cache, not a buffer of ours: a reply may still be reading the last one.
    host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    host.copy_(value)  # blocking: pinned memory would remember the stream, and ask a lost device on free
    return host


def cuda_names() -> list[str]:
    """Names of the CUDA devices of this machine."""
    return [f"{CUDA.name}:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def open_cuda(name: str, config: Config, on_done: OnDone) -> LanePool:
    """The executor of a CUDA device. Raises what the driver raises."""
    index = torch.device(name).index
    memory = CudaMemory(index)
    return LanePool(
        name,
        CUDA.name,
        torch.cuda.get_device_name(index),
        make_runner=lambda: CudaRunner(index, memory),
        lanes=config.cuda.lanes,
        inline=None,
        place=lambda module: module.to(torch.device("cuda", index)),
        memory_mb=memory.latest,
        give_back=torch.cuda.empty_cache,
        optimizer=optimizer_for(CUDA.name, config),
        on_done=on_done,
    )
