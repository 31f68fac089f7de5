"""Service `inference.GRPCInferenceService`: the Open Inference Protocol over gRPC, and Triton's additions to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from tnxctl.bridge.grpc.calls import Call, Method
from tnxctl.bridge.grpc.messages import ModelInferResponse, ModelStreamInferResponse, message_of, plain
from tnxctl.bridge.grpc.tensors import fill, inputs_of
from tnxctl.bridge.oip import documents, infer, tensors
from tnxctl.bridge.oip.documents import model_title
from tnxctl.protocol import wire
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    TensorNextError,
    Unavailable,
    Unimplemented,
)
from tnxctl.protocol.limits import excerpt

_FINAL_ASKED = "triton_enable_empty_final_response"
_FINAL = "triton_final_response"
"""Triton's parameters about the last response to a request of a stream: here there is one, which is the last."""


_READY_TIMEOUT_S = 1.0
"""Longest wait of a readiness check: probes ask every few seconds, and give up after one by default."""


async def is_ready(call: Call) -> bool:
    """Whether the daemon answers, and serves."""
    try:
        report = await call.client.health(timeout=min(call.remaining_s or math.inf, _READY_TIMEOUT_S))
    except (Unavailable, DeadlineExceeded):
        return False
    return report.status == "ready"


async def _server_live(call: Call, request: Any) -> Any:
    return message_of("ServerLiveResponse", documents.live())


async def _server_ready(call: Call, request: Any) -> Any:
    return message_of("ServerReadyResponse", documents.ready(await is_ready(call)))


async def _model_ready(call: Call, request: Any) -> Any:
    """Whether a model serves; one that is not there does not, as Triton says."""
    try:
        models = await call.client.models(timeout=min(call.remaining_s or math.inf, _READY_TIMEOUT_S))
        serves = documents.serves(models, request.name, request.version)
    except (NotFound, Unavailable, DeadlineExceeded):
        serves = False
    return message_of("ModelReadyResponse", documents.ready(serves))


async def _server_metadata(call: Call, request: Any) -> Any:
    report = await call.client.health(timeout=call.remaining_s)
    return message_of("ServerMetadataResponse", documents.server_metadata(report.version))


async def _model_metadata(call: Call, request: Any) -> Any:
    title, seconds = model_title(request.name, request.version), call.remaining_s
    model, models = await asyncio.gather(
        call.client.metadata(title, timeout=seconds), call.client.models(timeout=seconds)
    )
    return message_of("ModelMetadataResponse", documents.model_metadata(model, models))


async def _model_config(call: Call, request: Any) -> Any:
    model = await call.client.metadata(model_title(request.name, request.version), timeout=call.remaining_s)
    return message_of("ModelConfigResponse", {"config": documents.model_config(model)})


async def _model_statistics(call: Call, request: Any) -> Any:
    report = await call.client.stats(timeout=call.remaining_s)
    return message_of("ModelStatisticsResponse", documents.model_statistics(report, request.name, request.version))


async def _repository_index(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    models = await call.client.models(timeout=call.remaining_s)
    return message_of("RepositoryIndexResponse", {"models": documents.repository_index(models, ready=request.ready)})


async def _repository_model_load(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    for name in request.parameters:
        raise Unimplemented(
            f"parameter {excerpt(name)}: models are loaded from the daemon's model repository, and with the settings "
            f"that they have there"
        )
    await call.client.load(request.model_name, timeout=call.remaining_s)
    return message_of("RepositoryModelLoadResponse", {})


async def _repository_model_unload(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    for name, value in plain(request.parameters).items():
        if name != "unload_dependents" or value is not False:
            raise Unimplemented(f"parameter {excerpt(name)}: {excerpt(value)} is not supported")
    await call.client.unload(request.model_name, timeout=call.remaining_s)
    return message_of("RepositoryModelUnloadResponse", {})


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise Unimplemented("there is one repository, and it has no name")


async def _model_infer(call: Call, request: Any) -> Any:
    parameters = plain(request.parameters)
    parameters.pop(_FINAL_ASKED, None)
    for tensor in (*request.inputs, *request.outputs):
        if tensor.parameters:
            infer.refuse_shared_memory(plain(tensor.parameters), tensor.name)
    raw = parameters.get("binary_data_output", True)
    if not isinstance(raw, bool):
        raise InvalidArgument(f"parameter 'binary_data_output' is {raw!r}: expected true or false")
    wanted = [infer.Output(output.name, raw, infer.classes_of(plain(output.parameters))) for output in request.outputs]
    arguments = infer.predict_arguments(parameters)
    seconds = call.remaining_s
    if seconds is not None:
        arguments["deadline"] = arguments["timeout"] = min(seconds, arguments.get("deadline", seconds))
    title = model_title(request.model_name, request.model_version)
    inputs = inputs_of(request, call.bridge.settings.message)
    result = await call.client.predict(inputs, model=title, **arguments)
    batches = False
    if any(output.classes for output in wanted):
        batches = (await call.client.metadata(model_title(result.model, result.version))).max_batch_size > 0
    response = ModelInferResponse(model_name=result.model, model_version=result.version, id=request.id)
    outputs = [
        (output.name, tensors.classified(output.name, array, output.classes, batches) if output.classes else array)
        for output, array in infer.selected(result, wanted, raw)
    ]
    fill(response, outputs, raw)
    return response


async def _model_stream_infer(call: Call, request: Any) -> Any:
    try:
        response = await _model_infer(call, request)
    except TensorNextError as error:
        failure = _stream_failure(error)
        failure.infer_response.id = request.id
        return failure
    response.parameters[_FINAL].bool_param = True
    return ModelStreamInferResponse(infer_response=response)


def _stream_failure(error: TensorNextError) -> Any:
    return ModelStreamInferResponse(error_message=error.message)


async def _system_regions(call: Call, request: Any) -> Any:
    _refuse_region(request.name)
    return message_of("SystemSharedMemoryStatusResponse", {})


async def _cuda_regions(call: Call, request: Any) -> Any:
    _refuse_region(request.name)
    return message_of("CudaSharedMemoryStatusResponse", {})


def _refuse_region(name: str) -> None:
    if name:
        raise NotFound(f"unable to find shared memory region {excerpt(name)}")


def _unsupported(what: str, kind: type[TensorNextError] = Unimplemented) -> Method:
    """A method that answers as Triton does where it was built without something."""

    async def refuse(call: Call, request: Any) -> Any:
        raise kind(f"the server does not support {what}")

    return Method(refuse, None)


METHODS: Mapping[str, Method] = {
    "ServerLive": Method(_server_live, None),
    "ServerReady": Method(_server_ready, None),
    "ModelReady": Method(_model_ready, wire.Models),
    "ServerMetadata": Method(_server_metadata, wire.Health),
    "ModelMetadata": Method(_model_metadata, wire.Models),
    "ModelInfer": Method(_model_infer, wire.Predict),
    "ModelStreamInfer": Method(_model_stream_infer, wire.Predict, failure=_stream_failure),
    "ModelConfig": Method(_model_config, wire.Metadata),
    "ModelStatistics": Method(_model_statistics, wire.Stats),
    "RepositoryIndex": Method(_repository_index, wire.Models),
    "RepositoryModelLoad": Method(_repository_model_load, wire.Load, about="model_name"),
    "RepositoryModelUnload": Method(_repository_model_unload, wire.Unload, about="model_name"),
    "SystemSharedMemoryStatus": Method(_system_regions, None),
    "SystemSharedMemoryRegister": _unsupported("shared memory"),
    "SystemSharedMemoryUnregister": _unsupported("shared memory"),
    "CudaSharedMemoryStatus": Method(_cuda_regions, None),
    "CudaSharedMemoryRegister": _unsupported("shared memory"),
    "CudaSharedMemoryUnregister": _unsupported("shared memory"),
    "TraceSetting": _unsupported("tracing", Unavailable),
    "LogSettings": _unsupported("dynamic logging", Unavailable),
}
"""Methods of the service, by name."""
