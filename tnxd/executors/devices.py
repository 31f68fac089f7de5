"""Find the devices of this machine and make an executor for each that works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tnxd.config import Config
from tnxd.executors.cpu import CpuRunner, order_weights
from tnxd.executors.cuda import CudaMemory, CudaRunner
from tnxd.executors.host import available_cores, choose_threads, host_memory_mb
from tnxd.executors.pool import LanePool, OnDone
from tnxd.process import malloc as heap


@dataclass
class OpenedDevices:
    """Executors by device name, and for each device that could not be opened, why."""

    executors: dict[str, LanePool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def open_devices(config: Config, on_done: OnDone) -> OpenedDevices:
    """Open the configured devices; "auto" is every CUDA device and the CPU. One that fails does not stop the rest."""
    opened = OpenedDevices()
    for name in _names(config.devices):
        try:
            opened.executors[name] = (
                _open_cpu(config, on_done) if name == "cpu" else _open_cuda(name, config.cuda.lanes, on_done)
            )
        except Exception as error:  # drivers fail in many ways; none of them is the daemon's end
            opened.failures[name] = f"{type(error).__name__}: {error}"
    return opened


def _names(configured: Sequence[str]) -> list[str]:
    names: list[str] = []
    for name in configured:
        if name == "auto":
            names += (
                [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
            )
            names.append("cpu")
        else:
            names.append("cuda:0" if name == "cuda" else name)
    return list(dict.fromkeys(names))


def _open_cpu(config: Config, on_done: OnDone) -> LanePool:
    cores = available_cores()
    workers, threads = choose_threads(cores, config.cpu.workers, config.cpu.threads)
    torch.set_num_threads(min(torch.get_num_threads(), cores))  # where no lane runs, in loading: it knows no quota
    return LanePool(
        "cpu",
        "cpu",
        f"{cores} core{'s' if cores > 1 else ''}, {threads} per lane",
        make_runner=lambda: CpuRunner(threads),
        lanes=workers,
        inline=CpuRunner(1),
        lane_threads=threads,
        arrange=order_weights,
        memory_mb=host_memory_mb,
        give_back=heap.trim,
        on_done=on_done,
    )


def _open_cuda(name: str, lanes: int, on_done: OnDone) -> LanePool:
    index = torch.device(name).index
    memory = CudaMemory(index)
    return LanePool(
        name,
        "cuda",
        torch.cuda.get_device_name(index),
        make_runner=lambda: CudaRunner(index, memory),
        lanes=lanes,
        inline=None,
        place=lambda module: module.to(torch.device("cuda", index)),
        memory_mb=memory.latest,
        give_back=torch.cuda.empty_cache,
        on_done=on_done,
    )
