"""Description of a program of torch.export: its signature, and where its arguments and results are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec, excerpt
from tnxd.error_text import cause
from tnxd.models import structures
from tnxd.models.formats import examples
from tnxd.models.formats.conditions import Conditions, bounds, of_program
from tnxd.models.formats.signature import DEFAULT_MAX_BATCH_SIZE, FileSignature, Shape
from tnxd.models.formats.writes import STORING
from tnxd.models.settings import MAX_NAME
from tnxd.models.tensors import DATATYPES


@dataclass(frozen=True)
class Description:
    """Description of a program: its signature, its arguments and its results.

    Attributes:
        found: its signature. conditions: what it demands beyond that.
        leaves: of its arguments, one for each: the position of an input; or -1, and a constant of the export.
        returned: of every output, its position among all that the program returns.
        notes: what an operator should know.
    """

    found: FileSignature
    conditions: Conditions
    leaves: tuple[tuple[int, Any], ...]
    returned: tuple[int, ...]
    notes: tuple[str, ...] = ()


def describe(
    program: ExportedProgram, label: str, rows: int = DEFAULT_MAX_BATCH_SIZE, served: Collection[str] = ()
) -> Description:
    """Describe the arguments and results of a program.

    Args:
        rows: that a batch may have, if the program takes so many.
        served: names of the outputs that are served; others have no say about the axis that counts rows.

    Raises:
        FailedPrecondition: it has inputs or outputs that cannot be served: the sentence names one.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names = _input_names(program, label)
    inputs: list[TensorSpec] = []
    leaves: list[tuple[int, Any]] = []
    axes: list[tuple[int, int, Any]] = []
    signature = program.graph_signature
    _check_kinds(signature, label)
    kinds = [spec for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for name, spec in zip(names, kinds, strict=True):
        if isinstance(spec.arg, ConstantArgument):
            leaves.append((-1, spec.arg.value))
            continue
        if not isinstance(spec.arg, TensorArgument):
            raise FailedPrecondition(f"{label}: the input {name!r} is a number that may change: make it a tensor")
        value = values[spec.arg.name]
        axes += [
            (len(inputs), axis, length) for axis, length in enumerate(_lengths(value)) if not isinstance(length, int)
        ]
        leaves.append((len(inputs), None))
        inputs.append(_tensor(name, value, label))
    positions = {name: None if leaf[0] < 0 else leaf[0] for name, leaf in zip(names, leaves, strict=True)}
    conditions = Conditions([spec.name for spec in inputs], of_program(program, axes, positions, label))
    returned, outputs, named, notes = _outputs(program, values, label, served)
    if not inputs or not outputs:
        raise FailedPrecondition(
            f"{label}: {'takes' if not inputs else 'returns'} no tensor: there is nothing to serve"
        )
    given = [spec.arg for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    count = {spec.name for spec in outputs}.issuperset(served) and set(served)
    tensors = [values[spec.arg.name] for spec in kinds if isinstance(spec.arg, TensorArgument)]
    tensors += [
        values[given[position].name]
        for position, spec in zip(returned, outputs, strict=True)
        if not count or spec.name in count
    ]
    most, why = _batch(program, tensors)
    odd = conditions.on_rows(rows if most is None else min(most, rows))
    if most != 0 and odd:
        most, why = 0, f"not every number of rows will do: {odd}"
    found = FileSignature(
        tuple(inputs),
        outputs,
        _examples(program, inputs, axes, leaves),
        most,
        why,
        named_outputs=named,
        example_values=_example_values(program, inputs, leaves),
    )
    return Description(found, conditions, tuple(leaves), returned, notes)


def _check_kinds(signature: ExportGraphSignature, label: str) -> None:
    weights = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.USER_INPUT)
    for given in signature.input_specs:
        if given.kind not in weights:
            raise FailedPrecondition(
                f"{label}: {given.target or given.arg} is a {given.kind.name}: only tensors are served"
            )
    for returned in signature.output_specs:
        if returned.kind not in (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION, *STORING):
            raise FailedPrecondition(f"{label}: it returns a {returned.kind.name}: only tensors are served")


def _tensor(name: str, value: torch.Tensor, label: str) -> TensorSpec:
    datatype = DATATYPES.get(value.dtype)
    if datatype is None:
        raise FailedPrecondition(f"{label}: {name!r} is {value.dtype}, which cannot be served")
    return TensorSpec(name, datatype, tuple(axis if isinstance(axis, int) else -1 for axis in _lengths(value)))


def _lengths(value: torch.Tensor) -> list[Any]:
    """Lengths of the axes of a fake tensor: numbers and, where they vary, sympy's expressions."""
    expressions = [axis.node.expr if isinstance(axis, torch.SymInt) else axis for axis in value.shape]
    return [int(length) if isinstance(length, int) or length.is_Integer else length for length in expressions]


def _input_names(program: ExportedProgram, label: str) -> list[str]:
    """Names of the arguments, as the network's forward calls them; what is in a structure has its path there."""
    spec = program.call_spec.in_spec
    args, kwargs = _unflattened(spec, label)
    signature = program.module_call_graph[0].signature
    known = (signature.forward_arg_names if signature is not None else None) or []
    arguments = [(known[at] if at < len(known) else f"input_{at}", argument) for at, argument in enumerate(args)]
    names: dict[Any, str] = {}
    for name, argument in (*arguments, *kwargs.items()):
        names |= {leaf: path for path, leaf in structures.below(name, argument, _inside) if isinstance(leaf, int)}
    return _checked([names.get(leaf, "") for leaf in range(spec.num_leaves)], "input", label)


def _outputs(
    program: ExportedProgram, values: Mapping[str, Any], label: str, served: Collection[str]
) -> tuple[tuple[int, ...], tuple[TensorSpec, ...], bool, tuple[str, ...]]:
    """The outputs: where they are, what they are, whether the program itself gives them names, and notes on others."""
    specs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    structure = _unflattened(program.call_spec.out_spec, label)
    try:
        paths = {leaf: path for path, leaf in structures.leaves(structure, _inside).items() if isinstance(leaf, int)}
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{label}: {error.message}") from None
    names = _checked([paths.get(leaf, "") for leaf in range(len(specs))], "output", label)
    returned, outputs, notes = [], [], []
    for leaf, (name, argument) in enumerate(zip(names, specs, strict=True)):
        if isinstance(argument, TensorArgument):
            if name not in served and served and values[argument.name].dtype not in DATATYPES:
                continue  # nobody asks for it
            returned.append(leaf)
            outputs.append(_tensor(name, values[argument.name], label))
        elif not isinstance(argument, ConstantArgument) or argument.value is not None:
            what = repr(argument.value) if isinstance(argument, ConstantArgument) else "a number"
            notes.append(f"{label}: the output {name!r} is {excerpt(what)}, no tensor, and is left out")
    return tuple(returned), tuple(outputs), structures.has_names(structure), tuple(notes)


def _unflattened(spec: pytree.TreeSpec, label: str) -> Any:
    """A structure with the positions of its leaves in their place."""
    try:
        return pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    except Exception as error:  # whatever the code of its class raises, which is no torch
        raise FailedPrecondition(f"{label}: a structure in it cannot be made: {cause(error)}") from error


def _inside(value: object) -> Iterable[tuple[str, object]] | None:
    """Children as in `structures.children`, and in a class that torch alone can take apart, by position."""
    known = structures.children(value)
    if known is not None or isinstance(value, int):
        return known
    parts, _ = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    return None if len(parts) == 1 and parts[0] is value else [(str(at), part) for at, part in enumerate(parts)]


def _checked(names: list[str], what: str, label: str) -> list[str]:
    for name in names:
        if not 1 <= len(name) <= MAX_NAME:
            raise FailedPrecondition(f"{label}: an {what} is in a structure that gives it no name, or one too long")
        if names.count(name) > 1:
            raise FailedPrecondition(f"{label}: two {what}s would be called {name!r}")
    return names


def _batch(program: ExportedProgram, tensors: Iterable[torch.Tensor]) -> tuple[int | None, str]:
    """The most rows of a batch as `FileSignature.most` has it, and why it is 0. Args: tensors: inputs and outputs."""
    rows: set[Any] = set()
    others: set[Any] = set()
    for tensor in tensors:
        lengths = _lengths(tensor)
        rows.update(lengths[:1] or [0])
        others.update(length for length in lengths[1:] if not isinstance(length, int))
    expression = rows.pop() if len(rows) == 1 else 0
    if isinstance(expression, int) or not expression.is_Symbol:
        return 0, "axis 0 is not the same variable in every input and output"
    if any(expression in other.free_symbols for other in others):
        return 0, "the length of axis 0 is that of other axes, too: rows depend on each other"
    least, most = bounds(program, expression)
    if least > 1:
        return 0, f"the batch axis has to be at least {least}, and requests may have 1 row: export it with min=1"
    return most, ""


def _examples(
    program: ExportedProgram,
    inputs: Sequence[TensorSpec],
    axes: Sequence[tuple[int, int, Any]],
    leaves: Sequence[tuple[int, Any]],
) -> tuple[Shape, ...]:
    """Shapes of the inputs that a program was exported with, or the least ones if the file does not have them."""
    if program.example_inputs is not None:
        values, _ = pytree.tree_flatten(program.example_inputs)
        return tuple(tuple(value.shape) for value, (position, _) in zip(values, leaves, strict=True) if position >= 0)
    least = {(position, axis): max(bounds(program, length)[0], 1) for position, axis, length in axes}
    return tuple(
        tuple(least.get((position, axis), length) for axis, length in enumerate(spec.shape))
        for position, spec in enumerate(inputs)
    )


def _example_values(
    program: ExportedProgram, inputs: Sequence[TensorSpec], leaves: Sequence[tuple[int, Any]]
) -> dict[str, Array]:
    """Values of the inputs that a program was exported with, if its file has them."""
    if program.example_inputs is None:
        return {}
    values, _ = pytree.tree_flatten(program.example_inputs)
    return examples.of_tensors(
        inputs, [value for value, (position, _) in zip(values, leaves, strict=True) if position >= 0]
    )
