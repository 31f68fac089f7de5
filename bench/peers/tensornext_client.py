"""TensorNext's own client. Argument: ENDPOINT."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

import calling

from tnxctl import AsyncClient, Client


def main() -> None:
    (endpoint,) = sys.argv[2:]

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[calling.PredictLater]:
        async with AsyncClient(endpoint) as many:

            async def predict_later(array: calling.Array) -> calling.Array:
                return (await many.predict(array, model="mlp")).output

            yield predict_later

    with Client(endpoint) as client:
        calling.serve(lambda array: client.predict(array, model="mlp").output, connect)


if __name__ == "__main__":
    main()
