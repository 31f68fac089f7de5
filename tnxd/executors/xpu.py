"""Intel GPUs (XPU), through what torch knows of all accelerators alike. No such device has run this."""

from __future__ import annotations

import torch

from tnxd.config import Config
from tnxd.device_kinds import XPU
from tnxd.executors.accelerator import Accelerator, accelerator_names
from tnxd.executors.accelerator_pool import AcceleratorPool
from tnxd.executors.accelerator_runner import AcceleratorRunner
from tnxd.executors.lane import OnDone
from tnxd.executors.optimizer import optimizer_for


class Xpu(Accelerator):
    """An Intel GPU. Streams, events and pinned memory are torch's own."""

    @property
    def description(self) -> str:
        return torch.xpu.get_device_name(self.index)

    def memory_info(self) -> tuple[int, int]:
        return torch.xpu.mem_get_info(self.index)


def xpu_names() -> list[str]:
    """Names of the Intel GPUs of this machine."""
    return accelerator_names(XPU)


def open_xpu(name: str, config: Config, on_done: OnDone) -> AcceleratorPool:
    """The executor of an Intel GPU. Raises what the driver raises."""
    accelerator = Xpu(name)
    return AcceleratorPool(
        XPU.name,
        accelerator,
        lambda depth: AcceleratorRunner(accelerator, depth),
        threads=config.xpu.lanes,
        depth=config.xpu.depth,
        optimizer=optimizer_for(XPU.name, config),
        on_done=on_done,
    )
