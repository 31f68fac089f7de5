"""Variants of a network: other programs that give the same answers, perhaps sooner. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

AUTO = "auto"
NONE = "none"

EXPORTED = ("inductor", "onnxruntime")
"""Names of the variants that are made of an exported program."""


class Workshop(NamedTuple):
    """Means to make a variant.

    Attributes:
        device: to run on, as torch has it.
        cache: directory that what was compiled is kept in; None: it is not kept.
        seconds: time that it may take.
        threads: of a team that batches may have on the device; 1: there are none.
    """

    device: torch.device
    cache: Path | None
    seconds: float
    threads: int = 1


Build = Callable[[], "torch.nn.Module"]
"""Builds a network anew."""


@dataclass(frozen=True)
class Variant:
    """A variant of a network.

    Attributes:
        name: as model.toml says it.
        kinds: of the devices that it is for.
        missing: what it needs and this computer lacks, in words; "": nothing.
        make: makes the module, from what builds the network on the device; it may change what it builds. May take
            minutes. Raises TensorNextError, with a sentence, where it cannot be made.
        beside: name of the variant that it is not tried beside where that one gains, since it takes long to make and
            seldom gains more.
    """

    name: str
    kinds: tuple[str, ...]
    missing: str
    make: Callable[[Build, Workshop], torch.nn.Module]
    beside: str = ""
