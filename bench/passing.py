"""1 MiB in and 1 MiB out through a model that does next to nothing: what the daemon's copies cost.

Run as a program, this is a tnxd with one model more, `pass`, which gives back what it gets.
"""

from __future__ import annotations

import numpy as np
import torch

from tnxctl.protocol import wire
from tnxd.cli import main
from tnxd.models.builtin import BUILTIN
from tnxd.models.model import Model
from workload import Array, Workload

MODEL = "pass"


def mebibyte() -> Workload:
    """Requests of 1 MiB for the model `pass`: float32 [1, 262144]."""
    return workload(np.arange(1 << 18, dtype=np.float32).reshape(1, -1))


def workload(array: Array, *, prefer_gpu: bool = False) -> Workload:
    """Requests with one array for the model `pass`: float32, two axes."""
    return Workload(MODEL, "x", [array], [array], tolerance=0.0, prefer_gpu=prefer_gpu)


def _register() -> None:
    BUILTIN[MODEL] = Model(
        name=MODEL,
        version="1",
        inputs=(wire.TensorSpec("x", "FP32", (-1, -1)),),
        outputs=(wire.TensorSpec("y", "FP32", (-1, -1)),),
        max_batch_size=0,  # no batch axis: nothing is gathered, every request is run as it came
        factory=torch.nn.Identity,
    )


if __name__ == "__main__":
    _register()
    main(prog_name="tnxd")
