"""CUDA devices: what NVIDIA's alone is. AMD's (ROCm) have the same names in torch."""

from __future__ import annotations

import torch

from tnxd.config import Config
from tnxd.device_kinds import CUDA
from tnxd.executors.accelerator import Accelerator
from tnxd.executors.accelerator_pool import AcceleratorPool
from tnxd.executors.accelerator_runner import AcceleratorRunner
from tnxd.executors.lane import OnDone
from tnxd.executors.optimizer import optimizer_for

_CUDA_ERROR_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation


class Cuda(Accelerator):
    """A CUDA device. Streams and events are those of torch.cuda.

    Its events may be recorded on, and waited for by, its streams alone: torch 2.13 does not look whether it is given
    one, and reads beyond the end of a `torch.Stream`. The other way round, and with their own kind, both can be mixed.
    """

    @property
    def description(self) -> str:
        return torch.cuda.get_device_name(self.index)

    def stream(self, *, first: bool) -> torch.Stream:
        return torch.cuda.Stream(self.torch_device, priority=-1 if first else 0)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.Stream:
        return torch.cuda.current_stream(self.torch_device)

    def event(self) -> torch.Event:
        # torch.Event takes `blocking`, and a wait for it would use a core all the same (torch 2.13).
        return torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def memory_info(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.index)

    def is_exhausted(self, error: BaseException) -> bool:
        # What torch's allocator has no part in: pinned memory (pytorch/pytorch#128601).
        return isinstance(error, torch.AcceleratorError) and (
            getattr(error, "error_code", 0) == _CUDA_ERROR_MEMORY_ALLOCATION
        )


def cuda_names() -> list[str]:
    """Names of the CUDA devices of this machine."""
    return [f"{CUDA.name}:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def open_cuda(name: str, config: Config, on_done: OnDone) -> AcceleratorPool:
    """The executor of a CUDA device. Raises what the driver raises."""
    accelerator = Cuda(name)
    return AcceleratorPool(
        CUDA.name,
        accelerator,
        lambda depth: AcceleratorRunner(accelerator, depth),
        threads=config.cuda.lanes,
        depth=config.cuda.depth,
        optimizer=optimizer_for(CUDA.name, config),
        on_done=on_done,
    )
