"""Executors of this machine: one for each configured device that can be opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tnxd.config import Config
from tnxd.device_kinds import CPU, CUDA, KINDS, MPS, PROCESS, XPU, kind_of
from tnxd.executors.cpu import cpu_names, open_cpu
from tnxd.executors.cuda import cuda_names, open_cuda
from tnxd.executors.lane import OnDone
from tnxd.executors.mps import mps_names, open_mps
from tnxd.executors.pool import LanePool
from tnxd.executors.processes import open_processes, process_names
from tnxd.executors.xpu import open_xpu, xpu_names


class _Opener(NamedTuple):
    """A kind of device on this machine. Attributes: names: finds the devices. open: makes the executor of one."""

    names: Callable[[], list[str]]
    open: Callable[[str, Config, OnDone], LanePool]


_OPENERS = {
    CUDA.name: _Opener(cuda_names, open_cuda),
    XPU.name: _Opener(xpu_names, open_xpu),
    MPS.name: _Opener(mps_names, open_mps),
    CPU.name: _Opener(cpu_names, open_cpu),
    PROCESS.name: _Opener(process_names, open_processes),
}
"""Kind -> how it is opened. "auto" is all kinds in this order, which scheduling prefers among equals."""


@dataclass
class OpenedDevices:
    """Executors by device name, and the error of each device that could not be opened."""

    executors: dict[str, LanePool] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def open_devices(config: Config, on_done: OnDone) -> OpenedDevices:
    """Open the configured devices; "auto" is every device of this machine. One that fails does not stop the rest.

    Args:
        on_done: see `LanePool`.
    """
    opened = OpenedDevices()
    for name in _names(config.devices):
        try:
            opened.executors[name] = _OPENERS[kind_of(name)].open(name, config, on_done)
        except Exception as error:  # drivers fail in many ways; none of them is the daemon's end
            opened.failures[name] = f"{type(error).__name__}: {error}"
    return opened


def _names(configured: Sequence[str]) -> list[str]:
    """Names of devices as configured, each once; a numbered kind without a number is its first device."""
    names: list[str] = []
    for name in configured:
        if name == "auto":
            names += [found for opener in _OPENERS.values() for found in opener.names()]
        else:
            names.append(f"{name}:0" if name in KINDS and KINDS[name].numbered else name)
    return list(dict.fromkeys(names))
