"""Executor of the CPU: each lane is a thread for one core, and some have a team of threads for wide batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from tnxctl import malloc
from tnxctl.protocol.datatypes import Array
from tnxd.config import Config
from tnxd.device_kinds import CPU
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.host import (
    Peak,
    available_cores,
    free_memory,
    host_memory_mb,
    peak_memory,
    plan_lanes,
)
from tnxd.executors.lane import OnDone
from tnxd.executors.optimizer import optimizer_for
from tnxd.executors.pool import LanePool
from tnxd.executors.runner import Runner
from tnxd.executors.team import Team
from tnxd.models.model import Item
from tnxd.models.python.module import InThread
from tnxd.models.tensors import check_outputs, to_array, to_tensor

# MKL cuts larger weights into blocks that it copies anyway: what one batch size gains, another loses.
_MOST_ORDERED = 1 << 20


def order_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Store the weights of linear layers input by input, in place. The values stay the same, MKL is faster.

    A Linear has its weight output by output, [out, in], and multiplies by the transpose. Where memory holds that
    transpose, batches of up to 64 rows take 0.55 to 0.95 of the time on one thread: see docs/performance.md.

    Two things are left alone: a weight that another kind of layer uses too, such as an Embedding, which reads it row by
    row, and a module that says `keeps_layout`.
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


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    # torch's CPU allocator aligns to 64 bytes, numpy's to 16.
    size = int(np.prod(shape)) * dtype.itemsize
    array: Array = torch.empty(size, dtype=torch.uint8, device="cpu").numpy().view(dtype).reshape(shape)
    return array


class CpuRunner(Runner):
    """Runner of the CPU. A forward has as many torch threads as its execution says.

    Args:
        name: of the device, in errors.
    """

    def __init__(self, name: str = CPU.name) -> None:
        super().__init__(CPU.name, Staging(_aligned))
        self.device = name
        self._team = Team()

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.get_num_threads()  # a thread's first look at its pool would undo a number set before it
        torch.set_num_threads(1)

    def free_memory(self, *, emptied: bool) -> None:
        """Nothing to do: the C library reuses the memory that it keeps."""

    def memory_left(self) -> int:
        return free_memory()

    def measured(self) -> AbstractContextManager[Peak]:
        malloc.trim()  # memory that the C library keeps and uses again would not show
        return peak_memory()

    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        model = execution.model
        begin = time.perf_counter_ns()
        if execution.threads != torch.get_num_threads():  # asked for, as a restoration may have set another number
            torch.set_num_threads(execution.threads)  # 0.2 us, and the forward after it is none the slower
        if execution.threads > 1:
            self._team.spread(execution.threads)
        gather = len(items) > 1
        arrays = self.staged(execution, items, rows, copy=False) if gather or model.joins else items[0]
        tensors = [
            None if array is None else to_tensor(array, spec.datatype)
            for array, spec in zip(arrays, model.arguments, strict=True)
        ]
        gathered = time.perf_counter_ns()
        raw = self.call(execution)(*tensors)
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


def cpu_names() -> list[str]:
    """Names of the CPUs of this machine: one, whatever the number of cores."""
    return [CPU.name]


def _placed(module: torch.nn.Module) -> torch.nn.Module:
    return module.to(CPU.name) if isinstance(module, InThread) else module  # which loads it for this device


def open_cpu(name: str, config: Config, on_done: OnDone) -> LanePool:
    """The executor of the CPU."""
    cores = available_cores()
    lanes, teams = plan_lanes(cores, config.cpu.workers, config.cpu.threads)
    # What threads that come later begin with, those that load models too: only lanes with a team have more than one.
    torch.set_num_threads(1)
    wide = f", up to {teams.threads} on one batch" if teams.lanes else ""
    return LanePool(
        name,
        CPU.name,
        f"{cores} core{'s' if cores > 1 else ''}{wide}",
        make_runner=CpuRunner,
        lanes=lanes,
        inline=CpuRunner(),
        teams=teams,
        scheduling=config.cpu.scheduling,
        place=_placed,
        arrange=order_weights,
        memory_mb=host_memory_mb,
        give_back=malloc.trim,
        optimizer=optimizer_for(CPU.name, config, teams.threads),
        on_done=on_done,
    )
