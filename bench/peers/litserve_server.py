"""LitServe: one HTTP process and one worker, the bytes of the array both ways.

    plain    one request per forward
    batched  up to 64 requests per forward, without waiting for company

`fast_queue` is what its documentation recommends from 100 requests per second on.
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

import serving


class Mlp(litserve.LitAPI):
    """The model. In `batched`, `predict` gets the stacked rows that `batch` makes of what `decode_request` returns."""

    def setup(self, device: str) -> None:
        self.run = serving.forward()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # annotated below, for FastAPI
        return serving.parse(request)

    def batch(self, inputs: list[serving.Array]) -> serving.Array:
        return np.concatenate(inputs)

    def predict(self, x: serving.Array) -> serving.Array:
        return self.run(x)

    def unbatch(self, output: serving.Array) -> list[serving.Array]:
        return [output[row : row + 1] for row in range(len(output))]  # every request here has one row

    def encode_response(self, output: serving.Array) -> Any:
        return Response(output.tobytes(), media_type="application/octet-stream")


# The annotation itself rather than its text: LitServe hands it to FastAPI, which cannot look a text up there.
Mlp.decode_request.__annotations__["request"] = Annotated[bytes, Body(media_type="application/octet-stream")]


def main() -> None:
    configuration, port, _ = serving.arguments()
    serving.end_with_stdin()
    batching = {"max_batch_size": serving.BATCH_ROWS, "batch_timeout": 0.0} if configuration == "batched" else {}
    server = litserve.LitServer(Mlp(**batching), accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False, loop="uvloop"
    )


if __name__ == "__main__":
    main()
