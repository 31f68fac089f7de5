"""Pipelines: models that are made of other models, which are fitted together as a file describes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, NoReturn

from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec, excerpt
from tnxd.models.file_formats import PIPELINE
from tnxd.models.model import Model
from tnxd.models.pipeline_file import Description, key_of


class Source(NamedTuple):
    """Source of an input: an output of a step, or an input of the pipeline.

    Attributes:
        step: its place among the steps; -1: the pipeline itself. place: of the tensor among its outputs, or inputs.
    """

    step: int
    place: int


@dataclass(frozen=True)
class Node:
    """One step and its model.

    Attributes:
        name: of the step. model: what it runs.
        sources: what feeds each input of the model, in the model's order; None: it may be left out, and is.
        before, behind: places of the steps whose outputs it takes, and of those that take its own, each once.
        keeps: places of outputs that have to have as many rows as one of the inputs, and of these inputs.
    """

    name: str
    model: Model
    sources: tuple[Source | None, ...]
    before: tuple[int, ...]
    behind: tuple[int, ...]
    keeps: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Wiring:
    """A pipeline whose models fit together.

    Attributes:
        nodes: by place, as in the description. order: places, each behind those whose outputs it takes.
        outputs: what each output of the pipeline is.
        inputs_taken, outputs_given: the signature of the whole. max_batch_size: of the whole, see `Pipeline`.
        examples: a shape for each input that fits all models.
        uses: for each step, how many others take something of it, and one more if it is an output of the whole.
    """

    nodes: tuple[Node, ...]
    order: tuple[int, ...]
    outputs: tuple[Source, ...]
    inputs_taken: tuple[TensorSpec, ...]
    outputs_given: tuple[TensorSpec, ...]
    max_batch_size: int
    examples: tuple[tuple[int, ...], ...]
    uses: tuple[int, ...]


@dataclass(frozen=True)
class Pipeline(Model):
    """A model that is made of others. It is on no device and has no module: its steps have.

    It batches if all of its steps do: then rows go in and as many come out. Its signature is what its models make it,
    see `assembled`; before that it is empty.

    Attributes:
        description: of its steps. label: what to call its file in errors.
        models: by which its signature was made: the key and the row limit of each step's.
    """

    description: Description = field(default=Description((), (), {}), repr=False, compare=False)
    label: str = PIPELINE.file
    models: tuple[tuple[str, int], ...] = field(default=(), repr=False, compare=False)

    def assembled(self, models: Sequence[Model]) -> Pipeline:
        """The pipeline with the signature that these models give it: itself if it has that. Raises as `wire` does."""
        known = tuple([(model.key, model.max_batch_size) for model in models])
        if known == self.models:
            return self
        wiring = wire(self.description, self.label, models)
        return replace(
            self,
            inputs=wiring.inputs_taken,
            outputs=wiring.outputs_given,
            max_batch_size=wiring.max_batch_size,
            examples=wiring.examples,
            models=known,
        )


def no_module() -> NoReturn:
    """The factory of a pipeline."""
    raise FailedPrecondition("a pipeline has no module of its own")


def wire(description: Description, label: str, models: Sequence[Model]) -> Wiring:
    """Fit models together as a description says.

    Args:
        label: what to call the file in errors. models: one for each step.

    Raises:
        FailedPrecondition: a model is a pipeline itself, an input or output is not there, or datatypes or shapes do not
            fit. The sentence names file and key.
    """
    return _Fitting(description, label, models).wiring()


class _Fitting:
    """The work of `wire`."""

    def __init__(self, description: Description, label: str, models: Sequence[Model]) -> None:
        self._description = description
        self._label = label
        self._models = models

    def wiring(self) -> Wiring:
        description, models = self._description, self._models
        for index, model in enumerate(models):
            if isinstance(model, Pipeline):
                raise self._wrong(f"steps[{index}].model", f"{model.name!r} is a pipeline: name its steps here")
        outputs = tuple(self._source(key_of("outputs", name), source) for name, source in description.outputs.items())
        sources = [self._fed(index) for index in range(len(models))]
        before = [tuple(dict.fromkeys(s.step for s in fed if s and s.step >= 0)) for fed in sources]
        behind = [
            tuple(other for other in range(len(models)) if index in before[other]) for index in range(len(models))
        ]
        nodes = tuple(
            Node(step.name, model, sources[index], before[index], behind[index], self._keeps(index, sources))
            for index, (step, model) in enumerate(zip(description.steps, models, strict=True))
        )
        batches = all(model.max_batch_size for model in models)
        taken = [self._taken(place, sources) for place in range(len(description.inputs))]
        results = {source.step for source in outputs}
        return Wiring(
            nodes,
            _ordered(before),
            outputs,
            tuple(spec for spec, _ in taken),
            tuple(
                TensorSpec(name, self._spec(source).datatype, self._spec(source).shape)
                for name, source in zip(description.outputs, outputs, strict=True)
            ),
            min(model.max_batch_size for model in models) if batches else 0,
            tuple(shape for _, shape in taken),
            tuple(len(others) + (index in results) for index, others in enumerate(behind)),
        )

    def _wrong(self, key: str, what: str) -> FailedPrecondition:
        return FailedPrecondition(f"{self._label}: {key}: {what}")

    def _called(self, index: int) -> str:
        model = self._models[index]
        return f"step {self._description.steps[index].name!r} ({model.name}@{model.version})"

    def _source(self, key: str, source: str) -> Source:
        """Source that a description names. All but the outputs of models has been checked already."""
        step_name, dot, output = source.partition(".")
        if not dot:
            return Source(-1, self._description.inputs.index(source))
        step = self._description.position(step_name)
        known = [spec.name for spec in self._models[step].outputs]
        if output not in known:
            raise self._wrong(key, f"{self._called(step)} has no output {excerpt(output)}; its outputs are {known}")
        return Source(step, known.index(output))

    def _spec(self, source: Source) -> TensorSpec:
        """An output of a step."""
        return self._models[source.step].outputs[source.place]

    def _fed(self, index: int) -> tuple[Source | None, ...]:
        """Source of each input of a step's model."""
        step, model = self._description.steps[index], self._models[index]
        known = [spec.name for spec in model.inputs]
        for name in step.inputs:
            if name not in known:
                raise self._wrong(
                    key_of(f"steps[{index}].inputs", name),
                    f"{self._called(index)} has no input {excerpt(name)}; its inputs are {known}",
                )
        fed: list[Source | None] = []
        for spec in model.inputs:
            key = key_of(f"steps[{index}].inputs", spec.name)
            if spec.name not in step.inputs:
                if spec.name not in model.optional:
                    raise self._wrong(key, f"is missing: {self._called(index)} needs the input {spec.name!r}")
                fed.append(None)
                continue
            source = self._source(key, step.inputs[spec.name])
            if source.step >= 0:
                why = _misfit(self._spec(source), spec)
                if why:
                    raise self._wrong(key, f"{self._called(index)} takes {why} of {step.inputs[spec.name]!r}")
            fed.append(source)
        return tuple(fed)

    def _keeps(self, index: int, sources: Sequence[Sequence[Source | None]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Outputs of a step without a batch axis that a step with one takes: its rows have to be those that came in."""
        step, model = self._description.steps[index], self._models[index]
        if model.max_batch_size or step.changes_rows:
            return ()
        keeps: dict[int, tuple[int, ...]] = {}
        for other, fed in enumerate(sources):
            if not self._models[other].max_batch_size:
                continue
            for source in fed:
                if source is None or source.step != index:
                    continue
                given = model.outputs[source.place]
                rows = tuple(
                    place
                    for place, spec in enumerate(model.inputs)
                    if sources[index][place] is not None and spec.shape[:1] == given.shape[:1]
                )
                if not rows:
                    raise self._wrong(
                        f"steps[{index}].changes_rows",
                        f"has to be true: {self._called(index)} has no batch axis, none of its inputs has as many rows "
                        f"as its output {given.name!r}, and {self._called(other)} counts those",
                    )
                if given.shape[0] == -1:
                    keeps[source.place] = rows
        return tuple(keeps.items())

    def _taken(self, place: int, sources: Sequence[Sequence[Source | None]]) -> tuple[TensorSpec, tuple[int, ...]]:
        """An input of the pipeline as all that take it need it, and a shape that fits them."""
        name = self._description.inputs[place]
        merged: TensorSpec | None = None
        example: tuple[int, ...] = ()
        first = 0
        for index, fed in enumerate(sources):
            for position, source in enumerate(fed):
                if source != Source(-1, place):
                    continue
                model = self._models[index]
                spec = model.inputs[position]
                if merged is None:
                    merged, first = spec, index
                    example = model.example_shapes(1)[position]
                    continue
                why = _misfit(merged, spec)
                if why:
                    raise self._wrong(
                        key_of(f"steps[{index}].inputs", spec.name),
                        f"{self._called(index)} takes {why} of {name!r}, as {self._called(first)} takes it",
                    )
                shape = tuple(max(pair) for pair in zip(merged.shape, spec.shape, strict=True))
                merged = TensorSpec(merged.name, merged.datatype, shape)
        assert merged is not None  # something takes each input
        fitting = tuple(fixed if fixed >= 0 else length for fixed, length in zip(merged.shape, example, strict=True))
        return TensorSpec(name, merged.datatype, merged.shape), fitting


def _misfit(given: TensorSpec, taken: TensorSpec) -> str:
    """Why one tensor cannot be what another is to be, "TAKEN, not the GIVEN"; "" if it can. -1 is checked later."""
    if given.datatype != taken.datatype:
        return f"{taken.datatype}, not the {given.datatype}"
    fits = len(given.shape) == len(taken.shape) and all(
        have == want or -1 in (have, want) for have, want in zip(given.shape, taken.shape, strict=True)
    )
    return "" if fits else f"{list(taken.shape)}, not the {list(given.shape)}"


def _ordered(before: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Places of steps, each behind those that it waits for, else as they stand."""
    order: list[int] = []
    while len(order) < len(before):
        order += [i for i, others in enumerate(before) if i not in order and all(o in order for o in others)][:1]
    return tuple(order)
