"""Service `inference.GRPCInferenceService`: the Open Inference Protocol over gRPC, and Triton's additions to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from tnxctl.aio import AsyncClient
from tnxctl.bridge.bridge import READY_TIMEOUT_S
from tnxctl.bridge.grpc.calls import Call, Method
from tnxctl.bridge.grpc.messages import message_of, plain
from tnxctl.bridge.grpc.model_infer import model_infer, model_stream_infer, stream_failure
from tnxctl.bridge.oip import documents, orders
from tnxctl.bridge.oip.documents import model_title
from tnxctl.protocol import wire
from tnxctl.protocol.errors import (
    DeadlineExceeded,
    NotFound,
    TensorNextError,
    Unavailable,
    Unimplemented,
)
from tnxctl.protocol.limits import excerpt


async def _server_live(call: Call, request: Any) -> Any:
    return message_of("ServerLiveResponse", documents.live())


async def _server_ready(call: Call, request: Any) -> Any:
    return message_of("ServerReadyResponse", documents.ready(await call.bridge.is_ready()))


async def _model_ready(call: Call, request: Any) -> Any:
    """Whether a model serves; one that is not there does not, as Triton says."""
    try:
        models = await call.ask_one(AsyncClient.models, READY_TIMEOUT_S)
        serves = documents.serves(models, request.name, request.version)
    except (NotFound, Unavailable, DeadlineExceeded):
        serves = False
    return message_of("ModelReadyResponse", documents.ready(serves))


async def _server_metadata(call: Call, request: Any) -> Any:
    report = await call.ask_one(AsyncClient.health)
    shares = call.bridge.regions.allowed
    return message_of("ServerMetadataResponse", documents.server_metadata(report.version, shares_memory=shares))


async def _model_metadata(call: Call, request: Any) -> Any:
    title = model_title(request.name, request.version)
    model, models = await asyncio.gather(
        call.client.metadata(title, timeout=call.remaining_s), call.ask_one(AsyncClient.models)
    )
    return message_of("ModelMetadataResponse", documents.model_metadata(model, models))


async def _model_config(call: Call, request: Any) -> Any:
    model = await call.client.metadata(model_title(request.name, request.version), timeout=call.remaining_s)
    return message_of("ModelConfigResponse", {"config": documents.model_config(model)})


async def _model_statistics(call: Call, request: Any) -> Any:
    report = await call.ask_one(AsyncClient.stats)
    return message_of("ModelStatisticsResponse", documents.model_statistics(report, request.name, request.version))


async def _repository_index(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    models = await call.ask_one(AsyncClient.models)
    return message_of("RepositoryIndexResponse", {"models": documents.repository_index(models, ready=request.ready)})


async def _repository_model_load(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    orders.check_load(request.parameters)
    await call.bridge.order(call.client.load(request.model_name, timeout=call.remaining_s))
    return message_of("RepositoryModelLoadResponse", {})


async def _repository_model_unload(call: Call, request: Any) -> Any:
    _refuse_repository_name(request)
    orders.check_unload(plain(request.parameters))
    await call.bridge.order(call.client.unload(request.model_name, timeout=call.remaining_s))
    return message_of("RepositoryModelUnloadResponse", {})


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise Unimplemented("there is one repository, and it has no name")


async def _regions(call: Call, request: Any) -> Any:
    regions = {region["name"]: region for region in call.bridge.regions.status(request.name)}
    return message_of("SystemSharedMemoryStatusResponse", {"regions": regions})


async def _register_region(call: Call, request: Any) -> Any:
    call.bridge.regions.register(request.name, request.key, request.offset, request.byte_size)
    return message_of("SystemSharedMemoryRegisterResponse", {})


async def _unregister_region(call: Call, request: Any) -> Any:
    call.bridge.regions.unregister(request.name)
    return message_of("SystemSharedMemoryUnregisterResponse", {})


async def _cuda_regions(call: Call, request: Any) -> Any:
    if request.name:
        raise NotFound(f"unable to find shared memory region {excerpt(request.name)}")
    return message_of("CudaSharedMemoryStatusResponse", {})


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
    "ModelInfer": Method(model_infer, wire.Predict, takes_bytes=True),
    "ModelStreamInfer": Method(model_stream_infer, wire.Predict, failure=stream_failure, takes_bytes=True),
    "ModelConfig": Method(_model_config, wire.Metadata),
    "ModelStatistics": Method(_model_statistics, wire.Stats),
    "RepositoryIndex": Method(_repository_index, wire.Models),
    "RepositoryModelLoad": Method(_repository_model_load, wire.Load, about="model_name"),
    "RepositoryModelUnload": Method(_repository_model_unload, wire.Unload, about="model_name"),
    "SystemSharedMemoryStatus": Method(_regions, None),
    "SystemSharedMemoryRegister": Method(_register_region, wire.Share),
    "SystemSharedMemoryUnregister": Method(_unregister_region, wire.Share),
    "CudaSharedMemoryStatus": Method(_cuda_regions, None),
    "CudaSharedMemoryRegister": _unsupported("shared memory"),
    "CudaSharedMemoryUnregister": _unsupported("shared memory"),
    "TraceSetting": _unsupported("tracing", Unavailable),
    "LogSettings": _unsupported("dynamic logging", Unavailable),
}
"""Methods of the service, by name."""
