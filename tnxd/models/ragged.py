"""Ragged inputs: axes whose lengths differ from request to request, and how requests share a batch all the same.

Either shorter rows are padded to the longest of the batch, or the tokens of all rows come one after the other (packed).
A token is what one place along the ragged axis holds. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import settings

DEFAULT_PACKED_TOKENS = 2048
"""Most tokens of a packed batch where model.toml does not say it: what is computed token by token gains no more."""

OFFSETS = "offsets"
"""Argument of a packed model: int64 [rows + 1], where each row begins among the tokens, and where the last one ends."""

_Arrays = Sequence[Array | None]


@dataclass(frozen=True)
class Ragged:
    """Ragged axes of a model's inputs, all of which have the same length within a request.

    Attributes:
        axes: of every input, its ragged axis; 0: it has none.
        pads: of every input, the number that fills it up.
        cuts: of every output, the axis that is as long as the ragged ones and is cut back; 0: none.
        max_length: longest ragged axis that is taken.
        max_tokens: most tokens of one batch: rows times the longest, or the sum of all if packed.
        mask: position of the input that is not 0 where there is a token; -1: there is none.
        packed: whether the module takes the tokens of all rows one after the other, `OFFSETS` in place of the mask.
        joins: whether requests of different lengths may share a batch.
    """

    axes: tuple[int, ...]
    pads: tuple[bool | int | float, ...]
    cuts: tuple[int, ...]
    max_length: int
    max_tokens: int
    mask: int = -1
    packed: bool = False
    joins: bool = True

    def apart(self) -> Ragged:
        """The same axes, where each batch is to have one length."""
        return replace(self, joins=False)

    def length(self, inputs: Sequence[TensorSpec], arrays: _Arrays, name: str) -> int:
        """Length that the ragged axes of a request have.

        Args:
            inputs: the signature. name: of the model, for errors.

        Raises:
            InvalidArgument: they have different lengths, or one that is not taken.
        """
        found, first = -1, ""
        for spec, array, axis in zip(inputs, arrays, self.axes, strict=True):
            if array is None or not axis:
                continue
            length = array.shape[axis]
            if found < 0:
                found, first = length, spec.name
            elif length != found:
                raise InvalidArgument(
                    f"model {name!r}: input {spec.name!r} is {length} long along axis {axis}, {first!r} is {found}: "
                    f"they count the same"
                )
        if found > self.max_length:
            raise InvalidArgument(
                f"model {name!r}: input {first!r} is {found} long; it takes {self.max_length} (ragged.max_length)"
            )
        return max(found, 0)

    def group(self, inputs: Sequence[TensorSpec], arrays: _Arrays, start: int) -> tuple[int, ...]:
        """Lengths of the variable axes that are not ragged, see `tnxd.models.model.BoundInputs.group`.

        Args:
            inputs: the signature. start: first axis that does not count rows.
        """
        group: list[int] = []
        for position, (spec, array, ragged) in enumerate(zip(inputs, arrays, self.axes, strict=True)):
            if array is None:
                group.append(-1 - position)
                continue
            group += [
                array.shape[axis]
                for axis, length in enumerate(spec.shape)
                if axis >= start and length == -1 and axis != ragged
            ]
        return tuple(group)

    def lengths(self, arrays: _Arrays, name: str) -> Array:
        """Tokens of each row of a request, int64 [rows]: as many as its mask says, where there is one.

        Raises:
            InvalidArgument: the mask of a row has tokens behind padding: nothing is known of the places of such tokens.
        """
        mask = arrays[self.mask] if self.mask >= 0 else None
        if mask is None:
            one = next(array for array, axis in zip(arrays, self.axes, strict=True) if array is not None and axis)
            return np.full(len(one), one.shape[1], np.int64)
        kept = mask != 0
        if (kept[:, 1:] & ~kept[:, :-1]).any():
            row = int(np.argmax((kept[:, 1:] & ~kept[:, :-1]).any(1)))
            raise InvalidArgument(
                f"model {name!r}: the mask of row {row} has a token behind padding: its model is packed, and takes the "
                f"tokens of a row from the front"
            )
        counted: Array = kept.sum(1, dtype=np.int64)
        return counted

    def pack(self, items: Sequence[_Arrays], name: str) -> list[Array | None]:
        """Arguments of a packed model for some requests: tokens one after the other, then `OFFSETS`."""
        counts = [self.lengths(item, name) for item in items]
        packed: list[Array | None] = []
        for position, axis in enumerate(self.axes):
            if position == self.mask:
                continue
            parts = [item[position] for item in items]
            if parts[0] is None:
                packed.append(None)
            elif not axis:
                packed.append(np.concatenate(parts))  # type: ignore[arg-type]
            else:
                tokens = [
                    row[:count]
                    for part, of_rows in zip(parts, counts, strict=True)
                    for row, count in zip(part, of_rows.tolist(), strict=True)  # type: ignore[arg-type]
                ]
                packed.append(np.concatenate(tokens) if tokens else parts[0].reshape(0, *parts[0].shape[2:]))
        offsets = np.zeros(sum(map(len, counts)) + 1, np.int64)
        np.cumsum(np.concatenate(counts), out=offsets[1:])
        packed.append(offsets)
        return packed

    def arguments(self, inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """Tensors that the module is called with, in order: the inputs, or what `pack` makes of them."""
        if not self.packed:
            return tuple(inputs)
        kept = [spec for position, spec in enumerate(inputs) if position != self.mask]
        return *kept, TensorSpec(OFFSETS, "INT64", (-1,))


class _Signature(Protocol):
    """See `tnxd.models.formats.signature.Signature`."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...
    @property
    def examples(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def max_batch_size(self) -> int: ...


def resolve(said: settings.Ragged, signature: _Signature, label: str) -> Ragged:
    """The ragged axes of a signature, as model.toml declares them.

    Args:
        label: what to call model.toml in errors.

    Raises:
        InvalidArgument: what model.toml says fits neither the signature nor itself; the sentence names file and key.
    """
    inputs, max_batch_size = signature.inputs, signature.max_batch_size
    key = f"{label}: ragged"
    if not max_batch_size:
        raise InvalidArgument(f"{key}: requests would share batches, but no axis counts rows: max_batch_size is 0")
    if not said.inputs:
        raise InvalidArgument(f"{key}.inputs: at least one input has to be named")
    axes = _axes({name: one.axis for name, one in said.inputs.items()}, inputs, f"{key}.inputs", "input")
    cuts = _axes(said.outputs, signature.outputs, f"{key}.outputs", "output")
    pads = tuple(said.inputs[spec.name].pad if spec.name in said.inputs else 0 for spec in inputs)
    for spec, pad in zip(inputs, pads, strict=True):
        if not _is_stored(pad, spec.datatype):
            raise InvalidArgument(f"{key}.inputs.{spec.name}.pad: {pad} is no {spec.datatype}")
    mask = _mask(said, inputs, axes, key)
    for spec, shape, axis in zip(inputs, signature.examples, axes, strict=True):
        if axis and shape[axis] > said.max_length:
            raise InvalidArgument(
                f"{key}.max_length: {said.max_length}, but the example of {spec.name!r} is {shape[axis]} long"
            )
    if said.max_tokens and said.max_tokens < said.max_length:
        raise InvalidArgument(f"{key}.max_tokens: {said.max_tokens}, but a row may have {said.max_length} (max_length)")
    if said.packed:
        _check_packed(said, inputs, axes, key)
    most = max(DEFAULT_PACKED_TOKENS, said.max_length) if said.packed else max_batch_size * said.max_length
    return Ragged(axes, pads, cuts, said.max_length, said.max_tokens or most, mask, said.packed)


def _axes(said: dict[str, int], specs: Sequence[TensorSpec], key: str, what: str) -> tuple[int, ...]:
    names = [spec.name for spec in specs]
    for name, axis in said.items():
        if name not in names:
            raise InvalidArgument(f"{key}.{name}: there is no such {what}, only {', '.join(names)}")
        shape = specs[names.index(name)].shape
        if axis == 0:
            raise InvalidArgument(f"{key}.{name}: axis 0 counts rows")
        if axis >= len(shape):
            raise InvalidArgument(f"{key}.{name}: axis {axis}, but its shape is {list(shape)}")
        if shape[axis] != -1:
            raise InvalidArgument(f"{key}.{name}: axis {axis} always has length {shape[axis]}")
    return tuple(said.get(name, 0) for name in names)


def _mask(said: settings.Ragged, inputs: Sequence[TensorSpec], axes: Sequence[int], key: str) -> int:
    if not said.mask:
        return -1
    if said.mask not in said.inputs:
        raise InvalidArgument(f"{key}.mask: {said.mask!r} is none of ragged.inputs: {', '.join(said.inputs)}")
    position = [spec.name for spec in inputs].index(said.mask)
    if len(inputs[position].shape) != 2 or axes[position] != 1:
        raise InvalidArgument(
            f"{key}.mask: {said.mask!r} is {list(inputs[position].shape)}: a mask has a number for each token of a row"
        )
    if said.inputs[said.mask].pad != 0:
        raise InvalidArgument(
            f"{key}.inputs.{said.mask}.pad: {said.inputs[said.mask].pad}, but a mask is 0 where there is padding"
        )
    return position


def _check_packed(said: settings.Ragged, inputs: Sequence[TensorSpec], axes: Sequence[int], key: str) -> None:
    for spec, axis in zip(inputs, axes, strict=True):
        if axis > 1:
            raise InvalidArgument(f"{key}.inputs.{spec.name}.axis: {axis}, but packed tokens lie along axis 1")
        if spec.name == OFFSETS:
            raise InvalidArgument(f"{key}.packed: the input {OFFSETS!r} has the name of what a packed model is told")
    if all(spec.name == said.mask for spec, axis in zip(inputs, axes, strict=True) if axis):
        raise InvalidArgument(f"{key}.packed: no input is left for the model but the mask")
    if said.outputs:
        raise InvalidArgument(f"{key}.outputs: a packed model answers with a row for each row: nothing is cut back")


def _is_stored(value: bool | int | float, datatype: str) -> bool:
    """Whether a datatype has that number."""
    dtype = STORAGE[datatype]
    if datatype == "BF16" or dtype.kind == "f":
        return True
    if dtype.kind == "b":
        return value in (0, 1)
    bounds = np.iinfo(dtype)
    return float(value).is_integer() and bounds.min <= value <= bounds.max


def stored_pad(value: bool | int | float, datatype: str) -> bool | int | float:
    """The number that stands for padding in an array as on the wire: BF16 is stored as 16-bit patterns."""
    return int(np.float32(value).view(np.uint32)) >> 16 if datatype == "BF16" else value
