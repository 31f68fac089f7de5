"""A model as the daemon sees it: a signature that requests are held against, and a factory of torch modules.

Holding a request against the signature is a method of `Model` and no module beside it: every request goes through it,
and one more call would cost each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from tnxctl.protocol.datatypes import STORAGE, Array, python_name
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.strings import nbytes_of, not_text
from tnxctl.protocol.wire import BYTES, DEFAULT_PRIORITY, TensorSpec, excerpt
from tnxd.device_kinds import PROCESS, kind_of
from tnxd.models.ragged import Ragged
from tnxd.models.variants import AUTO, Variant

if TYPE_CHECKING:
    import torch

    from tnxd.models.python.processes import Restarts


Item = tuple[Array | None, ...]
"""The inputs of one request, in the order of the signature; None for one that did not come."""

DEFAULT_AUDIT = 0.001
"""Share of the batches that are computed again where model.toml does not say another."""


class BoundInputs(msgspec.Struct, frozen=True, gc=False):
    """Inputs that fit a signature.

    Attributes:
        arrays: in the signature's order; None for an optional input that did not come.
        rows: length of axis 0; 1 for a model without a batch axis.
        group: lengths of the variable axes, and a negative number that stands for an input that did not come; only
            requests with equal groups can share a batch. Of a model whose ragged axes join, without these.
        nbytes: of all arrays.
        units: what scheduling counts: the rows, or the tokens of a model whose ragged axes join.
        length: of ragged axes that are padded, at least 1; 0: there are none.
    """

    arrays: Item
    rows: int
    group: tuple[int, ...]
    nbytes: int
    units: int
    length: int = 0


@dataclass(frozen=True)
class Model:
    """One version of one model, ready to be put on devices.

    Attributes:
        name, version: `key` joins them.
        inputs, outputs: the signature; -1 is an axis of any length. If the model batches, axis 0 of every tensor
            counts rows and is -1.
        max_batch_size: most rows in one forward; 0 if the model has no batch axis.
        factory: makes the module, on the CPU. All lanes of a device share it, each on a thread of its own. The module
            is called with the inputs in order and returns one tensor, a sequence in the order of `outputs`, or a dict
            by name. It must return fresh tensors: an output may still be on its way to a client while the next batch
            runs. What it raises is why the model cannot be loaded.
        format: where it comes from, for people.
        devices: names of the devices that it may be put on, or kinds ("cuda"); empty: all.
        replicas: how many batches of it a device may run at a time; 0: as many as the device has lanes. They share one
            copy of the weights.
        threads: that work on each batch on a CPU; 0: chosen for each batch.
        max_delay_us: how long a batch smaller than the limit waits for company; None: as the daemon is configured.
        time_limit_s: a batch that runs longer is given up; None: as the daemon is configured.
        deadline_us, priority: of requests that say nothing about it.
        optional: inputs that a request may leave out -> the number that fills them then, without axes, or None, which
            the module gets in its place.
        warm_up: batch sizes to run before it serves; None: 1, 2, 4, ... up to the limit.
        generation: counts how often this version has been loaded anew with other contents.
        notes: what an operator should know about it.
        examples: a shape for every input, to warm up with; empty: axes of any length have length 1.
        example_values: input -> an array to warm up with, as a client would send it: of the input's datatype (as
            `tnxctl.protocol.datatypes.STORAGE` keeps it), of its shape. If the model batches, axis 0 has as many rows
            in all of them, at least one. Inputs that nothing is known about are not in it. They must not be written to.
        writes: names of what its module holds (buffers, parameters, constants, attributes) and may write to in a
            forward, as far as its graph tells; a module of plain Python tells nothing.
        state: "shared": what the module keeps from one request to the next is meant for all of them. "random": its
            answers are drawn at random, whatever generators the trial sees.
        audit: share of its batches that are computed again in idle time.
        batching_asked: whether model.toml itself says that axis 0 counts rows; else it was derived.
        isolation: "none": it may run on the serving thread; "thread": only on lanes; "process": in processes.
        restarts: of the processes; None: it has none.
        ragged: axes whose lengths differ from request to request; None: it has none, or only equal ones share a batch.
        variants: of its module, that may be faster. optimize: the one that is wanted, or AUTO, or NONE.
        graphs: whether a GPU may capture its forwards.
        reference: makes the module in the datatype of its weights, where model.toml has another one run.
        text: names of the BYTES inputs that have to be UTF-8; others may hold any bytes.
        reply_row_nbytes: bytes of the outputs for each row, or of an answer if it has no batch axis; 0: not known
            before they are computed, as of strings.
        takes_strings, returns_strings: whether an input, or an output, is BYTES.
        arguments: tensors that the module is called with: the inputs, but for a packed model.
        max_units: most of what scheduling counts in one batch, see `BoundInputs.units`; 0: no batches.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    factory: Callable[[], torch.nn.Module] = field(repr=False, compare=False)
    format: str = "built-in"
    devices: tuple[str, ...] = ()
    replicas: int = 0
    threads: int = 0
    max_delay_us: float | None = None
    time_limit_s: float | None = None
    deadline_us: float | None = None
    priority: int = DEFAULT_PRIORITY
    warm_up: tuple[int, ...] | None = None
    generation: int = 0
    notes: tuple[str, ...] = ()
    examples: tuple[tuple[int, ...], ...] = ()
    optional: Mapping[str, Array | None] = field(default_factory=dict, compare=False)
    example_values: Mapping[str, Array] = field(default_factory=dict, repr=False, compare=False)
    writes: tuple[str, ...] = ()
    state: Literal["", "shared", "random"] = ""
    audit: float = DEFAULT_AUDIT
    batching_asked: bool = False
    isolation: Literal["none", "thread", "process"] = "none"
    restarts: Restarts | None = field(default=None, compare=False)
    ragged: Ragged | None = None
    variants: tuple[Variant, ...] = field(default=(), repr=False, compare=False)
    optimize: str = AUTO
    graphs: bool = True
    reference: Callable[[], torch.nn.Module] | None = field(default=None, repr=False, compare=False)
    text: tuple[str, ...] = ()
    key: str = field(init=False)
    reply_row_nbytes: int = field(init=False, repr=False, compare=False)
    takes_strings: bool = field(init=False, repr=False, compare=False)
    returns_strings: bool = field(init=False, repr=False, compare=False)
    arguments: tuple[TensorSpec, ...] = field(init=False, repr=False, compare=False)
    max_units: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", model_key(self.name, self.version, self.generation))
        object.__setattr__(self, "reply_row_nbytes", row_nbytes(self.outputs, bool(self.max_batch_size)))
        object.__setattr__(self, "takes_strings", any(spec.datatype == BYTES for spec in self.inputs))
        object.__setattr__(self, "returns_strings", any(spec.datatype == BYTES for spec in self.outputs))
        arguments = self.inputs if self.ragged is None else self.ragged.arguments(self.inputs)
        object.__setattr__(self, "arguments", arguments)
        most = self.max_batch_size if self.ragged is None or not self.ragged.joins else self.ragged.max_tokens
        object.__setattr__(self, "max_units", most)

    @property
    def joins(self) -> bool:
        """Whether requests of different lengths may share a batch."""
        return self.ragged is not None and self.ragged.joins

    def singly(self) -> Model:
        """The same model, for requests that run alone. One that is packed goes on to be called as it was."""
        if self.ragged is None or not self.ragged.packed:
            return self.unbatched()
        return replace(self, ragged=replace(self.ragged, max_tokens=1))

    @property
    def pads(self) -> bool:
        """Whether they do so padded to the longest."""
        return self.ragged is not None and self.ragged.joins and not self.ragged.packed

    def unbatched(self) -> Model:
        """The same model, for requests that run alone and whole.

        Raises:
            FailedPrecondition: it is packed, and knows nothing but batches.
        """
        ragged = self.ragged
        if ragged is not None:
            if ragged.packed:
                raise FailedPrecondition(
                    f"{self.name}/model.toml: ragged.packed: its requests cannot share a batch, and a packed model "
                    f"takes nothing else"
                )
            ragged = ragged.apart()
        return replace(self, max_batch_size=0, warm_up=None if self.warm_up else self.warm_up, ragged=ragged)

    def with_rows(self, rows: int) -> Model:
        """The same model, whose examples have so many rows along axis 0 where it may have any length."""
        shapes = self.examples or [tuple(max(length, 1) for length in spec.shape) for spec in self.inputs]
        free = [
            (rows, *shape[1:]) if spec.shape[:1] == (-1,) else shape
            for spec, shape in zip(self.inputs, shapes, strict=True)
        ]
        return replace(self, examples=tuple(free))

    def may_use(self, device: str) -> bool:
        """Whether it may be put on the device of that name."""
        if kind_of(device) == PROCESS.name or self.isolation == PROCESS.name:
            return kind_of(device) == self.isolation
        return not self.devices or device in self.devices or kind_of(device) in self.devices

    def bind(self, specs: Sequence[TensorSpec], arrays: Sequence[Array]) -> BoundInputs:
        """Hold a request's tensors against the signature.

        Args:
            specs: as sent. A single tensor may have the name "", it is then the only input that the model needs.
            arrays: one per entry of `specs`.

        Raises:
            InvalidArgument: a name, datatype, rank or length does not fit; the sentence names it.
        """
        rows: int | None = None
        lengths: tuple[int, ...] = ()
        ordered: Item
        if len(specs) == 1 and len(self.inputs) == 1 and specs[0].name in ("", self.inputs[0].name):
            ordered = tuple(arrays)
            rows, lengths = self._fit(self.inputs[0], specs[0], None)
        else:
            positions = self._positions(specs)
            if self.optional and len(positions) < len(self.inputs):
                return self._bind_some(specs, arrays, positions)
            ordered = tuple([arrays[positions[expected.name]] for expected in self.inputs])
            for expected in self.inputs:
                rows, group = self._fit(expected, specs[positions[expected.name]], rows)
                lengths += group
        return self._bound(ordered, rows, lengths)

    def _bind_some(
        self, specs: Sequence[TensorSpec], arrays: Sequence[Array], positions: dict[str, int]
    ) -> BoundInputs:
        """The same for a request that leaves optional inputs out."""
        rows: int | None = None
        groups: list[tuple[int, ...]] = []
        for index, expected in enumerate(self.inputs):
            position = positions.get(expected.name)
            if position is None:
                groups.append((-1 - index,))
            else:
                rows, group = self._fit(expected, specs[position], rows)
                groups.append(group)
        came = [(expected, specs[positions[expected.name]]) for expected in self.inputs if expected.name in positions]
        ordered: list[Array | None] = []
        for index, expected in enumerate(self.inputs):
            value = self.optional.get(expected.name)
            if expected.name in positions:
                ordered.append(arrays[positions[expected.name]])
            elif value is None:
                ordered.append(None)
            else:
                shape = self._filled_shape(expected, came, rows)
                ordered.append(np.full(shape, value, value.dtype))
                _, groups[index] = self._fit(expected, TensorSpec(expected.name, expected.datatype, shape), rows)
        return self._bound(tuple(ordered), rows, sum(groups, ()))

    def _filled_shape(
        self, expected: TensorSpec, came: Sequence[tuple[TensorSpec, TensorSpec]], rows: int | None
    ) -> tuple[int, ...]:
        """The shape of an input that did not come: an axis of any length is as long as in the first input that did."""
        shape = list(expected.shape)
        for axis, length in enumerate(expected.shape):
            if length == -1:
                like = [got.shape[axis] for want, got in came if want.shape[axis : axis + 1] == (-1,)]
                shape[axis] = like[0] if like else 1
        if rows is not None:
            shape[0] = rows
        return tuple(shape)

    def _bound(self, ordered: Item, rows: int | None, lengths: tuple[int, ...]) -> BoundInputs:
        if self.takes_strings:
            self._check_text(ordered)
            nbytes = sum([nbytes_of(array) for array in ordered if array is not None])
        else:
            nbytes = sum([array.nbytes for array in ordered if array is not None])
        length = self.ragged.length(self.inputs, ordered, self.name) if self.ragged is not None else 0
        if rows is None:
            return BoundInputs(ordered, 1, lengths, nbytes, 1)
        if rows > self.max_batch_size and not any(array.size for array in ordered if array is not None):
            raise InvalidArgument(
                f"model {self.name!r}: {rows} rows without an element; it takes {self.max_batch_size}"
            )
        if self.ragged is None or not self.ragged.joins:
            return BoundInputs(ordered, rows, lengths, nbytes, rows)
        group = self.ragged.group(self.inputs, ordered, 1)
        if self.ragged.packed:
            return BoundInputs(ordered, rows, group, nbytes, int(self.ragged.lengths(ordered, self.name).sum()))
        length = max(length, 1)
        return BoundInputs(ordered, rows, group, nbytes, rows * length, length)

    def _check_text(self, ordered: Item) -> None:
        for expected, array in zip(self.inputs, ordered, strict=True):
            if array is not None and expected.name in self.text:
                fault = not_text(array)
                if fault:
                    raise self._misfit(expected, f"takes text: {fault}")

    def _positions(self, specs: Sequence[TensorSpec]) -> dict[str, int]:
        positions = {spec.name: position for position, spec in enumerate(specs)}
        if len(positions) != len(specs):
            names = [spec.name for spec in specs]
            raise InvalidArgument(f"an input of {self.name!r} came twice: {excerpt(names)}")
        wanted = [expected.name for expected in self.inputs]
        if list(positions) == [""]:
            required = [name for name in wanted if name not in self.optional]
            if len(required) == 1:
                return {required[0]: 0}
        unknown = [name for name in positions if name not in wanted]
        if list(positions) == [""]:
            raise InvalidArgument(f"model {self.name!r} takes several inputs, {wanted}: each needs its name")
        if unknown:
            raise InvalidArgument(f"model {self.name!r} has no input {excerpt(unknown[0])}; its inputs are {wanted}")
        missing = [name for name in wanted if name not in positions and name not in self.optional]
        if not missing and not positions:
            missing = wanted  # something has to come
        if missing:
            raise InvalidArgument(f"model {self.name!r} needs the input {missing[0]!r}, which did not come")
        return positions

    def _fit(self, expected: TensorSpec, got: TensorSpec, rows: int | None) -> tuple[int | None, tuple[int, ...]]:
        """Check one tensor; return the rows it fixes and the lengths of its other variable axes."""
        if got.datatype != expected.datatype:
            hint = f"with numpy, .astype({python_name(expected.datatype)}) converts it"
            if BYTES in (got.datatype, expected.datatype):
                hint = "BYTES are strings, the other datatypes numbers"
            raise self._misfit(expected, f"takes {expected.datatype}, got {got.datatype}: {hint}")
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
        ragged = self.ragged.axes if self.ragged is not None and self.ragged.joins else [0] * len(self.inputs)
        return tuple(
            length
            for spec, shape, apart in zip(self.inputs, self.example_shapes(1), ragged, strict=True)
            for axis, (wanted, length) in enumerate(zip(spec.shape, shape, strict=True))
            if axis >= start and wanted == -1 and (not apart or axis != apart)
        )

    @property
    def example_rows(self) -> int:
        """Length of axis 0 in the example shapes."""
        return next((shape[0] for shape in self.examples if shape), 1)

    def example_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """A shape for every input, `rows` rows long."""
        shapes = self.examples or [tuple(max(length, 1) for length in spec.shape) for spec in self.inputs]
        return [(rows, *shape[1:]) if self.max_batch_size else shape for shape in shapes]


def row_count(item: Item) -> int:
    """Rows of a request to a model with a batch axis."""
    return next(len(array) for array in item if array is not None)


def model_key(name: str, version: str, generation: int) -> str:
    """The key of one content of one version wherever models are told apart.

    Two contents of one version live side by side while the new one takes over.
    """
    return f"{name}@{version}#{generation}" if generation else f"{name}@{version}"


def row_nbytes(specs: Sequence[TensorSpec], batches: bool) -> int:
    """Bytes of all these tensors for one row, or in all if axis 0 counts none; 0 if other axes or strings vary."""
    shapes = [spec.shape[1:] if batches else spec.shape for spec in specs]
    if any(-1 in shape for shape in shapes) or any(spec.datatype == BYTES for spec in specs):
        return 0
    return sum(math.prod(shape) * STORAGE[spec.datatype].itemsize for shape, spec in zip(shapes, specs, strict=True))
