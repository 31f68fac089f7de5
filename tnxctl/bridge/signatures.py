"""Signatures of models, kept for a moment: what has no datatype of its own needs one for each request."""

from __future__ import annotations

import time

from tnxctl.aio import AsyncClient
from tnxctl.protocol.wire import ModelInfo

_FRESH_S = 1.0
_MOST = 1024


class Signatures:
    """Signatures that the daemon has told lately."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._known: dict[str, tuple[float, ModelInfo]] = {}

    async def get(self, model: str) -> ModelInfo:
        """The signature of a model, as old as a second at most; "" is the daemon's default model.

        Raises:
            TensorNextError: as `AsyncClient.metadata` does.
        """
        known = self._known.get(model)
        now = time.monotonic()
        if known is not None and now - known[0] < _FRESH_S:
            return known[1]
        found = await self._client.metadata(model)
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[model] = now, found
        return found
