"""NVIDIA's client over gRPC, the faster of its two transports. Argument: HOST:PORT."""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import calling
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.grpc import InferInput, InferRequestedOutput

_SECONDS = 10.0


def _question(array: calling.Array) -> dict[str, Any]:
    tensor = InferInput("input", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    return {"model_name": "mlp", "inputs": [tensor], "outputs": [InferRequestedOutput("output")]}


def main() -> None:
    (address,) = sys.argv[2:]
    client = tritonclient.grpc.InferenceServerClient(address)

    def predict(array: calling.Array) -> calling.Array:
        output: calling.Array = client.infer(**_question(array), client_timeout=_SECONDS).as_numpy("output")
        return output

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[calling.PredictLater]:
        async with tritonclient.grpc.aio.InferenceServerClient(address) as many:

            async def predict_later(array: calling.Array) -> calling.Array:
                answer = await many.infer(**_question(array), client_timeout=_SECONDS)
                output: calling.Array = answer.as_numpy("output")
                return output

            yield predict_later

    calling.serve(predict, connect)


if __name__ == "__main__":
    main()
