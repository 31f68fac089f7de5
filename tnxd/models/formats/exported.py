"""model.pt2: a program of torch.export, which knows its signature."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from tnxctl.protocol.errors import FailedPrecondition, Internal
from tnxctl.protocol.frames import Array
from tnxctl.protocol.wire import TensorSpec, excerpt
from tnxd.error_text import cause, sentence
from tnxd.models import structures
from tnxd.models.formats import classes, examples, ignore_warnings_about_torch_itself, libraries, optional
from tnxd.models.formats.conditions import Conditions, bounds, of_program
from tnxd.models.formats.signature import DEFAULT_MAX_BATCH_SIZE, FileSignature, Opened, Shape, Signature, resolve
from tnxd.models.formats.writes import STORING, written, written_inputs
from tnxd.models.repository import RepositorySource
from tnxd.models.settings import MAX_NAME
from tnxd.models.tensors import TORCH_DTYPES, pick
from tnxd.models.trust import TrustedFiles

FILE = "model.pt2"

_DATATYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class Program(torch.nn.Module):
    """An exported program that is called with its tensors in order, and returns a tuple of tensors.

    It runs the program's graph as it is, with weights as arguments. What `ExportedProgram.module` makes of it checks
    and nests arguments, and looks up every weight by name, in each call: that takes longer than a small network.

    Attributes:
        held: parameter, buffer or constant of the program -> name of the buffer that holds it here.
    """

    def __init__(self, program: ExportedProgram, description: Description) -> None:
        super().__init__()
        self.description = description
        self._program = program
        self._run = program.graph_module.forward
        weights: dict[str, int] = {}
        for spec in program.graph_signature.input_specs:
            if spec.target is None or spec.target in weights:
                continue
            weights[spec.target] = len(weights)
            held = program.constants if spec.target in program.constants else program.state_dict
            self.register_buffer(f"weight_{weights[spec.target]}", held[spec.target].detach())  # its own name has dots
        self.held = {name: f"weight_{index}" for name, index in weights.items()}
        leaves = iter(description.leaves)
        self._constants: list[Any] = []
        self._order: list[int] = []
        """Of the graph's arguments: which of the weights, inputs and constants, counted in that order."""
        for spec in program.graph_signature.input_specs:
            if spec.target is not None:
                self._order.append(weights[spec.target])
                continue
            position, constant = next(leaves)
            if position < 0:
                self._order.append(len(weights) + len(description.found.inputs) + len(self._constants))
                self._constants.append(constant)
            else:
                self._order.append(len(weights) + position)
        outputs = program.graph_signature.output_specs
        own = [index for index, spec in enumerate(outputs) if spec.kind is OutputKind.USER_OUTPUT]
        self._returned = [own[position] for position in description.returned]
        self._stored = [
            (index, weights[spec.target])
            for index, spec in enumerate(outputs)
            if spec.kind in STORING and spec.target is not None
        ]
        """Of the graph's results: what its caller has to put into which of the weights."""
        self._plain = self._returned == list(range(len(outputs)))
        self._copied = sorted({description.leaves[position][0] for position in written_inputs(program)} - {-1})
        """Inputs that the graph works on in place: they are the request's, and not for it to change."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.description.conditions.check(inputs)
        values: list[Any] = [*self._buffers.values(), *inputs, *self._constants]
        for position in self._copied:
            values[position - len(inputs) - len(self._constants)] = inputs[position].clone()
        results: tuple[torch.Tensor, ...] = self._run(*[values[index] for index in self._order])
        if self._plain:
            return results
        for index, weight in self._stored:
            values[weight].copy_(results[index])
        return tuple([results[index] for index in self._returned])

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """The same program over copies of its tensors. The graph is shared: it holds nothing."""
        made = memo[id(self)] = Program.__new__(Program)
        made.__dict__ = {**vars(self), "_buffers": copy.deepcopy(self._buffers, memo)}
        return made

    def train(self, mode: bool = True) -> Program:
        """Nothing: a program is what it was when it was exported."""
        return self

    def to(self, device: torch.device) -> Program:  # type: ignore[override]
        """The program on another device. Tensors that it makes are made there, too."""
        if device.type == "cpu":
            return self
        from torch.export.passes import move_to_device_pass

        moved = move_to_device_pass(self._program, device)
        moved.graph_module.recompile()
        return Program(moved, self.description)


@dataclass(frozen=True)
class Description:
    """A description of how a program is called, and what for.

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


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    label = files.label(FILE)
    settings = source.settings
    program = load(files, label)
    description = describe(
        program,
        label,
        settings.max_batch_size or DEFAULT_MAX_BATCH_SIZE,
        [tensor.name for tensor in settings.outputs],
    )
    signature = resolve(description.found, settings, source.settings_label, label)
    signature = optional.resolve(signature, settings, source.settings_label, label, None)
    description = replace(description, returned=tuple(description.returned[index] for index in signature.returned))
    if signature.max_batch_size:
        description = replace(description, conditions=description.conditions.without_rows())
    writes = written(program)
    notes = description.notes + libraries.note(libraries.of_program(program), settings.imports, label)
    notes += tuple(f"{label} was exported in training mode: {what}" for what in _training(program))
    values = description.found.example_values
    description = replace(description, found=replace(description.found, example_values={}))  # it stays in memory
    first = [program]  # for the first build, and held no longer
    del program

    def build() -> torch.nn.Module:
        return Program(first.pop() if first else load(files, label), description)

    return Opened(signature, build, notes, writes=writes, example_values=values)


def load(files: TrustedFiles, label: str) -> ExportedProgram:
    """The program in a file. It is code: torch unpickles a part of it.

    Raises:
        FailedPrecondition: it is damaged, or made for another torch.
    """
    ignore_warnings_about_torch_itself()
    with files.open(files.directory / FILE) as file:
        if not zipfile.is_zipfile(file):
            raise FailedPrecondition(f"{label}: incomplete, or not a program of torch.export")
        while True:
            file.seek(0)
            with _what_is_logged() as logged:
                try:
                    return _without_tokens(torch.export.load(file))
                except Exception as error:  # whatever torch stumbles over
                    why = logged[-1] if logged else error
                    if classes.stand_in(why):
                        continue
                    raise FailedPrecondition(
                        f"{label}: torch {torch.__version__} cannot load it: {cause(why)}"
                    ) from error


def _without_tokens(program: ExportedProgram) -> ExportedProgram:
    """The program without the tokens that order its side effects, such as checks of matrices after decomposing.

    `ExportedProgram.module` drops them in the same way, since a graph runs in order anyway.
    """
    if any(spec.kind is InputKind.TOKEN for spec in program.graph_signature.input_specs):
        from torch.export._remove_effect_tokens_pass import _remove_effect_tokens

        program = _remove_effect_tokens(program)
        program.graph_module.recompile()
    return program


@contextlib.contextmanager
def _what_is_logged() -> Iterator[list[BaseException]]:
    """Errors that torch.export only logs, and then raises another that says to look there."""
    thread = threading.get_ident()
    errors: list[BaseException] = []

    def hear(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.thread != thread or error is None:
            return True
        errors.append(error)
        return False

    log = logging.getLogger("torch.export")
    log.addFilter(hear)
    try:
        yield errors
    finally:
        log.removeFilter(hear)


def describe(
    program: ExportedProgram, label: str, rows: int = DEFAULT_MAX_BATCH_SIZE, served: Collection[str] = ()
) -> Description:
    """Describe what a program takes and gives.

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


class _Positional(torch.nn.Module):
    """Takes any number of inputs, whatever the network calls them, and returns its outputs in order.

    Args:
        outputs: their names.
    """

    def __init__(self, network: torch.nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self._outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> Any:
        raw = self.network(*inputs)
        try:
            return tuple(pick(raw, self._outputs, ""))  # torch.export does not know every class that holds them
        except Internal:
            return raw  # whoever compares the two says what is wrong


def export(network: torch.nn.Module, signature: Signature, device: torch.device) -> ExportedProgram:
    """A network as a program whose axes vary as its signature says, if they can.

    Its weights are called as in a module that has the network as its attribute `network`.

    Args:
        device: that the network is on.

    Raises:
        FailedPrecondition: torch.export cannot follow it.
    """
    inputs, dimensions = [], []
    rows = Dim("rows", min=1, max=max(signature.max_batch_size, 2))
    for spec, example in zip(signature.inputs, signature.examples, strict=True):
        # An axis of length 1 or 0 would be taken as fixed.
        shape = [max(have, 2) if want == -1 else want for have, want in zip(example, spec.shape, strict=True)]
        dynamic: dict[int, Any] = {axis: Dim.AUTO for axis, length in enumerate(spec.shape) if length == -1}
        if signature.max_batch_size:
            shape[0] = 2
            dynamic[0] = rows
        inputs.append(torch.zeros(shape, dtype=TORCH_DTYPES[spec.datatype], device=device))
        dimensions.append(dynamic)
    try:
        return torch.export.export(
            _Positional(network, [spec.name for spec in signature.outputs]),
            tuple(inputs),
            dynamic_shapes=(tuple(dimensions),),
            strict=False,
        )
    except Exception as error:
        raise FailedPrecondition(f"torch.export cannot follow the network: {sentence(error)}") from error


def _training(program: ExportedProgram) -> list[str]:
    """Things that a program does only in training, because its network was in that mode when it was exported."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            if name == "aten.dropout.default" and len(node.args) > 2 and node.args[2]:
                found.add("its dropout makes answers random")
            if name == "aten.batch_norm.default" and node.args[5]:
                found.add("its batch norm mixes the rows of a batch")
    return sorted(found)


def _tensor(name: str, value: torch.Tensor, label: str) -> TensorSpec:
    datatype = _DATATYPES.get(value.dtype)
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
            if name not in served and served and values[argument.name].dtype not in _DATATYPES:
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
