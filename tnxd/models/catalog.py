"""The catalog: names of models, the versions that there are, and those that are wanted. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tnxd.models.model import Model


class Source(Protocol):
    """Source of one version of one model, before it is loaded.

    Attributes:
        name, version: what it will be called.
        format: "built-in", "pt2", "safetensors", "torchscript" or "onnx".
        stamp: equal as long as nothing has changed that a load would read.
        nbytes: of its weights, as far as known before loading them; 0 if unknown.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def stamp(self) -> str: ...
    @property
    def nbytes(self) -> int: ...

    def open(self, generation: int) -> Model:
        """Open a version: read as much as its signature takes. Slow, and may run the model's own code.

        Raises:
            TensorNextError: the version cannot be served; the sentence names file and key.
            Exception: whatever the model's code raised.
        """


@dataclass(frozen=True)
class Entry:
    """Catalog entry of one name.

    Attributes:
        sources: every version that there is, from the oldest to the newest.
        wanted: those to load.
        weights, shadow: how its traffic is split at first, see `tnxctl.protocol.wire.Route`.
    """

    name: str
    sources: Mapping[str, Source]
    wanted: tuple[str, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    shadow: str = ""


@dataclass(frozen=True)
class Catalog:
    """All entries, by name.

    Attributes:
        failures: what is there but cannot be served, by NAME, NAME@VERSION or path, and why.
    """

    entries: Mapping[str, Entry]
    failures: Mapping[str, str] = field(default_factory=dict)
