"""Requests of ModelInfer read, and their inputs as arrays.

A long request is read in two parts: typed contents become arrays wherever that may take its time, what is left stays a
message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tnxctl.bridge.grpc.messages import ModelInferRequest, parsed, plain
from tnxctl.bridge.oip import tensors
from tnxctl.bridge.oip.shared_memory import Regions, place_of
from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument, ResourceExhausted
from tnxctl.protocol.fields import BYTES
from tnxctl.protocol.limits import MIB, Limits, excerpt

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

_WIDER = {"int_contents": np.dtype(np.int32), "uint_contents": np.dtype(np.uint32)}
"""Fields that have the elements of narrower datatypes as well."""


MOST_BESIDE = MIB
"""Most bytes of a long request beside contents: names, shapes, parameters."""

Typed = list[Array | None] | InvalidArgument
"""Typed contents of each input, None where it has none; or what is wrong with them."""


def read_long(message: bytes, limits: Limits) -> tuple[bytes, Typed]:
    """A ModelInferRequest, encoded as it came but for its typed contents, and these.

    Raises:
        InvalidArgument: it is none.
        ResourceExhausted: it is long for other reasons than contents.
    """
    request = parsed(ModelInferRequest, message)
    typed: Typed
    try:
        typed = [_from_contents(tensor, limits) if _has_contents(tensor) else None for tensor in request.inputs]
    except InvalidArgument as error:
        typed = error
    for tensor in request.inputs:
        if tensor.HasField("contents"):
            tensor.contents.Clear()  # it still has the field, which it may not have beside raw contents
    rest = request.SerializeToString()
    if len(rest) > MOST_BESIDE:
        raise ResourceExhausted(f"the message has {len(rest)} bytes beside contents, and may have {MOST_BESIDE}")
    return rest, typed


def _has_contents(tensor: Any) -> bool:
    """Whether typed contents are what an input consists of."""
    return tensor.HasField("contents") and "shared_memory_region" not in tensor.parameters


def inputs_of(
    inputs: Sequence[Any], raw: Sequence[memoryview], limits: Limits, regions: Regions, typed: Typed | None = None
) -> dict[str, Array]:
    """The inputs of a request, by name.

    Args:
        inputs: of a ModelInferRequest. raw: its raw_input_contents, of which the arrays are views; (): it has none.
            What is in shared memory has none.
        typed: what `read_long` has made of typed contents; None: they are in `inputs`.
        regions: of shared memory, out of which inputs are copied.

    Raises:
        InvalidArgument: a tensor is not what it says, a limit does not hold, or raw_input_contents and contents are
            mixed; the sentence names what is wrong.
        NotFound, Unimplemented: as `Regions.read` does.
    """
    places = [place_of(plain(tensor.parameters), tensor.name) if tensor.parameters else None for tensor in inputs]
    if raw and len(raw) != places.count(None):
        raise InvalidArgument(f"{places.count(None)} inputs and {len(raw)} raw_input_contents: expected one for each")
    if isinstance(typed, InvalidArgument):
        raise typed
    contents = iter(raw)
    arrays: dict[str, Array] = {}
    for tensor, place, array in zip(inputs, places, typed or [None] * len(inputs), strict=True):
        name = tensor.name
        if name in arrays:
            raise InvalidArgument(f"two inputs have the name {excerpt(name)}")
        if place is not None:
            content = regions.read(place, name, limits.message_bytes)
            arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, content, limits)
        elif not raw:
            arrays[name] = _from_contents(tensor, limits) if array is None else array
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
    elements = getattr(tensor.contents, field)
    if datatype == BYTES:
        array = strings.array_of([*elements], (len(elements),))
    else:
        array = _fitting(name, datatype, np.asarray(elements, _WIDER.get(field, STORAGE[datatype])))
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidArgument(
            f"input {excerpt(name)}: {field} has {len(elements)} elements, its shape is {excerpt([*shape])}"
        ) from None


def _fitting(name: str, datatype: str, array: Array) -> Array:
    """An array as the datatype has it. Raises InvalidArgument: an integer does not fit."""
    if array.size and array.dtype != STORAGE[datatype]:
        bounds, least, most = np.iinfo(STORAGE[datatype]), int(array.min()), int(array.max())
        if least < bounds.min or most > bounds.max:
            wrong = least if least < bounds.min else most
            raise InvalidArgument(f"input {excerpt(name)}: its data is no {datatype}: {wrong} is out of range")
    return array.astype(STORAGE[datatype], copy=False)
