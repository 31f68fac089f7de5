"""mosec: its HTTP server in Rust, one worker, the bytes of the array both ways.

plain    one request per forward
batched  up to 64 requests per forward; it waits for company for 1 ms, the shortest time that it takes
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

import sys

import mosec
import numpy as np

import serving


class Mlp(mosec.Worker):
    """The model, one request per forward."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.run = serving.forward()

    def deserialize(self, data: bytes) -> serving.Array:
        return serving.parse(data)

    def serialize(self, data: serving.Array) -> bytes:
        return data.tobytes()

    def forward(self, data: serving.Array) -> serving.Array:
        return self.run(data)


class BatchedMlp(Mlp):
    """The model, one forward for a list of requests of one row each."""

    def forward(self, data: list[serving.Array]) -> list[serving.Array]:  # type: ignore[override]
        output = self.run(np.concatenate(data))
        return [output[row : row + 1] for row in range(len(output))]


def main() -> None:
    configuration, port, _ = serving.arguments()
    serving.end_with_stdin()
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(port), "--log-level", "error"]  # it reads them itself
    server = mosec.Server()
    if configuration == "batched":
        server.append_worker(BatchedMlp, max_batch_size=serving.BATCH_ROWS, max_wait_time=1)
    else:
        server.append_worker(Mlp)
    server.run()


if __name__ == "__main__":
    main()
