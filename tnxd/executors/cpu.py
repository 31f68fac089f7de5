"""The CPU: a pool of threads, each a lane with its own share of the cores."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tnxctl.frames import Array
from tnxd.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.runner import Replicas, Runner
from tnxd.executors.tensors import check_outputs, to_array, to_tensor
from tnxd.models.model import Item

# MKL cuts larger weights into blocks that it copies anyway: what one batch size gains, another loses.
_MOST_ORDERED = 1 << 20


def order_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Store the weights of linear layers input by input. The values stay the same, MKL is faster.

    A Linear has its weight output by output, [out, in], and multiplies by the transpose. Where memory holds that
    transpose, batches of up to 64 rows take 0.55 to 0.95 of the time on one thread: see docs/performance.md.

    Left alone are weights that another kind of layer uses too, as an Embedding may, which reads them row by row, and a
    module that says `keeps_layout`.
    """
    if getattr(module, "keeps_layout", False):
        return module
    layers = list(module.modules())
    linear = [layer for layer in layers if type(layer) is torch.nn.Linear]  # a subclass may do anything
    others = {
        id(parameter)
        for layer in layers
        if type(layer) is not torch.nn.Linear
        for parameter in layer.parameters(recurse=False)
    }
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return module
    for layer in linear:
        weight = layer.weight
        if weight.dtype is torch.float32 and weight.numel() <= _MOST_ORDERED and id(weight) not in others:
            weight.data = weight.data.t().contiguous().t()
    return module


def choose_threads(cores: int, workers: int = 0, threads: int = 0) -> tuple[int, int]:
    """Workers of the pool and torch threads in each, so that together they fill the cores but one.

    One core is left to the thread that serves the socket. Up to four threads work on one batch: beyond that small
    models gain little, and several batches at a time hide each other's serial parts. What is given (not 0) stays.
    """
    spare = max(cores - 1, 1)
    if not threads:
        threads = max(spare // workers, 1) if workers else max(min(4, spare // 2), 1)
    if not workers:
        workers = max(spare // threads, 1)
    return workers, threads


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def host_memory_mb() -> tuple[float, float]:
    """Available and total memory of the host in MiB; zeros where /proc is missing."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) / 1024, int(fields["MemTotal"].split()[0]) / 1024
    except (OSError, KeyError, ValueError):
        return 0.0, 0.0


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    # torch's CPU allocator aligns to 64 bytes, numpy's to 16.
    size = int(np.prod(shape)) * dtype.itemsize
    array: Array = torch.empty(size, dtype=torch.uint8).numpy().view(dtype).reshape(shape)
    return array


class CpuRunner(Runner):
    """Runs batches on the calling thread.

    Args:
        threads: torch threads that one forward may use.
    """

    def __init__(self, replicas: Replicas, threads: int) -> None:
        super().__init__("cpu", replicas, Staging(_aligned))
        self._threads = threads

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.get_num_threads()  # a thread's first look at its pool would undo a number set before it
        torch.set_num_threads(self._threads)

    def free_memory(self) -> None:
        """Nothing to do: what the C library keeps it takes for what comes next."""

    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        model = execution.model
        begin = time.perf_counter_ns()
        arrays: Sequence[Array | None] = items[0]
        gather = len(items) > 1
        if gather:
            arrays = self.staging.gather(model.key, model.inputs, execution.group, items, rows)
        tensors = [
            None if array is None else to_tensor(array, spec.datatype)
            for array, spec in zip(arrays, model.inputs, strict=True)
        ]
        gathered = time.perf_counter_ns()
        raw = self.replicas[model.key](*tensors)
        done = time.perf_counter_ns()
        execution.gather_us += (gathered - begin) / 1e3
        execution.latency_us += (done - gathered) / 1e3
        outputs = [to_array(tensor) for tensor in check_outputs(model, raw, rows)]
        if gather:
            # A model may hand its input through; the next batch would overwrite what is still being sent.
            return [
                output.copy()
                if any(array is not None and np.may_share_memory(output, array) for array in arrays)
                else output
                for output in outputs
            ]
        return outputs
