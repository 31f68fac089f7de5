"""Formats in which a float32 array travels to each peer and back, for clients that speak HTTP. Knows numpy alone.

A format is one of

    json    a nested list: what most people write first
    raw     the bytes of the array and nothing else
    triton  KServe's v2 protocol with binary tensors: a JSON header, then the bytes of the array
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

OUTPUT_COLUMNS = 128

_TRITON_HEADER_LENGTH = "Inference-Header-Content-Length"


def encode(format_: str, array: Array) -> tuple[dict[str, str], bytes]:
    """Headers and body of a request with this array, float32 [N, 256]."""
    if format_ == "json":
        return {"Content-Type": "application/json"}, json.dumps({"input": array.tolist()}).encode()
    if format_ == "raw":
        return {"Content-Type": "application/octet-stream"}, array.tobytes()
    described: dict[str, Any] = {"name": "input", "shape": array.shape, "datatype": "FP32"}
    described["parameters"] = {"binary_data_size": array.nbytes}
    wanted = {"name": "output", "parameters": {"binary_data": True}}
    header = json.dumps({"inputs": [described], "outputs": [wanted]}).encode()
    return (
        {"Content-Type": "application/octet-stream", _TRITON_HEADER_LENGTH: str(len(header))},
        header + array.tobytes(),
    )


def decode(format_: str, headers: Mapping[str, str], body: bytes) -> Array:
    """The array of an answer, float32 [N, 128].

    Args:
        headers: of the answer, with names in lower case or in a mapping that does not tell cases apart.

    Raises:
        KeyError, ValueError: the body is none of this format.
    """
    if format_ == "json":
        return np.array(json.loads(body)["output"], np.float32)
    start = int(headers[_TRITON_HEADER_LENGTH.lower()]) if format_ == "triton" else 0
    return np.frombuffer(body, np.float32, offset=start).reshape(-1, OUTPUT_COLUMNS)
