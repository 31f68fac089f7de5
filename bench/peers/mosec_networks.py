"""mosec with a network of real size. Its README, "Performance tuning", says what there is to be chosen.

The number of workers, threads by way of the environment, the most requests in a batch; one waits for company for 1 ms,
the shortest time that it takes. Bodies are bytes, for which its own msgpack would only be a wrapping more.
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

import sys

import mosec
import networks

import serving


class Network(mosec.Worker):
    """The network, one request per forward."""

    resp_mime_type = networks.MIME_TYPE

    def __init__(self) -> None:
        super().__init__()
        self.served = networks.Served()

    def deserialize(self, data: bytes) -> networks.Row:
        return self.served.parse(data)

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: networks.Row) -> bytes:
        return self.served.answer([data])[0]


class BatchedNetwork(Network):
    """The network, one forward for a list of requests."""

    def forward(self, data: list[networks.Row]) -> list[bytes]:  # type: ignore[override]
        return self.served.answer(data)


def main() -> None:
    configuration, port, _ = serving.arguments()
    setup = networks.set_up(configuration)
    serving.end_with_stdin()
    timeout = str(1000 * networks.PATIENCE_SECONDS)
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(port), "--timeout", timeout, "--log-level", "error"]
    server = mosec.Server()
    if setup.rows > 1:
        server.append_worker(BatchedNetwork, num=setup.workers, max_batch_size=setup.rows, max_wait_time=1)
    else:
        server.append_worker(Network, num=setup.workers)
    server.run()


if __name__ == "__main__":
    main()
