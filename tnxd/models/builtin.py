"""The models that come with the daemon. torch is imported when one is built, not before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnxctl.protocol.errors import NotFound
from tnxctl.protocol.wire import TensorSpec
from tnxd.models.catalog import Entry
from tnxd.models.model import Model

if TYPE_CHECKING:
    import torch


def _mlp() -> torch.nn.Module:
    from tnxd.models import networks

    return networks.mlp()


def _digits() -> torch.nn.Module:
    from tnxd.models import networks

    return networks.digits()


BUILTIN: dict[str, Model] = {
    "mlp": Model(
        name="mlp",
        version="1",
        inputs=(TensorSpec("input", "FP32", (-1, 256)),),
        outputs=(TensorSpec("output", "FP32", (-1, 128)),),
        max_batch_size=64,
        factory=_mlp,
    ),
    "digits": Model(
        name="digits",
        version="1",
        inputs=(TensorSpec("image", "FP32", (-1, 64)),),
        outputs=(TensorSpec("scores", "FP32", (-1, 10)),),
        max_batch_size=64,
        factory=_digits,
    ),
}

STANDARD = tuple(BUILTIN)
"""What a daemon without a model repository serves if nothing else is said."""


def builtin(name: str) -> Model:
    """The built-in model of that name. Raises NotFound."""
    try:
        return BUILTIN[name]
    except KeyError:
        raise NotFound(f"no built-in model {name!r}; there are {', '.join(BUILTIN)}") from None


@dataclass(frozen=True)
class BuiltinSource:
    """Implements `tnxd.models.catalog.Source`."""

    model: Model
    format: str = "built-in"
    stamp: str = ""
    nbytes: int = 0
    steps: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def version(self) -> str:
        return self.model.version

    def open(self, generation: int) -> Model:
        return self.model


def builtin_entries(names: Iterable[str]) -> dict[str, Entry]:
    """Catalog entries of built-in models. Raises NotFound."""
    models = [builtin(name) for name in names]
    return {
        model.name: Entry(model.name, {model.version: BuiltinSource(model)}, wanted=(model.version,))
        for model in models
    }
