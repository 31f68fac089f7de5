"""The catalog: names of models, the versions that there are, and those that are wanted. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from tnxd.models.model import Model


class Source(Protocol):
    """Source of one version of one model, before it is loaded.

    Attributes:
        name, version: what it will be called.
        format: "built-in", "pt2", "safetensors", "torchscript", "onnx" or "pipeline".
        stamp: equal as long as nothing has changed that a load would read.
        nbytes: of its weights, as far as known before loading them; 0 if unknown.
        steps: of a pipeline, NAME or NAME@VERSION of each step's model; else empty.
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
    @property
    def steps(self) -> tuple[str, ...]: ...

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


def with_steps(catalog: Catalog) -> Catalog:
    """The catalog whose pipelines find their steps: they stand behind these, and versions that they name are wanted.

    A version that only a pipeline wants gets none of its name's traffic: where it is the newest, the newest of the
    others is given all.
    """
    named: dict[str, set[str]] = {}
    for entry in catalog.entries.values():
        for title in [title for number in entry.wanted for title in entry.sources[number].steps]:
            name, _, number = title.partition("@")
            named.setdefault(name, set()).add(number)
    entries = {name: _with_versions(entry, named.get(name, set())) for name, entry in catalog.entries.items()}
    return replace(catalog, entries=dict(sorted(entries.items(), key=lambda item: has_steps(item[1]))))


def has_steps(entry: Entry) -> bool:
    """Whether a version that is wanted is a pipeline."""
    return any(entry.sources[number].steps for number in entry.wanted)


def _with_versions(entry: Entry, named: set[str]) -> Entry:
    wanted = tuple(number for number in entry.sources if number in named or number in entry.wanted)
    weights = entry.weights
    answering = [number for number in entry.wanted if number != entry.shadow] or list(entry.wanted)
    if not weights and answering and wanted[-1] not in entry.wanted:
        weights = {answering[-1]: 1.0}
    return replace(entry, wanted=wanted, weights=weights)


def missing_steps(catalog: Catalog) -> dict[str, str]:
    """Models that pipelines name and that there are not, in words, by NAME@VERSION of the pipeline."""
    missing: dict[str, str] = {}
    for entry in catalog.entries.values():
        for source in entry.sources.values():
            for index, title in enumerate(source.steps):
                name, _, number = title.partition("@")
                known = catalog.entries.get(name)
                if title in catalog.failures or name in catalog.failures:
                    continue  # told there
                if known is None or (number and number not in known.sources):
                    there = ", ".join(catalog.entries if known is None else known.sources)
                    what = f"no model {name!r}" if known is None else f"no version {number} of {name!r}"
                    where = f"{entry.name}/{source.version}/pipeline.toml: steps[{index}].model"
                    missing[f"{entry.name}@{source.version}"] = f"{where}: there is {what}, only {there}"
    return missing
