"""Clients that people use for HTTP servers: requests one by one, aiohttp for many at once. Arguments: URL FORMAT."""
# mypy: disable-error-code="import-not-found,import-untyped,misc"

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

import aiohttp
import calling
import formats
import requests


def main() -> None:
    url, format_ = sys.argv[2:]
    session = requests.Session()

    def predict(array: calling.Array) -> calling.Array:
        headers, body = formats.encode(format_, array)
        answer = session.post(url, data=body, headers=headers, timeout=10)
        answer.raise_for_status()
        return formats.decode(format_, answer.headers, answer.content)

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[calling.PredictLater]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(10)) as many:

            async def predict_later(array: calling.Array) -> calling.Array:
                headers, body = formats.encode(format_, array)
                async with many.post(url, data=body, headers=headers, raise_for_status=True) as answer:
                    return formats.decode(format_, answer.headers, await answer.read())

            yield predict_later

    calling.serve(predict, connect)


if __name__ == "__main__":
    main()
