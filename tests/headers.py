"""Request headers as plain maps: tests damage them in ways that `tnxctl.protocol.wire` would never write."""

from __future__ import annotations

from typing import Any

import msgspec

pack = msgspec.msgpack.encode


def predict_header(**changes: Any) -> dict[str, Any]:
    """A good predict header for one row of `mlp`, with some of its fields changed; `...` takes a field out."""
    header = {"type": "predict", "v": 1, "id": 7, "inputs": [["input", "FP32", [1, 256]]], "model": "mlp"}
    return {key: value for key, value in (header | changes).items() if value is not ...}


def route_header(**changes: Any) -> dict[str, Any]:
    """A good route header, with some of its fields changed."""
    return {
        "type": "route",
        "v": 1,
        "id": 7,
        "model": "resnet",
        "weights": {"1": 95, "2": 5.0},
        "shadow": "3",
    } | changes
