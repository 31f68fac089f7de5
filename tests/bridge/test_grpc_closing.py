"""Connections that the bridge ends below gRPC: those alone that it means."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

pytest.importorskip("grpc")

from bridges import SECONDS
from tnxctl.bridge.grpc.closing import Closer


def test_one_connection_is_ended_and_no_other() -> None:
    """There are two to one port from different addresses, and one to another port from the same address."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("the system has no IPv6 beside IPv4")
    with contextlib.ExitStack() as stack:
        ports = [
            stack.enter_context(socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True))
            for _ in range(2)
        ]

        def connected(to: socket.socket, source: tuple[str, int]) -> tuple[socket.socket, socket.socket]:
            """Both ends of a connection."""
            family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
            client = stack.enter_context(socket.socket(family))
            client.settimeout(SECONDS)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind(source)
            client.connect((source[0], to.getsockname()[1]))
            return client, stack.enter_context(to.accept()[0])

        for host in ("127.0.0.1", "::1"):
            ended, _ = connected(ports[0], (host, 0))
            source = ended.getsockname()[:2]
            others = [connected(ports[0], (host, 0)), connected(ports[1], source)]

            async def end(address: str) -> None:
                Closer(ports[0].getsockname()[1]).end(address)
                await asyncio.sleep(0)  # it is done once the loop comes round

            asyncio.run(end(f"[{source[0]}]:{source[1]}" if ":" in host else f"{source[0]}:{source[1]}"))
            assert ended.recv(1) == b""
            for client, server in others:
                server.send(b"x")
                assert client.recv(1) == b"x"


def test_a_search_leaves_no_descriptors_open() -> None:
    async def search() -> None:
        closer = Closer(1)
        for _ in range(3):
            closer.end("127.0.0.1:1")
            await asyncio.sleep(0)

    descriptors = Path("/dev/fd")
    if not descriptors.exists():
        pytest.skip("the system does not tell open descriptors")
    with open(__file__, "rb"):
        before = len(list(descriptors.iterdir()))
        asyncio.run(search())
        assert len(list(descriptors.iterdir())) == before
