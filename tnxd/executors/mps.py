"""The GPU of an Apple computer (MPS): one lane, which waits for each batch. No such device has run this.

torch has one stream there, and events that take no other; no pinned memory, since host and device share theirs; no
peak of memory, and no FP64. So nothing overlaps: a batch is copied, computed and copied back. A model that wants FP64
does not load there, and its notes say so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import MIB
from tnxd.config import Config
from tnxd.device_kinds import MPS
from tnxd.executors.accelerator import accelerator_names
from tnxd.executors.batching import Staging
from tnxd.executors.execution import Execution
from tnxd.executors.host import Peak
from tnxd.executors.lane import OnDone
from tnxd.executors.optimizer import optimizer_for
from tnxd.executors.pool import LanePool
from tnxd.executors.runner import Runner
from tnxd.models.model import Item
from tnxd.models.tensors import Value, check_outputs, to_array, to_tensor


def _memory() -> tuple[int, int]:
    """Free and total bytes of what Metal recommends to use. What torch's allocator keeps unused counts as free."""
    total = torch.mps.recommended_max_memory()
    return max(total - torch.mps.current_allocated_memory(), 0), total


class MpsRunner(Runner):
    """Runner of the GPU of an Apple computer. Args: device: name of the device, as torch has it."""

    def __init__(self, device: str = MPS.name) -> None:
        super().__init__(device, Staging(_plain))

    def enter_thread(self) -> None:
        super().enter_thread()
        torch.set_num_threads(1)

    def is_lost(self) -> bool:
        try:
            torch.mps.synchronize()
        except RuntimeError:
            return True
        return False

    def free_memory(self, *, emptied: bool) -> None:
        if not emptied:
            torch.mps.empty_cache()

    def memory_left(self) -> int:
        return _memory()[0]

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        """Measure memory of the device, other lanes' meanwhile included: what the allocator has taken and keeps."""
        peak = Peak()
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        try:
            yield peak
        finally:
            peak.nbytes = max(torch.mps.driver_allocated_memory() - before, 0)

    def run(self, execution: Execution) -> None:
        super().run(execution)
        if not execution.fatal:  # else there is nobody to ask
            execution.memory_free_mb = _memory()[0] / MIB

    def forward(self, execution: Execution, items: Sequence[Item], rows: int) -> list[Array]:
        model = execution.model
        begin = time.perf_counter_ns()
        arrays = self.staged(execution, items, rows, copy=False)
        gathered = time.perf_counter_ns()
        inputs = [
            None if array is None else self._moved(to_tensor(array, spec.datatype))
            for array, spec in zip(arrays, model.arguments, strict=True)
        ]
        torch.mps.synchronize()
        copied = time.perf_counter_ns()
        tensors = check_outputs(model, self.call(execution)(*inputs), rows)
        torch.mps.synchronize()
        computed = time.perf_counter_ns()
        # A copy, also where a model hands its input through: the next batch writes the staging buffers again.
        outputs = [
            np.array(to_array(value.cpu() if isinstance(value, torch.Tensor) else value), order="C")
            for value in tensors
        ]
        returned = time.perf_counter_ns()
        execution.gather_us += (gathered - begin) / 1e3
        execution.h2d_us += (copied - gathered) / 1e3
        execution.latency_us += (computed - copied) / 1e3
        execution.d2h_us += (returned - computed) / 1e3
        return outputs

    def _moved(self, value: Value) -> Value:
        """An input on the device. Strings stay on the host."""
        return value.to(self.torch_device) if isinstance(value, torch.Tensor) else value


def _plain(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return np.empty(shape, dtype)


def mps_names() -> list[str]:
    """Names of such devices of this machine: one, or none."""
    return accelerator_names(MPS)


def open_mps(name: str, config: Config, on_done: OnDone) -> LanePool:
    """The executor of the GPU of an Apple computer. Raises RuntimeError: there is none."""
    if not torch.backends.mps.is_available():
        raise RuntimeError("this machine has no GPU that Metal can use, or this torch cannot use it")
    return LanePool(
        name,
        MPS.name,
        "Apple GPU",
        make_runner=MpsRunner,
        lanes=1,
        inline=None,
        place=lambda module: module.to(name),
        memory_mb=lambda: (_memory()[0] / MIB, _memory()[1] / MIB),
        give_back=torch.mps.empty_cache,
        settle=torch.mps.synchronize,
        optimizer=optimizer_for(MPS.name, config),
        on_done=on_done,
    )
