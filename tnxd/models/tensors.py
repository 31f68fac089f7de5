"""numpy arrays of the wire <-> torch tensors, and a model's raw result -> outputs that fit its signature.

torch has no strings: a BYTES tensor stays the numpy array that it is, see `tnxctl.protocol.strings`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tnxctl.protocol.datatypes import ML_DTYPES, STORAGE, Array
from tnxctl.protocol.errors import FailedPrecondition, Internal
from tnxctl.protocol.strings import OBJECT, odd_type
from tnxctl.protocol.wire import BYTES, TensorSpec, excerpt
from tnxd.models import structures
from tnxd.models.model import Model

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "UINT8": torch.uint8,
    "UINT16": torch.uint16,
    "UINT32": torch.uint32,
    "UINT64": torch.uint64,
    "INT8": torch.int8,
    "INT16": torch.int16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "FP16": torch.float16,
    "FP32": torch.float32,
    "FP64": torch.float64,
    "BF16": torch.bfloat16,
}
"""Datatype -> dtype, of all that torch has."""

DATATYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch dtype -> datatype name."""

_PATTERNS: dict[torch.dtype, torch.dtype] = {
    TORCH_DTYPES[name]: torch.from_numpy(np.empty(0, STORAGE[name])).dtype for name in ML_DTYPES
}
"""torch dtype that numpy lacks -> that of its bit patterns."""

_RETURNED: dict[str, torch.dtype | None] = {**TORCH_DTYPES, BYTES: None}
"""Datatype of an output -> dtype of the tensor that has to be returned; None: it is no tensor."""

_ONE_SIDED = frozenset({*ML_DTYPES, BYTES})
"""Datatypes that numpy or torch lacks."""

_ODD_DTYPES = frozenset({*_PATTERNS, OBJECT})
"""Their dtypes, of torch and numpy."""

Value = torch.Tensor | Array
"""Input or output of a module: a tensor, or an array if it is BYTES."""

_VALUE_KINDS = (torch.Tensor, np.ndarray)


def to_tensor(array: Array, datatype: str) -> Value:
    """A tensor over the memory of the array, or of a copy if that is not aligned, as small received frames may be.

    Args:
        array: of the dtype that `tnxctl.protocol.datatypes.STORAGE` has for the datatype. BYTES stays an array.
    """
    if datatype in _ONE_SIDED:
        if datatype == BYTES:
            return array
        return torch.from_numpy(array if array.flags.aligned else array.copy()).view(TORCH_DTYPES[datatype])
    return torch.from_numpy(array if array.flags.aligned else array.copy())


def on_device(array: Array, datatype: str, device: torch.device) -> Value:
    """A copy of an array, on a device; BYTES stays on the host."""
    value = to_tensor(array.copy(), datatype)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def to_array(value: Value) -> Array:
    """A C-contiguous array over the memory of a CPU tensor, copied only if the tensor is not contiguous."""
    if value.dtype in _ODD_DTYPES:
        if isinstance(value, np.ndarray):
            return np.asarray(value, order="C")
        value = value.contiguous().view(_PATTERNS[value.dtype])
    array: Array = value.contiguous().numpy()  # type: ignore[union-attr]
    return array


def copied(value: Value) -> Array:
    """A copy, on the host, of a value on any device."""
    return to_array(value.cpu() if isinstance(value, torch.Tensor) else value).copy()


def array_of(tensor: torch.Tensor, spec: TensorSpec) -> Array:
    """`to_array` of an output, on any device. Raises Internal: it is of another datatype than its signature says."""
    if tensor.dtype is not TORCH_DTYPES.get(spec.datatype):
        raise Internal(f"output {spec.name!r} is {tensor.dtype}, its signature says {spec.datatype}")
    return to_array(tensor.detach().cpu())


def empty_outputs(model: Model) -> list[Array] | None:
    """The outputs of a model that batches for no rows; None where only the model knows the length of an axis."""
    if any(-1 in spec.shape[1:] for spec in model.outputs):
        return None
    return [
        np.empty((0, *spec.shape[1:]), OBJECT)
        if spec.datatype == BYTES
        else to_array(torch.empty((0, *spec.shape[1:]), dtype=TORCH_DTYPES[spec.datatype], device="cpu"))
        for spec in model.outputs
    ]


def check_outputs(model: Model, raw: object, rows: int) -> list[Value]:
    """A module's result as one tensor per output of the signature, in order; an array of `bytes` for BYTES.

    Raises:
        Internal: it is not what the signature promises; the sentence says how.
    """
    expected = model.outputs
    tensors: list[Value] = []
    for spec, tensor in zip(expected, _found(model, raw), strict=True):
        if not isinstance(tensor, torch.Tensor):
            tensor = _strings(model, spec, tensor)
        elif tensor.dtype is not _RETURNED[spec.datatype]:
            raise Internal(
                f"model {model.name!r}: output {spec.name!r} is {tensor.dtype}, its signature says {spec.datatype}"
            )
        shape = tensor.shape
        wanted = (rows, *spec.shape[1:]) if model.max_batch_size else spec.shape
        if shape != wanted and (
            len(shape) != len(wanted) or any(w not in (-1, s) for s, w in zip(shape, wanted, strict=True))
        ):
            raise Internal(f"model {model.name!r}: output {spec.name!r} has shape {list(shape)}, not {list(wanted)}")
        tensors.append(tensor)
    return tensors


def _strings(model: Model, spec: TensorSpec, value: object) -> Array:
    """An output that is no tensor, which has to be an array of `bytes`. Raises Internal: it is not."""
    called = f"model {model.name!r}: output {spec.name!r}"
    if spec.datatype != BYTES:
        raise Internal(f"{called} is {type(value).__name__}, not a tensor")
    if not isinstance(value, np.ndarray) or not value.dtype.hasobject:
        kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise Internal(f"{called} is {kind}, its signature says BYTES: a numpy array of objects, each a bytes")
    odd = odd_type(value)
    if odd:
        raise Internal(f"{called} is BYTES, and has an element that is {odd}")
    return value


def _found(model: Model, raw: object) -> Sequence[object]:
    """The value for each output of the signature. Most models return just that; others a structure with it inside."""
    expected = model.outputs
    if isinstance(raw, torch.Tensor):
        if len(expected) == 1:
            return (raw,)
    elif type(raw) in (tuple, list):
        assert isinstance(raw, (tuple, list))
        if len(raw) == len(expected) and all(isinstance(part, _VALUE_KINDS) for part in raw):
            return raw
    elif isinstance(raw, dict):
        found = [raw.get(spec.name) for spec in expected]
        if all(isinstance(part, _VALUE_KINDS) for part in found):
            return found
    return pick(raw, [spec.name for spec in expected], model.name)


def pick(raw: object, names: Sequence[str], model: str) -> list[object]:
    """Pick what has those names out of a structure that a model returned; out of a tuple or list, in that order.

    Raises:
        Internal: it is not there; the sentence says what is.
    """
    try:
        found = structures.leaves(raw)
    except FailedPrecondition as error:
        raise Internal(f"model {model!r} returned {error.message}") from None
    named = structures.has_names(raw)
    if not named and not all(name in found for name in names):
        tensors = [value for value in found.values() if isinstance(value, _VALUE_KINDS)]
        if len(tensors) == len(names):
            return [*tensors]
        if not tensors:
            raise Internal(f"model {model!r} returned {type(raw).__name__}, not tensors")
        raise Internal(
            f"model {model!r} returned {len(tensors)} outputs, its signature has {len(names)}: {excerpt([*found])}"
        )
    for name in names:
        if name not in found:
            within = [path for path in found if path.startswith(f"{name}.")]
            what = f"{excerpt(within)} within it" if within else f"only {excerpt([*found])}"
            raise Internal(f"model {model!r} did not return the output {name!r}, {what}")
    return [found[name] for name in names]
