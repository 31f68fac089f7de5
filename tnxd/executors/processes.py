"""Executor of models that run in processes of their own: each lane is a thread that waits for one."""

from __future__ import annotations

from tnxctl import malloc
from tnxd.config import Config
from tnxd.device_kinds import PROCESS
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.host import available_cores, host_memory_mb
from tnxd.executors.lane import OnDone
from tnxd.executors.pool import LanePool

_LEAST_LANES = 8
_LANES_PER_CORE = 2
"""Lanes do nothing but wait. They bound how many processes work at a time, of all models together."""


def process_names() -> list[str]:
    """Names of such devices that are there from the start: none. The first model that asks for one opens it."""
    return []


def open_processes(name: str, config: Config, on_done: OnDone) -> LanePool:
    """The executor of processes. A batch that hangs in one takes no lane of the CPU's."""
    lanes = max(_LEAST_LANES, _LANES_PER_CORE * available_cores())
    return LanePool(
        name,
        PROCESS.name,
        "processes of isolated models",
        make_runner=lambda: CpuRunner(name),
        lanes=lanes,
        inline=None,
        memory_mb=host_memory_mb,
        give_back=malloc.trim,
        on_done=on_done,
    )
