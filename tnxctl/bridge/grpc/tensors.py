"""Tensors of ModelInfer: messages to arrays, and arrays to messages."""

from __future__ import annotations

from typing import Any

from tnxctl.bridge.oip import tensors
from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array, datatype_of
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


def inputs_of(request: Any, limits: Limits) -> dict[str, Array]:
    """The inputs of a ModelInferRequest, by name; raw ones are views of what came.

    Raises:
        InvalidArgument: a tensor is not what it says, a limit does not hold, or raw_input_contents and contents are
            mixed; the sentence names what is wrong.
    """
    raw = [*request.raw_input_contents]
    if raw and len(raw) != len(request.inputs):
        raise InvalidArgument(f"{len(request.inputs)} inputs and {len(raw)} raw_input_contents: expected one for each")
    arrays: dict[str, Array] = {}
    for position, tensor in enumerate(request.inputs):
        name = tensor.name
        if name in arrays:
            raise InvalidArgument(f"two inputs have the name {excerpt(name)}")
        if not raw:
            arrays[name] = _from_contents(tensor, limits)
        elif tensor.HasField("contents"):
            raise InvalidArgument(f"input {excerpt(name)} has contents beside raw_input_contents: expected either")
        else:
            arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, memoryview(raw[position]), limits)
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


def fill(response: Any, outputs: list[tuple[str, Array]], raw: bool) -> None:
    """Add outputs to a ModelInferResponse.

    Args:
        raw: as raw_output_contents. False: as contents, if these can hold all of them: a response has one or the other.

    Raises:
        InvalidArgument: an element of a BYTES tensor is too long.
    """
    typed = not raw and all(datatype_of(array.dtype) in CONTENTS for _, array in outputs)
    for name, array in outputs:
        datatype, shape, chunk = tensors.encoded(name, array)
        tensor = response.outputs.add(name=name, datatype=datatype, shape=shape)
        if typed:
            getattr(tensor.contents, CONTENTS[datatype]).extend(array.ravel().tolist())
        else:
            response.raw_output_contents.append(chunk.tobytes())
