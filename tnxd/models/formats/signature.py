"""A model's signature, from what its file says and what model.toml says. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import BYTES, TensorSpec
from tnxd.models.settings import Settings, Tensor, fits

if TYPE_CHECKING:
    import torch

    from tnxd.models.python.processes import Restarts

DEFAULT_MAX_BATCH_SIZE = 64

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model.

    Attributes:
        inputs, outputs, max_batch_size: as in `tnxd.models.model.Model`.
        examples: a shape for every input that the model surely takes.
        returned: of every output, which one of the file's it is.
        optional: as in `tnxd.models.model.Model`.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    examples: tuple[Shape, ...]
    returned: tuple[int, ...]
    optional: Mapping[str, Array | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A model file whose signature is known.

    Attributes:
        build: makes the module, on the CPU, in eval mode and without gradients.
        notes: what an operator should know. devices: as in `tnxd.models.model.Model`; empty: those of the format.
        writes, example_values, restarts, text: as in `tnxd.models.model.Model`.
    """

    signature: Signature
    build: Callable[[], torch.nn.Module]
    notes: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    example_values: Mapping[str, Array] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    restarts: Restarts | None = None


@dataclass(frozen=True)
class FileSignature:
    """The signature that a model file states, and what else it says about its inputs and outputs.

    Attributes:
        examples: a shape for every input; empty: unknown. example_values: as in `Opened`.
        most: rows that one batch may have at most; None: any number; 0: axis 0 cannot count rows, `why` says why.
        counts_rows: whether axis 0 does count rows, if model.toml does not say it.
        named_outputs: whether the names of the outputs mean something to the module, or only their order does.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    examples: tuple[Shape, ...] = ()
    most: int | None = None
    why: str = ""
    counts_rows: bool = True
    named_outputs: bool = True
    example_values: Mapping[str, Array] = field(default_factory=dict)


def declared(settings: Settings, label: str, file: str) -> Signature:
    """The signature that model.toml alone says.

    Args:
        label, file: what to call model.toml and the model file in errors.

    Raises:
        InvalidArgument: it contradicts itself; the sentence names file and key.
    """
    inputs = tuple(tensor.spec for tensor in settings.inputs)
    outputs = tuple(tensor.spec for tensor in settings.outputs)
    return resolve(FileSignature(inputs, outputs), settings, label, file)


def check_for_torch(signature: Signature, label: str) -> None:
    """Check that a torch module can have such inputs and outputs: torch has no strings.

    Args:
        label: what to call model.toml in errors.

    Raises:
        InvalidArgument: it cannot; the sentence names the key.
    """
    for key, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        for spec in specs:
            if spec.datatype == BYTES:
                raise InvalidArgument(
                    f"{label}: {key}: {spec.name!r} is BYTES, and torch has no strings: a model with strings is an "
                    f"ONNX file, or its strings become numbers before they are sent"
                )


def resolve(found: FileSignature, settings: Settings, label: str, file: str) -> Signature:
    """The signature of a file, as model.toml narrows it.

    Raises:
        InvalidArgument: the two contradict each other; the sentence names file and key.
    """
    inputs = _narrow(found.inputs, settings.inputs, f"{label}: inputs", file)
    returned, outputs = _chosen(found, settings.outputs, f"{label}: outputs", file)
    limit = _limit(settings.max_batch_size, [*inputs, *outputs], found, label, file)
    for rows in settings.warm_up or ():
        if rows > max(limit, 1):
            raise InvalidArgument(
                f"{label}: warm_up: {rows} is more than {limit or 1}, the most rows in one batch of {file}"
            )
    said = {tensor.name: tensor.example for tensor in settings.inputs}
    known = dict(zip((spec.name for spec in found.inputs), found.examples, strict=False))
    examples = []
    for spec in inputs:
        shape = said.get(spec.name) or known.get(spec.name) or (1,) * len(spec.shape)
        # What model.toml narrows to one length has that length, whatever the file's own example was.
        examples.append(tuple(have if want == -1 else want for have, want in zip(shape, spec.shape, strict=True)))
    return Signature(inputs, outputs, limit, tuple(examples), returned)


def _narrow(found: Sequence[TensorSpec], said: Sequence[Tensor], key: str, file: str) -> tuple[TensorSpec, ...]:
    if not said:
        return tuple(found)
    names = [spec.name for spec in found]
    if len(said) != len(found):
        raise InvalidArgument(f"{key}: {len(said)} tensors, and {file} has {len(found)}: {_listed(names)}")
    order = {tensor.name: tensor for tensor in said}
    if not order.keys() <= set(names):
        raise _unknown(said, names, key, file)
    return tuple(_agreed(order[spec.name], spec, key, file) for spec in found)


def _chosen(
    found: FileSignature, said: Sequence[Tensor], key: str, file: str
) -> tuple[tuple[int, ...], tuple[TensorSpec, ...]]:
    """The outputs that are served, in the file's order, and which ones of the file's they are."""
    if not said:
        return tuple(range(len(found.outputs))), found.outputs
    names = [spec.name for spec in found.outputs]
    order = {tensor.name: tensor for tensor in said}
    if order.keys() <= set(names):
        positions = tuple(position for position, name in enumerate(names) if name in order)
        pairs = [(order[names[position]], found.outputs[position]) for position in positions]
    elif found.named_outputs:
        raise _unknown(said, names, key, file)
    elif len(said) != len(found.outputs):
        raise InvalidArgument(
            f"{key}: {len(said)} tensors, and {file} has {len(found.outputs)}; to leave some out, take from its own "
            f"names: {_listed(names)}"
        )
    else:
        positions = tuple(range(len(names)))
        pairs = list(zip(said, found.outputs, strict=True))
    return positions, tuple(_agreed(tensor, spec, key, file) for tensor, spec in pairs)


def _unknown(said: Sequence[Tensor], names: Sequence[str], key: str, file: str) -> InvalidArgument:
    index, name = next((index, tensor.name) for index, tensor in enumerate(said) if tensor.name not in names)
    return InvalidArgument(f"{key}[{index}].name: {file} has no {name!r}, only {_listed(names)}")


def _agreed(tensor: Tensor, spec: TensorSpec, key: str, file: str) -> TensorSpec:
    if tensor.datatype != spec.datatype:
        raise InvalidArgument(f"{key}: {tensor.name!r} is {spec.datatype} in {file}, not {tensor.datatype}")
    if not fits(tensor.shape, spec.shape):
        raise InvalidArgument(f"{key}: {tensor.name!r} is {list(spec.shape)} in {file}, not {list(tensor.shape)}")
    return tensor.spec


def _listed(names: Sequence[str]) -> str:
    """Names for a sentence; a model may have hundreds."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _limit(wanted: int | None, specs: Sequence[TensorSpec], found: FileSignature, label: str, file: str) -> int:
    fixed = next((spec for spec in specs if spec.shape[:1] != (-1,)), None)
    if wanted is None:
        batches = fixed is None and found.most != 0 and found.counts_rows
        return min(DEFAULT_MAX_BATCH_SIZE, found.most or DEFAULT_MAX_BATCH_SIZE) if batches else 0
    if wanted == 0:
        return 0
    key = f"{label}: max_batch_size: {wanted}"
    if fixed is not None:
        raise InvalidArgument(
            f"{key}, but {fixed.name!r} is {list(fixed.shape)}: where axis 0 counts rows, it is -1 in every tensor"
        )
    if found.most == 0:
        raise InvalidArgument(f"{key}, but in {file} {found.why}")
    if found.most is not None and wanted > found.most:
        raise InvalidArgument(f"{key} is more than the {found.most} rows that {file} takes")
    return wanted
