"""Messages of the Open Inference Protocol, as protobuf knows them: see `inference.proto`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from tnxctl.bridge.grpc.schema import Schema
from tnxctl.protocol.errors import InvalidArgument

INFERENCE = Schema("inference.proto")
HEALTH = Schema("health.proto")

ModelInferRequest = INFERENCE.message("ModelInferRequest")
ModelInferResponse = INFERENCE.message("ModelInferResponse")
ModelStreamInferResponse = INFERENCE.message("ModelStreamInferResponse")


def message_of(name: str, document: dict[str, Any]) -> Any:
    """A message of the same fields as a document of `tnxctl.bridge.oip.documents`. Args: name: of the message."""
    return json_format.ParseDict(document, INFERENCE.message(name)())


def parsed(kind: Any, data: bytes) -> Any:
    """The message of a class that these bytes are. Raises InvalidArgument: they are none."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(f"this is no {kind.DESCRIPTOR.full_name}: {error}") from None


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as JSON would have them. One without a value says nothing, and is left out."""
    chosen = {name: value.WhichOneof("parameter_choice") for name, value in parameters.items()}
    return {name: getattr(parameters[name], choice) for name, choice in chosen.items() if choice is not None}
