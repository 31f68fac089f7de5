"""File pipeline.toml: the steps of a pipeline and what feeds them, checked as far as no model has to be known for it.

    inputs = ["text"]

    [[steps]]
    name = "tokenize"
    model = "tokenizer"                 # NAME, whose traffic it follows, or NAME@VERSION
    inputs = { text = "text" }          # input of that model = what feeds it

    [[steps]]
    name = "encode"
    model = "encoder@2"
    inputs = { ids = "tokenize.ids", mask = "tokenize.mask" }

    [outputs]
    embeddings = "encode.embeddings"

What feeds an input is an input of the pipeline, or STEP.OUTPUT.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from tnxctl.files import tomlfile
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import MAX_TENSORS, excerpt, split_title
from tnxd.models.settings import MAX_NAME

MAX_STEPS = 64
"""Steps of one pipeline."""

_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")
_GRAMMAR = "up to 64 letters, digits, '_' and '-'"


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step.

    Attributes:
        name: for those that take its outputs.
        model: NAME or NAME@VERSION.
        inputs: input of the model -> what feeds it.
        changes_rows: whether its outputs may have other rows than its inputs, as those of a detector.
    """

    name: str
    model: str
    inputs: Annotated[dict[_Name, str], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]
    changes_rows: bool = False


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of a pipeline.toml. Attributes: outputs: output of the pipeline -> STEP.OUTPUT."""

    inputs: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]
    steps: Annotated[tuple[Step, ...], msgspec.Meta(min_length=1, max_length=MAX_STEPS)]
    outputs: Annotated[dict[_Name, str], msgspec.Meta(min_length=1, max_length=MAX_TENSORS)]

    @property
    def models(self) -> tuple[str, ...]:
        """NAME or NAME@VERSION of each step."""
        return tuple(step.model for step in self.steps)

    def position(self, name: str) -> int:
        """The place of a step among the others."""
        return [step.name for step in self.steps].index(name)


def load(path: Path, label: str) -> Description:
    """Read a pipeline.toml.

    Args:
        label: what to call the file in errors.

    Raises:
        InvalidArgument: it cannot be read, a key is unknown, a value is out of range, a name stands for nothing, or
            steps wait for each other in a circle. The sentence names file and key.
    """
    description = tomlfile.convert(tomlfile.read(path, label), Description, label)
    for problem in _problems(description):
        raise InvalidArgument(f"{label}: {problem}")
    return description


def _problems(description: Description) -> Iterator[str]:
    """Mistake in a description by itself, in words that begin with the key."""
    inputs, steps = description.inputs, description.steps
    names = [step.name for step in steps]
    keyed = [(f"inputs[{index}]", name, inputs[:index]) for index, name in enumerate(inputs)]
    keyed += [(f"steps[{index}].name", name, (*inputs, *names[:index])) for index, name in enumerate(names)]
    for key, name, before in keyed:
        if not _WORD.fullmatch(name):
            yield f"{key}: {excerpt(name)} is no name here, which has {_GRAMMAR}"
        if name in before:
            yield f"{key}: {name!r} stands there twice"
    for index, step in enumerate(steps):
        try:
            split_title(step.model)
        except InvalidArgument as error:
            yield f"steps[{index}].model: {error.message}"
    used: set[str] = set()
    for key, source in _sources(description):
        step_name, dot, output = source.partition(".")
        used.add(step_name)
        if key.startswith("outputs.") and not dot:
            yield f"{key}: {excerpt(source)} is not STEP.OUTPUT, the output of a step"
        elif dot and step_name not in names:
            yield f"{key}: {excerpt(source)}: there is no step {excerpt(step_name)}, only {', '.join(names)}"
        elif dot and not output:
            yield f"{key}: {excerpt(source)} names no output of the step"
        elif not dot and source not in inputs:
            known = ", ".join(inputs)
            hint = f"; an output of the step is {source}.OUTPUT" if source in names else ""
            yield f"{key}: {excerpt(source)} is none of the pipeline's inputs, {known}{hint}"
    for key, name, _ in keyed:
        if name not in used:
            yield f"{key}: nothing takes what {name!r} gives"
    circle = _circle(description)
    if circle:
        yield f"steps: {' -> '.join(circle)}: each of them waits for the one before it, in a circle"


def _sources(description: Description) -> Iterator[tuple[str, str]]:
    """Everything that is fed by something: its key, and by what."""
    for index, step in enumerate(description.steps):
        for name, source in step.inputs.items():
            yield key_of(f"steps[{index}].inputs", name), source
    for name, source in description.outputs.items():
        yield key_of("outputs", name), source


def key_of(table: str, name: str) -> str:
    """A key as sentences have it: on one line, whatever a tensor is called."""
    return f"{table}.{name}" if name.isprintable() and len(name) <= 60 else f"{table}.{excerpt(name)}"


def _circle(description: Description) -> list[str]:
    """Names of steps that wait for each other, the first one at the end again; [] if there are none."""
    waits = {
        step.name: [source.partition(".")[0] for source in step.inputs.values() if "." in source]
        for step in description.steps
    }
    left = dict(waits)
    while ready := [name for name, before in left.items() if not any(other in left for other in before)]:
        for name in ready:
            del left[name]
    if not left:
        return []
    way = [next(iter(left))]
    while way[-1] not in way[:-1]:
        way.append(next(other for other in waits[way[-1]] if other in left))
    return way[way.index(way[-1]) :][::-1]
