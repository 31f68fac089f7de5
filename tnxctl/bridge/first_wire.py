"""The first version's interface, in plain JSON: GET /health and POST /predict. docs/http.md has the fields."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from tnxctl.aio import AsyncClient
from tnxctl.bridge import server_timing
from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.helper import LONG_BYTES, LONG_ELEMENTS
from tnxctl.bridge.http import Buffer, HttpError, Request, Response, json_response
from tnxctl.bridge.routes import Routes
from tnxctl.casting import cast
from tnxctl.protocol import wire

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array


class PredictRequest(msgspec.Struct):
    """Body of a request to predict. What else there is in it does not count, as in the first version."""

    input_data: list[list[int | float]]
    prefer_gpu: bool = True
    min_gpu_memory_mb: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    model: str = ""


class PredictAnswer(msgspec.Struct, frozen=True):
    """Answer to a request to predict. Attributes: output: of several, an object of them by name."""

    output: Any
    device: str
    latency_ms: float
    gpu_memory_mb: float


class HealthAnswer(msgspec.Struct, frozen=True):
    """State of the daemon."""

    status: str
    cuda_available: bool
    current_device: str
    gpu_memory_free_mb: float


_decode = msgspec.json.Decoder(PredictRequest).decode


def add_to(routes: Routes) -> None:
    """Add the routes of this interface."""
    routes.add("GET", "/health", health, wire.Health, gives=HealthAnswer)
    routes.add("POST", "/predict", predict, wire.Predict, takes=PredictRequest, gives=PredictAnswer)


async def health(bridge: Bridge, request: Request) -> Response:
    """The state of the daemon, and of the GPU where a request would run now."""
    report = await bridge.ask_one(AsyncClient.health)
    return json_response(
        HealthAnswer(report.status, report.cuda_available, report.current_device, report.gpu_memory_free_mb)
    )


async def predict(bridge: Bridge, request: Request) -> Response:
    """Run a model once, on a list of rows.

    Raises:
        HttpError: the body is not what is expected (400), or longer than a JSON document may be (413).
        TensorNextError: as `AsyncClient.predict` does.
    """
    body, most = request.body, bridge.settings.limits.json_bytes
    if len(body) > most:
        raise HttpError(413, f"the body has {len(body)} bytes, and JSON may have {most}")
    if len(body) < LONG_BYTES:
        asked, array = _read(body)
    else:
        asked, array = await bridge.helper.call(_read, bytes(body))
    signature = await bridge.signatures.get(asked.model)
    inputs = cast(array, signature, exact=True)[""]
    result = await bridge.client.predict(
        inputs, model=asked.model, prefer_gpu=asked.prefer_gpu, min_gpu_memory_mb=asked.min_gpu_memory_mb
    )
    outputs = {
        name: _plain(output) if output.size < LONG_ELEMENTS else await bridge.helper.call(_written, output)
        for name, output in result.outputs.items()
    }
    output = next(iter(outputs.values())) if len(outputs) == 1 else outputs
    return json_response(
        PredictAnswer(output, result.device, result.latency_ms, result.gpu_memory_mb),
        headers=(server_timing.header(result),),
    )


def _read(body: Buffer) -> tuple[PredictRequest, Array]:
    """The request in a body, without its rows, and these as an array. Raises HttpError: it is none."""
    try:
        asked = _decode(body)
    except msgspec.ValidationError as error:
        raise HttpError(400, _misfit(error)) from None
    except UnicodeDecodeError:
        raise HttpError(400, "the body is not JSON: it has a text that is not UTF-8") from None
    except msgspec.DecodeError as error:
        raise HttpError(400, f"the body is not JSON: {_place(body, error)}") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deep") from None
    array = _array(asked.input_data)
    asked.input_data = []
    return asked, array


_PLACE = re.compile(r"(?:JSON is malformed: )?(?P<what>.*) \(byte (?P<at>\d+)\)")


def _place(body: Buffer, error: msgspec.DecodeError) -> str:
    """The sentence of an error, with what stands where it is."""
    found = _PLACE.fullmatch(str(error))
    if found is None:
        return str(error)
    what, at = found["what"], int(found["at"])
    return f"{what[0].lower()}{what[1:]} at byte {at}: {bytes(body[at : at + 20]).decode('ascii', 'backslashreplace')}"


def _array(rows: list[list[int | float]]) -> Array:
    """The rows as an array. Raises HttpError if it cannot be."""
    if not rows or not rows[0]:
        raise HttpError(400, f"input_data{'' if not rows else '[0]'} is empty")
    width = len(rows[0])
    if len(set(map(len, rows))) > 1:
        at, row = next((at, row) for at, row in enumerate(rows) if len(row) != width)
        raise HttpError(400, f"input_data[{at}] has {len(row)} values, and input_data[0] has {width}")
    return np.array(rows)


def _misfit(error: msgspec.ValidationError) -> str:
    """The sentence of an error about a value, with its place first."""
    what, _, path = str(error).partition(" - at `$.")
    what = what[0].lower() + what[1:].replace("`", "").replace("int | float", "a number")
    return f"{path.rstrip('`') or 'the body'}: {what}"


def _written(output: Array) -> msgspec.Raw:
    """An output in JSON."""
    return msgspec.Raw(msgspec.json.encode(_plain(output)))


def _plain(output: Array) -> Any:
    """An output as lists of numbers, or of strings."""
    if output.dtype.hasobject:
        return (
            np.array([each.decode("utf-8", "backslashreplace") for each in output.flat], object)
            .reshape(output.shape)
            .tolist()
        )
    return (output if output.dtype.kind in "biuf" else output.astype(np.float32)).tolist()
