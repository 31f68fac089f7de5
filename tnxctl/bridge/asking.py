"""POST /ask/{model}: one request in plain JSON, and the answer with all that is known of how it was run."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from tnxctl.bridge.bridge import Bridge
from tnxctl.bridge.http import HttpError, Request, Response, json_response
from tnxctl.bridge.routes import Routes
from tnxctl.casting import cast
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array, datatype_of
from tnxctl.protocol.wire import Timing

MOST_VALUES = 256
"""Values of an output that are told: enough to look at."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request.

    Attributes:
        inputs: nested lists by the names of the inputs. They become the datatypes that the model takes, if these can
            hold them.
        version: of the model; "": as its traffic is split.
        deadline_ms: milliseconds that it has in the daemon; None: no deadline.
    """

    inputs: dict[str, Any]
    version: str = ""
    deadline_ms: float | None = None


class Output(msgspec.Struct, frozen=True):
    """One output. Attributes: values: the first of them, flat. left_out: how many more there are."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[Any]
    left_out: int


class Answer(msgspec.Struct, frozen=True):
    """What came of a request. Attributes: as of `tnxctl.Result`."""

    model: str
    version: str
    device: str
    reason: str
    batch_size: int
    predicted_us: float
    actual_us: float
    timing: Timing
    outputs: list[Output]


def add_to(routes: Routes) -> None:
    """Add the route."""
    routes.add("POST", "/ask/{model}", ask, wire.Predict, takes=Question, gives=Answer)


async def ask(bridge: Bridge, request: Request) -> Response:
    """Send one request, and see where it ran, why there, and how long each stage took.

    For looking, not for programs: the values of an output are cut short. Programs use /v2.
    """
    question = _decode(request.body)
    model = request.params["model"]
    if question.version:
        model = f"{model}@{question.version}"
    deadline = None if question.deadline_ms is None else question.deadline_ms / 1e3
    inputs = cast(question.inputs, await bridge.client.metadata(model), exact=True)
    result = await bridge.client.predict(inputs, model=model, deadline=deadline)
    return json_response(
        Answer(
            result.model,
            result.version,
            result.device,
            result.reason,
            result.batch_size,
            result.predicted_us,
            result.actual_us,
            result.timing,
            [_output(name, array) for name, array in result.outputs.items()],
        )
    )


def _decode(body: bytes | bytearray | memoryview) -> Question:
    try:
        return msgspec.json.decode(body, type=Question)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HttpError(400, f"the body is no request: {error}") from None


def _output(name: str, array: Array) -> Output:
    flat = array.reshape(-1)[:MOST_VALUES]
    values = flat.tolist()
    if array.dtype.hasobject:
        values = [value.decode("utf-8", "replace") for value in values]
    elif flat.dtype.kind not in "biuf":  # such as BF16, of which JSON knows nothing
        values = flat.astype(np.float64).tolist()
    return Output(name, datatype_of(array.dtype) or array.dtype.name, array.shape, values, array.size - len(values))
