"""LitServe with a network of real size: workers, threads and the most requests in a batch as they are told.

A batch does not wait for company, as is its default; `fast_queue` is what its documentation recommends from 100
requests per second on. Bodies are bytes, since JSON would make text of every number.
"""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

from typing import Annotated, Any

import litserve
import networks
from fastapi import Body, Response

import serving


class Network(litserve.LitAPI):
    """The network. With batching, `predict` gets the list that `batch` makes of what `decode_request` returns."""

    def setup(self, device: str) -> None:
        self.served = networks.Served()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # annotated below, for FastAPI
        return self.served.parse(request)

    def batch(self, inputs: list[networks.Row]) -> list[networks.Row]:
        return inputs

    def predict(self, x: Any) -> Any:
        return self.served.answer(x) if self.max_batch_size > 1 else self.served.answer([x])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Any:
        return Response(output, media_type=networks.MIME_TYPE)


# The annotation itself rather than its text: LitServe hands it to FastAPI, which cannot look a text up there.
Network.decode_request.__annotations__["request"] = Annotated[bytes, Body(media_type=networks.MIME_TYPE)]


def main() -> None:
    configuration, port, _ = serving.arguments()
    setup = networks.set_up(configuration)
    serving.end_with_stdin()
    batching = {"max_batch_size": setup.rows, "batch_timeout": 0.0} if setup.rows > 1 else {}
    server = litserve.LitServer(
        Network(**batching),
        accelerator="cpu",
        workers_per_device=setup.workers,
        timeout=networks.PATIENCE_SECONDS,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1", port=port, generate_client_file=False, log_level="error", access_log=False, loop="uvloop"
    )


if __name__ == "__main__":
    main()
