"""Inputs of ModelInfer as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnxctl.bridge.grpc.messages import plain
from tnxctl.bridge.oip import tensors
from tnxctl.bridge.oip.shared_memory import Regions, place_of
from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.fields import BYTES
from tnxctl.protocol.limits import Limits, excerpt

CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Datatype -> the field of InferTensorContents that has its elements. What is missing travels raw alone."""


def inputs_of(inputs: Sequence[Any], raw: Sequence[memoryview], limits: Limits, regions: Regions) -> dict[str, Array]:
    """The inputs of a request, by name.

    Args:
        inputs: of a ModelInferRequest. raw: its raw_input_contents, of which the arrays are views; (): it has none.
            What is in shared memory has none.
        regions: of shared memory, out of which inputs are copied.

    Raises:
        InvalidArgument: a tensor is not what it says, a limit does not hold, or raw_input_contents and contents are
            mixed; the sentence names what is wrong.
        NotFound, Unimplemented: as `Regions.read` does.
    """
    places = [place_of(plain(tensor.parameters), tensor.name) if tensor.parameters else None for tensor in inputs]
    if raw and len(raw) != places.count(None):
        raise InvalidArgument(f"{places.count(None)} inputs and {len(raw)} raw_input_contents: expected one for each")
    contents = iter(raw)
    arrays: dict[str, Array] = {}
    for tensor, place in zip(inputs, places, strict=True):
        name = tensor.name
        if name in arrays:
            raise InvalidArgument(f"two inputs have the name {excerpt(name)}")
        if place is not None:
            content = regions.read(place, name, limits.message_bytes)
            arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, content, limits)
        elif not raw:
            arrays[name] = _from_contents(tensor, limits)
        elif tensor.HasField("contents"):
            raise InvalidArgument(f"input {excerpt(name)} has contents beside raw_input_contents: expected either")
        else:
            arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, next(contents), limits)
    return arrays


def _from_contents(tensor: Any, limits: Limits) -> Array:
    """The array of the elements in the field for its datatype."""
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    field = CONTENTS.get(datatype)
    if field is None:
        if datatype in STORAGE:
            raise InvalidArgument(f"input {excerpt(name)}: contents cannot hold {datatype}, raw_input_contents can")
        return tensors.from_json(name, datatype, shape, [])  # which says what is known
    for other, _ in tensor.contents.ListFields():
        if other.name != field:
            raise InvalidArgument(f"input {excerpt(name)}: {datatype} has its elements in {field}, not in {other.name}")
    if len(shape) > limits.rank or min(shape, default=0) < 0:
        raise InvalidArgument(
            f"input {excerpt(name)}: shape {excerpt([*shape])}: expected up to {limits.rank} lengths, each 0 or more"
        )
    elements = [*getattr(tensor.contents, field)]
    if datatype != BYTES:
        return tensors.from_json(name, datatype, shape, elements)
    try:
        return strings.array_of(elements, shape)
    except ValueError:
        raise InvalidArgument(
            f"input {excerpt(name)}: {field} has {len(elements)} elements, its shape is {excerpt([*shape])}"
        ) from None
