"""ModelInfer and ModelStreamInfer: requests in, arguments of `predict` out, and the answers."""

from __future__ import annotations

from typing import Any, NamedTuple

from tnxctl.bridge.grpc import framing
from tnxctl.bridge.grpc.calls import Call
from tnxctl.bridge.grpc.messages import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
    parsed,
    plain,
)
from tnxctl.bridge.grpc.tensors import CONTENTS, Typed, inputs_of, read_long
from tnxctl.bridge.helper import LONG_BYTES
from tnxctl.bridge.oip import infer, tensors
from tnxctl.bridge.oip.documents import model_title
from tnxctl.bridge.oip.shared_memory import Regions, place_of
from tnxctl.protocol.datatypes import Array, datatype_of
from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.results import Result

_RAW_INPUTS = ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_RAW_OUTPUTS = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number
_ANSWER = ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number

_FINAL_ASKED = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"
"""Triton's parameters about the last response to a request of a stream: here there is one, which is the last."""


class _Asked(NamedTuple):
    """Request that was read. Attributes: raw: its raw contents. typed: its typed ones, if they are not in `request`."""

    request: Any
    raw: list[memoryview]
    typed: Typed | None


async def model_infer(call: Call, data: bytes) -> bytes:
    """Run a model once."""
    response, chunks = await _answer(call, await _read(call, data))
    return framing.joined(response.SerializeToString(), _RAW_OUTPUTS, chunks)


async def model_stream_infer(call: Call, data: bytes) -> bytes:
    """Run a model once for a request of a stream, whose error is an answer, too."""
    asked = await _read(call, data)
    try:
        response, chunks = await _answer(call, asked)
    except TensorNextError as error:
        failure = stream_failure(error)
        failure.infer_response.id = asked.request.id
        return failure.SerializeToString()  # type: ignore[no-any-return]
    response.parameters[_FINAL].bool_param = True
    answer = framing.joined(response.SerializeToString(), _RAW_OUTPUTS, chunks)
    return framing.joined(b"", _ANSWER, [memoryview(answer)])


def stream_failure(error: TensorNextError) -> Any:
    """The response that tells an error about a request of a stream."""
    return ModelStreamInferResponse(error_message=error.message)


async def _read(call: Call, data: bytes) -> _Asked:
    """Request of a message. A long one is read elsewhere: there may be millions of elements in it."""
    rest, raw = framing.split(data, _RAW_INPUTS)
    call.check_size(len(rest))
    if len(rest) < LONG_BYTES:
        return _Asked(parsed(ModelInferRequest, rest), raw, None)
    rest, typed = await call.bridge.helper.call(read_long, rest, call.bridge.settings.message)
    return _Asked(parsed(ModelInferRequest, rest), raw, typed)


async def _answer(call: Call, asked: _Asked) -> tuple[Any, list[memoryview]]:
    """The response to one request without its raw contents, and these."""
    request = asked.request
    parameters = plain(request.parameters)
    parameters.pop(_FINAL_ASKED, None)
    answers_raw = parameters.get("binary_data_output", True)
    if not isinstance(answers_raw, bool):
        raise InvalidArgument(f"parameter 'binary_data_output' is {answers_raw!r}: expected true or false")
    wanted = [_output(call, output, answers_raw) for output in request.outputs]
    arguments = infer.predict_arguments(parameters)
    seconds = call.remaining_s
    if seconds is not None:
        arguments["deadline"] = arguments["timeout"] = min(seconds, arguments.get("deadline", seconds))
    inputs = inputs_of(request.inputs, asked.raw, call.bridge.settings.message, call.bridge.regions, asked.typed)
    title = model_title(request.model_name, request.model_version)
    result = await call.client.predict(inputs, model=title, **arguments)
    response = ModelInferResponse(model_name=result.model, model_version=result.version, id=request.id)
    return response, _add_outputs(response, await _outputs(call, result, wanted), answers_raw, call.bridge.regions)


def _output(call: Call, output: Any, raw: bool) -> infer.Output:
    """An output that a request asks for. Raises as `Regions.check` does."""
    parameters = plain(output.parameters)
    place = place_of(parameters, output.name)
    target = None if place is None else call.bridge.regions.target(place, output.name)
    return infer.Output(output.name, raw, infer.classes_of(parameters), target)


async def _outputs(call: Call, result: Result, wanted: list[infer.Output]) -> list[tuple[infer.Output, Array]]:
    """The outputs that are wanted; () are all."""
    batches = False
    if any(output.classes for output in wanted):
        batches = (await call.bridge.signatures.get(model_title(result.model, result.version))).max_batch_size > 0
    return [
        (output, tensors.classified(output.name, array, output.classes, batches) if output.classes else array)
        for output, array in infer.selected(result, wanted, True)
    ]


def _add_outputs(
    response: Any, outputs: list[tuple[infer.Output, Array]], raw: bool, regions: Regions
) -> list[memoryview]:
    """Add outputs to a response. Returns their raw contents.

    Args:
        raw: False: they become contents, if these can hold all of them: a response has one or the other.
        regions: of shared memory; of an output that goes there, the raw contents are empty.

    Raises:
        InvalidArgument: an element of a BYTES tensor is too long; or as `Regions.write` does.
    """
    typed = not raw and all(datatype_of(array.dtype) in CONTENTS for output, array in outputs if output.target is None)
    chunks = []
    for output, array in outputs:
        datatype, shape, chunk = tensors.encoded(output.name, array)
        tensor = response.outputs.add(name=output.name, datatype=datatype, shape=shape)
        if output.target is not None:
            for name, value in regions.write(output.target, output.name, chunk).parameters.items():
                setattr(tensor.parameters[name], "string_param" if isinstance(value, str) else "int64_param", value)
            chunk = chunk[:0]
        if typed and output.target is not None:
            continue
        if typed:
            getattr(tensor.contents, CONTENTS[datatype]).extend(array.ravel().tolist())
        else:
            chunks.append(chunk)
    return chunks
