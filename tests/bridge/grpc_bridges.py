"""Bridges for tests, with gRPC alone: processes, as users start them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def serving(endpoint: str, **settings: Any) -> Iterator[str]:
    """Serve gRPC in front of a daemon. Yields the address.

    Args:
        settings: of the bridge.
    """
    command = [sys.executable, __file__, endpoint, json.dumps(settings)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address
            yield address
        finally:
            process.communicate()
            assert process.returncode == 0


async def _serve(endpoint: str, settings: dict[str, Any]) -> None:
    import msgspec

    from tnxctl.bridge import addresses
    from tnxctl.bridge.bridge import Bridge
    from tnxctl.bridge.grpc.server import GrpcServer
    from tnxctl.bridge.interfaces import routes_of
    from tnxctl.bridge.settings import Settings

    chosen = msgspec.convert({"endpoints": [endpoint], "grpc": ["127.0.0.1", 0]} | settings, Settings)
    bridge = Bridge(chosen, routes_of(chosen))
    server = GrpcServer(bridge)
    await server.start()
    print(addresses.spell(server.address), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    await bridge.close()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], json.loads(sys.argv[2])))
