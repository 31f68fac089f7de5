"""What a model is to the daemon: a signature that requests are held against, and a factory of torch modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tnxctl.errors import InvalidArgument
from tnxctl.frames import Array
from tnxctl.wire import TensorSpec, excerpt

if TYPE_CHECKING:
    import torch


class BoundInputs(NamedTuple):
    """Inputs that fit a signature.

    Attributes:
        arrays: in the signature's order.
        rows: length of axis 0; 1 for a model without a batch axis.
        group: lengths of the variable axes; only requests with equal groups can share a batch.
    """

    arrays: tuple[Array, ...]
    rows: int
    group: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """One version of one model.

    Attributes:
        inputs, outputs: the signature; -1 is an axis of any length. If the model batches, axis 0 of every tensor
            counts rows and is -1.
        max_batch_size: most rows in one forward; 0 if the model has no batch axis.
        factory: makes the module, on the CPU. All lanes of a device share it, each on a thread of its own. The module
            is called with the inputs in order and returns one tensor, a sequence in the order of `outputs`, or a dict
            by name. It must return fresh tensors: an output may still be on its way to a client while the next batch
            runs.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    factory: Callable[[], torch.nn.Module] = field(repr=False, compare=False)

    def bind(self, specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> BoundInputs:
        """Hold a request's tensors against the signature.

        Args:
            specs: as sent. A single tensor may have the name "", it is then the model's only input.
            arrays: one per entry of `specs`.

        Raises:
            InvalidArgument: a name, datatype, rank or length does not fit; the sentence names it.
        """
        rows: int | None = None
        lengths: tuple[int, ...] = ()
        if len(specs) == 1 and len(self.inputs) == 1 and specs[0].name in ("", self.inputs[0].name):
            ordered = tuple(arrays)
            rows, lengths = self._fit(self.inputs[0], specs[0], None)
        else:
            positions = self._positions(specs)
            ordered = tuple([arrays[positions[expected.name]] for expected in self.inputs])
            for expected in self.inputs:
                rows, group = self._fit(expected, specs[positions[expected.name]], rows)
                lengths += group
        if rows is None:
            return BoundInputs(ordered, 1, lengths)
        if rows > self.max_batch_size and not any(array.size for array in ordered):
            raise InvalidArgument(
                f"model {self.name!r}: {rows} rows without an element; it takes {self.max_batch_size}"
            )
        return BoundInputs(ordered, rows, lengths)

    def _positions(self, specs: Sequence[TensorSpec]) -> dict[str, int]:
        positions = {spec.name: position for position, spec in enumerate(specs)}
        if len(positions) != len(specs):
            names = [spec.name for spec in specs]
            raise InvalidArgument(f"an input of {self.name!r} came twice: {excerpt(names)}")
        wanted = [expected.name for expected in self.inputs]
        unknown = [name for name in positions if name not in wanted]
        if unknown:
            raise InvalidArgument(f"model {self.name!r} has no input {excerpt(unknown[0])}; its inputs are {wanted}")
        missing = [name for name in wanted if name not in positions]
        if missing:
            raise InvalidArgument(f"model {self.name!r} needs the input {missing[0]!r}, which did not come")
        return positions

    def _fit(self, expected: TensorSpec, got: TensorSpec, rows: int | None) -> tuple[int | None, tuple[int, ...]]:
        """Check one tensor; return the rows it fixes and the lengths of its other variable axes."""
        if got.datatype != expected.datatype:
            raise self._misfit(expected, f"takes {expected.datatype}, got {got.datatype}")
        shape, wanted = got.shape, expected.shape
        if len(shape) != len(wanted):
            raise self._misfit(
                expected, f"takes rank {len(wanted)} {list(wanted)}, got rank {len(shape)} {excerpt(list(shape))}"
            )
        start = 0
        if self.max_batch_size:
            if rows is not None and shape[0] != rows:
                raise self._misfit(expected, f"has {shape[0]} rows, the inputs before it have {rows}")
            rows, start = shape[0], 1
        if shape[start:] == wanted[start:]:
            return rows, ()
        group = []
        for axis in range(start, len(wanted)):
            if wanted[axis] == -1:
                group.append(shape[axis])
            elif wanted[axis] != shape[axis]:
                raise self._misfit(expected, f"takes {list(wanted)}, got {excerpt(list(shape))}: axis {axis} differs")
        return rows, tuple(group)

    def _misfit(self, expected: TensorSpec, what: str) -> InvalidArgument:
        return InvalidArgument(f"model {self.name!r}: input {expected.name!r} {what}")

    @property
    def example_group(self) -> tuple[int, ...]:
        """The group of inputs that have the example shapes."""
        start = 1 if self.max_batch_size else 0
        return tuple(1 for spec in self.inputs for length in spec.shape[start:] if length == -1)

    def example_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """A shape for every input, `rows` rows long; other variable axes get length 1."""
        return [
            tuple(
                rows if axis == 0 and self.max_batch_size else max(length, 1) for axis, length in enumerate(spec.shape)
            )
            for spec in self.inputs
        ]
