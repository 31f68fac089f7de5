"""Inference requests of the Open Inference Protocol: bodies in, arguments of `predict` out, and the answers.

A body is JSON, or with `Inference-Header-Content-Length: N` N bytes of JSON and then the binary tensors, in the order
of those inputs that have a `binary_data_size`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET

from tnxctl.bridge.oip import tensors
from tnxctl.bridge.oip.documents import PRIORITY_LEVELS
from tnxctl.bridge.oip.shared_memory import Regions, Target, place_of
from tnxctl.protocol.datatypes import STORAGE, Array
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.fields import BYTES, Name, Word
from tnxctl.protocol.limits import MAX_DIM, MAX_RANK, MAX_TENSORS, Limits, excerpt
from tnxctl.protocol.wire import ModelInfo
from tnxctl.results import Result

Buffer = bytes | bytearray | memoryview

_MICROSECONDS = 1e6

_PASSED_ON = ("device", "route_key", "min_gpu_memory_mb", "prefer_gpu")
"""Parameters of a request that are arguments of `predict` by the same name, which checks them."""

_RESERVED = "triton_"


Parameters = Annotated[dict[str, Any], msgspec.Meta(max_length=1024)]
"""Parameters of a request or a tensor, by their names. Those that mean something are scalars."""


class InputTensor(msgspec.Struct, frozen=True):
    """One input of a request.

    Attributes:
        data: its elements, as JSON has them, or as an array already; unset for a binary tensor.
    """

    name: Name
    datatype: Word
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_DIM)], ...], msgspec.Meta(max_length=MAX_RANK)]
    parameters: Parameters = {}
    data: Any = UNSET


class RequestedOutput(msgspec.Struct, frozen=True):
    """One output that a request asks for."""

    name: Name
    parameters: Parameters = {}


class InferRequest(msgspec.Struct, frozen=True):
    """JSON of an inference request."""

    inputs: Annotated[list[InputTensor], msgspec.Meta(max_length=MAX_TENSORS)]
    outputs: Annotated[list[RequestedOutput], msgspec.Meta(max_length=MAX_TENSORS)] = []
    id: str = ""
    parameters: Parameters = {}


class Output(NamedTuple):
    """Output as it is answered.

    Attributes:
        classes: number of its largest elements that are wanted; 0: all of it. target: in shared memory; None: none.
    """

    name: str
    binary: bool
    classes: int = 0
    target: Target | None = None


class Inference(NamedTuple):
    """One request, decoded.

    Attributes:
        id: given by the client; "": none.
        inputs: name -> array.
        arguments: further ones of `predict`, by their names.
        outputs: those that are wanted; (): all.
        binary: whether outputs that nothing is said about are answered in binary.
    """

    id: str
    inputs: dict[str, Array]
    arguments: dict[str, Any]
    outputs: tuple[Output, ...]
    binary: bool

    @property
    def classifies(self) -> bool:
        """Whether the answer depends on whether the model batches."""
        return any(output.classes for output in self.outputs)


class Answer(NamedTuple):
    """Body of an answer. Attributes: binary: whether tensors follow the JSON, which is the first chunk."""

    chunks: list[bytes | memoryview]
    binary: bool


_decode = msgspec.json.Decoder(InferRequest).decode
_encode = msgspec.json.Encoder().encode


def header_length(text: str | None, nbytes: int) -> int:
    """Length of the JSON of a body, as `Inference-Header-Content-Length` says; all of it without that header.

    Args:
        text: value of the header. nbytes: length of the body, unpacked.

    Raises:
        InvalidArgument: it is no number, or more than the body has.
    """
    if text is None:
        return nbytes
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= nbytes):
        raise InvalidArgument(
            f"Inference-Header-Content-Length is {excerpt(text)}: expected a number of bytes from 0 to {nbytes}, "
            f"the length of the body"
        )
    return int(text)


def read(body: Buffer, json_bytes: int, limits: Limits, regions: Regions) -> Inference:
    """The request that a body holds. Its binary tensors are views of the body, which must stay unchanged.

    Args:
        json_bytes: length of the JSON that it begins with. regions: of shared memory, out of which tensors are copied.

    Raises:
        InvalidArgument: it is not one; the sentence names what is wrong.
        NotFound: it names a region that is not registered.
        Unimplemented: it asks for shared memory where there is none.
    """
    view = memoryview(body)
    return of_document(read_document(view[:json_bytes], limits), view[json_bytes:], limits, regions)


def read_document(text: Buffer, limits: Limits) -> InferRequest:
    """The request in JSON, the data of its tensors made arrays. Raises as `read` does."""
    request = _document(text)
    return msgspec.structs.replace(
        request,
        inputs=[_with_array(tensor, limits) for tensor in request.inputs],
        outputs=[msgspec.structs.replace(output, parameters=_scalars(output.parameters)) for output in request.outputs],
        parameters=_scalars(request.parameters),
    )


def of_document(request: InferRequest, binary_data: memoryview, limits: Limits, regions: Regions) -> Inference:
    """The request of a document that was read, with the binary data behind it. Raises as `read` does."""
    inputs = _inputs(request.inputs, binary_data, limits, regions)
    binary = _flag(request.parameters, "binary_data_output", False)
    outputs = [_output(output, binary, regions) for output in request.outputs]
    return Inference(
        request.id,
        inputs,
        predict_arguments(request.parameters),
        tuple(outputs),
        binary,
    )


def read_raw(body: Buffer, model: ModelInfo, limits: Limits) -> Inference:
    """The request of a body that is one tensor and nothing else, in binary as is its answer.

    The model says what the tensor is: one row of its only input, whose shape has one unknown axis at most.

    Raises:
        InvalidArgument: the model takes something else, or the body has not the length of such a tensor.
    """
    if len(model.inputs) != 1:
        raise InvalidArgument(
            f"model {model.name!r} has {len(model.inputs)} inputs, and a body without JSON can be one alone"
        )
    (spec,) = model.inputs
    shape = [1, *spec.shape[1:]] if model.max_batch_size else [*spec.shape]
    view = memoryview(body)
    if spec.datatype == BYTES:
        shape = [1 if length == -1 else length for length in shape]
        if math.prod(shape) != 1:
            raise InvalidArgument(f"model {model.name!r} takes BYTES {shape}, and a body without JSON is one element")
        array = tensors.from_json(spec.name, BYTES, shape, [""])
        array.reshape(-1)[0] = bytes(view)
        return Inference("", {spec.name: array}, {}, (), True)
    if shape.count(-1) > 1:
        raise InvalidArgument(f"model {model.name!r} takes {spec.datatype} {shape}, whose shape no length tells")
    if -1 in shape:
        row = math.prod(length for length in shape if length != -1) * STORAGE[spec.datatype].itemsize
        shape[shape.index(-1)] = len(view) // row if row else 0
    return Inference("", {spec.name: tensors.from_binary(spec.name, spec.datatype, shape, view, limits)}, {}, (), True)


def predict_arguments(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `AsyncClient.predict` in the parameters of a request, by their names.

    `priority` counts as Triton's does: 1 (first) to 4 (last), 0 for the model's own. `timeout` is in microseconds: the
    deadline, and how long the answer is waited for; 0 is none. `device`, `route_key`, `min_gpu_memory_mb` and
    `prefer_gpu` are passed on, for the client to check. Others say nothing here, those of sequences among them.

    Raises:
        InvalidArgument: a parameter has a value that it cannot have, or a name that is reserved.
    """
    arguments = {name: parameters[name] for name in _PASSED_ON if name in parameters}
    priority = _number(parameters, "priority")
    if priority > PRIORITY_LEVELS:
        raise InvalidArgument(
            f"parameter 'priority' is {priority}: expected 1 (first) to {PRIORITY_LEVELS} (last), or 0 for the default"
        )
    if priority:
        arguments["priority"] = priority - 1
    timeout = _number(parameters, "timeout")
    if timeout:
        arguments["deadline"] = arguments["timeout"] = timeout / _MICROSECONDS
    for name in parameters:
        if name.startswith(_RESERVED):
            raise InvalidArgument(f"parameter {excerpt(name)}: names that begin with {_RESERVED!r} are reserved")
    return arguments


def classes_of(parameters: Mapping[str, Any]) -> int:
    """The number of classes that the parameters of an output ask for; 0: none. Raises InvalidArgument."""
    return _number(parameters, "classification")


def selected(result: Result, outputs: Sequence[Output], binary: bool) -> list[tuple[Output, Array]]:
    """The outputs that are wanted, and how: each once, so that no request multiplies them.

    Args:
        outputs: those that are wanted; (): all, in binary if `binary` says so. Of one named twice, the last counts.

    Raises:
        InvalidArgument: the model has no such output; the sentence names those that it has.
    """
    wanted = {output.name: output for output in outputs or [Output(name, binary) for name in result.outputs]}
    for output in wanted.values():
        if output.name not in result.outputs:
            raise InvalidArgument(
                f"model {result.model!r} has no output {excerpt(output.name)}, only {[*result.outputs]}"
            )
    return [(output, result.outputs[output.name]) for output in wanted.values()]


def written(inference: Inference, result: Result) -> list[tuple[str, Array]]:
    """The outputs that are answered in JSON, and their names. Raises InvalidArgument: there is no such output."""
    return [
        (output.name, array)
        for output, array in selected(result, inference.outputs, inference.binary)
        if not output.binary and not output.classes and output.target is None
    ]


def answer(
    inference: Inference,
    result: Result,
    regions: Regions,
    batches: bool = False,
    texts: Mapping[str, tuple[str, msgspec.Raw]] | None = None,
) -> Answer:
    """The body that answers a request.

    Args:
        regions: of shared memory, into which outputs are copied.
        batches: whether axis 0 of the model's outputs counts rows; matters to a request that `classifies`.
        texts: outputs that were written already, by `tensors.to_json`.

    Raises:
        InvalidArgument: an output that is asked for cannot be given, or not in that form.
    """
    documents = []
    chunks: list[bytes | memoryview] = [b""]
    for output, array in selected(result, inference.outputs, inference.binary):
        if output.classes:
            array = tensors.classified(output.name, array, output.classes, batches)
        document: dict[str, Any] = {"name": output.name, "datatype": "", "shape": array.shape}
        if output.target is not None:
            datatype, _, chunk = tensors.encoded(output.name, array)
            document["parameters"] = regions.write(output.target, output.name, chunk).parameters
        elif output.binary:
            datatype, _, chunk = tensors.encoded(output.name, array)
            document["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            text = texts.get(output.name) if texts and not output.classes else None
            datatype, document["data"] = text or tensors.to_json(output.name, array)
        document["datatype"] = datatype
        documents.append(document)
    head = {"id": inference.id} if inference.id else {}
    chunks[0] = _encode(head | {"model_name": result.model, "model_version": result.version, "outputs": documents})
    return Answer(chunks, len(chunks) > 1)


def _scalars(parameters: Parameters) -> Parameters:
    """Parameters with None for what is no scalar: it may be large, and means nothing."""
    return {name: value if isinstance(value, bool | int | float | str) else None for name, value in parameters.items()}


def _with_array(tensor: InputTensor, limits: Limits) -> InputTensor:
    tensor = msgspec.structs.replace(tensor, parameters=_scalars(tensor.parameters))
    if tensor.data is UNSET or "shared_memory_region" in tensor.parameters:
        return tensor
    array = tensors.from_json(tensor.name, tensor.datatype, tensor.shape, tensor.data)
    if tensor.datatype == BYTES and array.size > limits.strings:
        raise InvalidArgument(
            f"input {excerpt(tensor.name)} has {array.size} strings, more than the limit of {limits.strings}"
        )
    return msgspec.structs.replace(tensor, data=array)


def _document(text: Buffer) -> InferRequest:
    try:
        try:
            return _decode(text)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            # Neither JSON nor msgspec has NaN and Infinity, which Triton takes, and its client sends.
            plain = bytes(text)
            if b"NaN" not in plain and b"Infinity" not in plain:
                raise
            return msgspec.convert(_lenient(plain), InferRequest)
    except RecursionError:
        raise InvalidArgument("the inference request is nested too deep") from None
    except ValueError as error:  # of msgspec, of json, or about what is no UTF-8
        raise InvalidArgument(f"this is no inference request: {error}") from None


def _lenient(text: bytes) -> Any:
    """A JSON document that may have NaN and Infinity. All else that msgspec refuses is refused here, too.

    Raises:
        ValueError: it is none, a number is too large, or a text has half of a surrogate pair.
    """
    found = json.loads(str(text, "utf-8"), parse_float=_finite)
    if b"\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"Number out of range: {excerpt(text)}")
    return number


def _inputs(inputs: Sequence[InputTensor], binary: memoryview, limits: Limits, regions: Regions) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    at = 0
    for tensor in inputs:
        name, parameters = tensor.name, tensor.parameters
        place = place_of(parameters, name)
        if name in arrays:
            raise InvalidArgument(f"two inputs have the name {excerpt(name)}")
        if place is not None:
            content = regions.read(place, name, limits.message_bytes)
            arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, content, limits)
            continue
        if ("binary_data_size" in parameters) == (tensor.data is not UNSET):
            raise InvalidArgument(f"input {excerpt(name)}: expected either data or a parameter binary_data_size")
        if tensor.data is not UNSET:
            arrays[name] = tensor.data
            continue
        size = _number(parameters, "binary_data_size")
        if size > len(binary) - at:
            raise InvalidArgument(
                f"input {excerpt(name)} has a binary_data_size of {size}, and {len(binary) - at} bytes are left of the "
                f"body behind its JSON"
            )
        arrays[name] = tensors.from_binary(name, tensor.datatype, tensor.shape, binary[at : at + size], limits)
        at += size
    if at != len(binary):
        raise InvalidArgument(f"the binary data of all inputs ends {len(binary) - at} bytes before the body does")
    return arrays


def _output(output: RequestedOutput, binary: bool, regions: Regions) -> Output:
    place = place_of(output.parameters, output.name)
    target = None if place is None else regions.target(place, output.name)
    return Output(output.name, _flag(output.parameters, "binary_data", binary), classes_of(output.parameters), target)


def _number(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise InvalidArgument(f"parameter {name!r} is {excerpt(value)}: expected a whole number, 0 or more")
    return value


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if value is not True and value is not False:
        raise InvalidArgument(f"parameter {name!r} is {excerpt(value)}: expected true or false")
    return value
