"""Messages of the Open Inference Protocol, as protobuf knows them: see `inference.proto`."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from tnxctl.bridge.grpc.schema import Schema

INFERENCE = Schema("inference.proto")
HEALTH = Schema("health.proto")

ModelInferRequest = INFERENCE.message("ModelInferRequest")
ModelInferResponse = INFERENCE.message("ModelInferResponse")
ModelStreamInferResponse = INFERENCE.message("ModelStreamInferResponse")


def message_of(name: str, document: dict[str, Any]) -> Any:
    """A message of the same fields as a document of `tnxctl.bridge.oip.documents`. Args: name: of the message."""
    return json_format.ParseDict(document, INFERENCE.message(name)())
