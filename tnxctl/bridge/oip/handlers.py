"""Open Inference Protocol over HTTP: the handlers, and where they are.

What is not supported is answered as Triton answers for it when it was built or started without it.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

import msgspec

from tnxctl.aio import AsyncClient
from tnxctl.bridge import server_timing
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.helper import LONG_BYTES, LONG_ELEMENTS
from tnxctl.bridge.http import JSON, HttpError, Request, Response, json_response
from tnxctl.bridge.oip import compression, documents, infer, orders, tensors
from tnxctl.bridge.routes import Handler, Routes
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import MAX_ID, excerpt

T = TypeVar("T")

_LENGTH = b"inference-header-content-length"


class IndexRequest(msgspec.Struct, frozen=True):
    """Body of a request for the index. Attributes: ready: only versions that answer."""

    ready: bool = False


class ControlRequest(msgspec.Struct, frozen=True):
    """Body of a request to load or unload."""

    parameters: Annotated[dict[str, Any], msgspec.Meta(max_length=1024)] = {}


class RegisterRequest(msgspec.Struct, frozen=True):
    """Body of a request to register a region of shared memory: part of the file of that name."""

    key: str
    byte_size: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = 0


def add_to(routes: Routes) -> None:
    """Add the routes of this interface."""
    routes.add("GET", "/v2", server_metadata, wire.Health)
    routes.add("GET", "/v2/health/live", live, None)
    routes.add("GET", "/v2/health/ready", ready, None)  # as `live`: probes have no token
    routes.add("GET", "/v2/models/stats", statistics, wire.Stats)
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes.add("GET", model, model_metadata, wire.Metadata)
        routes.add("GET", f"{model}/ready", model_ready, wire.Models)
        routes.add("GET", f"{model}/config", model_config, wire.Metadata)
        routes.add("GET", f"{model}/stats", statistics, wire.Stats)
        routes.add("POST", f"{model}/infer", run_inference, wire.Predict, takes=infer.InferRequest)
    routes.add("POST", "/v2/repository/index", repository_index, wire.Models, takes=IndexRequest)
    routes.add("POST", "/v2/repository/models/{model}/load", load, wire.Load, takes=ControlRequest)
    routes.add("POST", "/v2/repository/models/{model}/unload", unload, wire.Unload, takes=ControlRequest)
    memory = "/v2/systemsharedmemory"
    routes.add("GET", f"{memory}/status", regions, None)
    routes.add("GET", f"{memory}/region/{{region}}/status", regions, None)
    routes.add("POST", f"{memory}/region/{{region}}/register", register_region, wire.Share, takes=RegisterRequest)
    routes.add("POST", f"{memory}/region/{{region}}/unregister", unregister_region, wire.Share)
    routes.add("POST", f"{memory}/unregister", unregister_region, wire.Share)
    _add_unsupported(routes)


async def live(bridge: Bridge, request: Request) -> Response:
    """Whether the bridge is there: it is."""
    return json_response(documents.live())


async def ready(bridge: Bridge, request: Request) -> Response:
    """Whether the daemon takes requests: 200, or else 503."""
    is_ready = await bridge.is_ready()
    return json_response(documents.ready(is_ready), 200 if is_ready else 503)


async def server_metadata(bridge: Bridge, request: Request) -> Response:
    """Name, version and extensions of the server."""
    report = await bridge.ask_one(AsyncClient.health)
    return json_response(documents.server_metadata(report.version, shares_memory=bridge.regions.allowed))


async def model_metadata(bridge: Bridge, request: Request) -> Response:
    """Inputs and outputs of a model, and its versions."""
    model, models = await asyncio.gather(bridge.client.metadata(_title(request)), bridge.ask_one(AsyncClient.models))
    return json_response(documents.model_metadata(model, models))


async def model_ready(bridge: Bridge, request: Request) -> Response:
    """Whether a model answers requests: 200, or else 503."""
    name = request.params["model"]
    is_ready = documents.serves(await bridge.ask_one(AsyncClient.models), name, request.params.get("version", ""))
    return json_response(documents.model_ready(name, is_ready), 200 if is_ready else 503)


async def model_config(bridge: Bridge, request: Request) -> Response:
    """Configuration of a model, as Triton describes one."""
    return json_response(documents.model_config(await bridge.client.metadata(_title(request))))


async def statistics(bridge: Bridge, request: Request) -> Response:
    """Counts and times of a model, or of all, since the daemon started."""
    name, version = request.params.get("model", ""), request.params.get("version", "")
    return json_response(documents.model_statistics(await bridge.ask_one(AsyncClient.stats), name, version))


async def run_inference(bridge: Bridge, request: Request) -> Response:
    """Run a model once."""
    settings, title, headers = bridge.settings, _title(request), request.headers
    body = await compression.unpacked(request, settings.limits.body_bytes)
    json_bytes = infer.header_length(headers.get(_LENGTH), len(body))
    if json_bytes > settings.limits.json_bytes:
        raise HttpError(413, f"the body has {json_bytes} bytes of JSON, and may have {settings.limits.json_bytes}")
    if json_bytes or not body:
        view = memoryview(body)
        document, limits = view[:json_bytes], settings.message
        if json_bytes < LONG_BYTES:
            asked = infer.read_document(document, limits)
        else:
            asked = await bridge.helper.call(infer.read_document, bytes(document), limits)
        inference = infer.of_document(asked, view[json_bytes:], limits, bridge.regions)
    else:
        inference = infer.read_raw(body, await bridge.signatures.get(title), settings.message)
    result = await bridge.client.predict(inference.inputs, model=title, **inference.arguments)
    batches = False
    if inference.classifies:
        ran = await bridge.signatures.get(documents.model_title(result.model, result.version))
        batches = ran.max_batch_size > 0
    texts = {
        name: await bridge.helper.call(tensors.to_json, name, array)
        for name, array in infer.written(inference, result)
        if array.size >= LONG_ELEMENTS
    }
    answer = infer.answer(inference, result, bridge.regions, batches, texts)
    chunks, coding = await compression.packed(answer.chunks, headers.get(b"accept-encoding"))
    stages = server_timing.header(result)
    if not answer.binary:
        return Response(chunks, headers=(JSON, stages, *coding))
    length = (_LENGTH, b"%d" % len(answer.chunks[0]))
    return Response(chunks, headers=((b"content-type", b"application/octet-stream"), length, stages, *coding))


async def repository_index(bridge: Bridge, request: Request) -> Response:
    """Every version of every model, and its state."""
    asked = _body(request, IndexRequest)
    return json_response(documents.repository_index(await bridge.ask_one(AsyncClient.models), ready=asked.ready))


async def load(bridge: Bridge, request: Request) -> Response:
    """Load a model as its directory and model.toml say, and wait until it is warm."""
    orders.check_load(_body(request, ControlRequest).parameters)
    await bridge.order(bridge.client.load(request.params["model"]))
    return Response()


async def unload(bridge: Bridge, request: Request) -> Response:
    """Unload all versions of a model, and wait until its memory is free."""
    orders.check_unload(_body(request, ControlRequest).parameters)
    await bridge.order(bridge.client.unload(request.params["model"]))
    return Response()


async def regions(bridge: Bridge, request: Request) -> Response:
    """Regions of shared memory, or one of them."""
    return json_response(bridge.regions.status(request.params.get("region", "")))


async def register_region(bridge: Bridge, request: Request) -> Response:
    """Register a region of shared memory, which requests may then name."""
    asked = _body(request, RegisterRequest)
    bridge.regions.register(request.params["region"], asked.key, asked.offset, asked.byte_size)
    return Response()


async def unregister_region(bridge: Bridge, request: Request) -> Response:
    """Forget a region of shared memory, or all."""
    bridge.regions.unregister(request.params.get("region", ""))
    return Response()


def _add_unsupported(routes: Routes) -> None:
    memory = "/v2/cudasharedmemory"
    routes.add("GET", f"{memory}/status", _no_regions, None)
    routes.add("GET", f"{memory}/region/{{region}}/status", _no_such_region, None)
    for action in ("unregister", "region/{region}/register", "region/{region}/unregister"):
        routes.add("POST", f"{memory}/{action}", _unsupported(501, "shared memory"), None)
    for method in ("GET", "POST"):
        for path in ("/v2/trace/setting", "/v2/models/{model}/trace/setting"):
            routes.add(method, path, _unsupported(503, "tracing"), None)
        routes.add(method, "/v2/logging", _unsupported(503, "dynamic logging"), None)


def _unsupported(status: int, what: str) -> Handler:
    async def handler(bridge: Bridge, request: Request) -> Response:
        raise HttpError(status, f"the server does not support {what}")

    handler.__doc__ = f"Not supported: {what}."
    return handler


async def _no_regions(bridge: Bridge, request: Request) -> Response:
    """Regions of shared memory: none."""
    return json_response([])


async def _no_such_region(bridge: Bridge, request: Request) -> Response:
    """A region of shared memory: there is none."""
    raise HttpError(404, f"unable to find shared memory region {excerpt(request.params['region'])}")


def _title(request: Request) -> str:
    return documents.model_title(request.params["model"], request.params.get("version", ""))


def _body(request: Request, kind: type[T]) -> T:
    """The JSON object of a request that may be left out. Raises InvalidArgument: it is none, or has a wrong field."""
    try:
        return msgspec.json.decode(request.body or b"{}", type=kind)
    except RecursionError:
        raise InvalidArgument("the request is nested too deep") from None
    except ValueError as error:
        raise InvalidArgument(f"this is no such request: {error}") from None
