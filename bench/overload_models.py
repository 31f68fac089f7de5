"""The models that `overload.py` puts under load: the daemon's own `mlp`, a wider one, and a ResNet-50.

Run as a program, this is a tnxd that has the others beside its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workload import VARIANTS, Array

if TYPE_CHECKING:
    import torch

_SEED = 50


def _mlp() -> torch.nn.Module:
    from tnxd.models import networks

    return networks.mlp()


def _wide() -> torch.nn.Module:
    import wide

    return wide.wide()


def _resnet50() -> torch.nn.Module:
    import resnet50

    return resnet50.ResNet50()


@dataclass(frozen=True)
class Served:
    """A model under load.

    Attributes:
        input_shape, output_shape: of one row, float32.
        max_batch_size: most rows in one forward.
        tolerance: of an output that is right: sums of many numbers differ by how they are batched.
        network: makes it. The weights come from torch's random numbers, which `build` seeds.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    max_batch_size: int
    tolerance: float
    network: Callable[[], torch.nn.Module]

    def build(self) -> torch.nn.Module:
        """The module, in eval mode and always with the same weights."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return self.network().eval().requires_grad_(False)

    def samples(self, rows: int) -> tuple[Array, Array]:
        """Inputs of so many rows that take turns, and the outputs that they must give: [K, rows, ...] each."""
        import torch

        torch.set_num_threads(1)
        inputs = np.random.default_rng(rows).standard_normal((VARIANTS, rows, *self.input_shape), np.float32)
        module = self.build()
        with torch.inference_mode():
            outputs = [module(torch.from_numpy(array)).numpy() for array in inputs]
        return inputs, np.stack(outputs)


MODELS = {
    "mlp": Served((256,), (128,), 64, 1e-4, _mlp),
    "wide": Served((768,), (768,), 64, 1e-4, _wide),
    "resnet50": Served((3, 224, 224), (1000,), 8, 1e-3, _resnet50),
}

INPUT = "input"
"""The name that all of them give their input."""


def _register() -> None:
    from tnxctl.protocol.wire import TensorSpec
    from tnxd.models.builtin import BUILTIN
    from tnxd.models.model import Model

    for name, served in MODELS.items():
        if name not in BUILTIN:
            BUILTIN[name] = Model(
                name=name,
                version="1",
                inputs=(TensorSpec(INPUT, "FP32", (-1, *served.input_shape)),),
                outputs=(TensorSpec("output", "FP32", (-1, *served.output_shape)),),
                max_batch_size=served.max_batch_size,
                factory=served.build,
            )


if __name__ == "__main__":
    _register()
    from tnxd.cli import main

    main(prog_name="tnxd")
