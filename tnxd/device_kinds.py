"""Kinds of devices, and the differences between them that the rest of the daemon goes by. No torch.

A new kind is an entry here, a module beside `tnxd/executors/xpu.py` with an entry in `tnxd/executors/devices.py`, and a
limit of its memory in `tnxd/config.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Attributes:
        name: torch's name of the device type. Names of devices begin with it.
        numbered: whether a machine may have several, with a number in their names ("cuda:0").
        is_gpu: whether requests may prefer it, and ask for free memory there: it has memory of its own and reports it.
        has_streams: whether each lane has a queue of its own on the device. Else forwards of lanes run on threads that
            may change places at any instruction.
        survives_bad_index: whether an index out of range fails one forward alone. Else it is the end of the device's
            context, for all models.
        has_generator: whether random numbers come from generators of its own, those of torch.NAME.
        has_tf32: whether convolutions of FP32 may keep 10 bits of the mantissa (torch.backends.cudnn.allow_tf32).
    """

    name: str
    numbered: bool
    is_gpu: bool
    has_streams: bool
    survives_bad_index: bool
    has_generator: bool
    has_tf32: bool


CPU = DeviceKind(
    "cpu",
    numbered=False,
    is_gpu=False,
    has_streams=False,
    survives_bad_index=True,
    has_generator=False,
    has_tf32=False,
)
CUDA = DeviceKind(
    "cuda",
    numbered=True,
    is_gpu=True,
    has_streams=True,
    survives_bad_index=False,
    has_generator=True,
    has_tf32=True,
)
"""GPUs of NVIDIA. AMD's have the same name in a torch that was built for them (ROCm), which nothing has run."""

XPU = DeviceKind(
    "xpu",
    numbered=True,
    is_gpu=True,
    has_streams=True,
    survives_bad_index=False,
    has_generator=True,
    has_tf32=False,
)
"""GPUs of Intel. None has run any of this."""

MPS = DeviceKind(
    "mps",
    numbered=False,
    is_gpu=True,
    has_streams=False,
    survives_bad_index=True,
    has_generator=False,
    has_tf32=False,
)
"""The GPU of an Apple computer. None has run any of this."""

PROCESS = DeviceKind(
    "process",
    numbered=False,
    is_gpu=False,
    has_streams=False,
    survives_bad_index=True,
    has_generator=False,
    has_tf32=False,
)
"""Processes beside the daemon, each of which runs one model: a device for models that ask for them, and for no others.
There is one as soon as a model does."""

KINDS = {kind.name: kind for kind in (CPU, CUDA, XPU, MPS, PROCESS)}
"""All kinds, by name."""

CHOSEN = (CPU, CUDA, XPU, MPS)
"""Kinds that a configuration, or a model, chooses from."""

DEVICE = re.compile("|".join([rf"{kind.name}(:\d+)?" if kind.numbered else kind.name for kind in CHOSEN]))
"""Matches the name of a device, or of a numbered kind."""

DEVICES = ", ".join([f"{kind.name}, {kind.name}:N" if kind.numbered else kind.name for kind in CHOSEN])
"""Names that `DEVICE` matches, for an error message."""


def kind_of(device: str) -> str:
    """The name of the kind of a device, given the device's name: "cuda" of "cuda:1"."""
    return device.partition(":")[0]
