"""Listening sockets that somebody else holds: their endpoints, how they fit a configuration, and a ROUTER over them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import Limits
from tnxd.config import Clients
from tnxd.transport import inherited
from tnxd.transport.client_limits import Admission
from tnxd.transport.router import Router
from tnxd.transport.wakeup import Wakeup


@pytest.fixture
def held(tmp_path: Path) -> Iterator[dict[str, socket.socket]]:
    """A TCP and a Unix listener, by their endpoints."""
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(tmp_path / "tnx"))
        unix.listen()
        yield {f"tcp://127.0.0.1:{tcp.getsockname()[1]}": tcp, f"ipc://{tmp_path}/tnx": unix}


def copies(held: dict[str, socket.socket]) -> list[int]:
    """Descriptors as another process gets them: the listener stays if they are closed."""
    return [os.dup(each.fileno()) for each in held.values()]


def test_listeners_are_told_apart_by_their_addresses(held: dict[str, socket.socket]) -> None:
    found = inherited.listeners(copies(held))
    assert list(found) == list(held)
    for listener in found.values():
        assert not listener.getblocking(), "another process may have taken the connection that there was"
        assert not listener.get_inheritable()
        listener.close()


def test_ipv6_and_abstract_addresses() -> None:
    with ExitStack() as stack:
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0tnx-test-{os.getpid()}")
        abstract.listen()
        expected = [f"ipc://@tnx-test-{os.getpid()}"]
        descriptors = [os.dup(abstract.fileno())]
        if socket.has_ipv6:
            try:
                server = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
            except OSError:
                pytest.skip("this machine has no IPv6")
            expected.append(f"tcp://[::1]:{server.getsockname()[1]}")
            descriptors.append(os.dup(server.fileno()))
        found = inherited.listeners(descriptors)
        assert list(found) == expected
        for listener in found.values():
            listener.close()


@pytest.mark.parametrize("kind", ["datagram", "connection", "file", "closed"])
def test_what_nobody_can_connect_to_is_refused(kind: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if kind == "file":
            descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
            stack.callback(os.close, descriptor)
        elif kind == "closed":
            descriptor = os.dup(2)
            os.close(descriptor)
        else:
            made = socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM
            descriptor = socket.socket(socket.AF_INET, made).detach()
        with pytest.raises(InvalidArgument, match=f"file descriptor {descriptor}, of the service manager"):
            inherited.listeners([descriptor])


TCP, IPC = "tcp://127.0.0.1:5555", "ipc:///run/tnx"


@pytest.mark.parametrize(
    ("bind", "holds", "assigned"),
    [
        ([TCP], [TCP, IPC], {TCP: True, IPC: True}),
        ([TCP, IPC], [TCP, IPC], {TCP: True, IPC: True}),
        ([TCP, "ipc:///other"], [TCP], {TCP: True, "ipc:///other": False}),
        ([TCP, IPC], [], {TCP: False, IPC: False}),
        (["tcp://*:5555"], ["tcp://0.0.0.0:5555"], {"tcp://*:5555": True}),
        (["tcp://[0::0]:5555"], ["tcp://[::]:5555"], {"tcp://[0::0]:5555": True}),
        (["tcp://localhost:*"], [], {"tcp://localhost:*": False}),
    ],
)
def test_endpoints_get_what_is_held_for_them(bind: list[str], holds: list[str], assigned: dict[str, bool]) -> None:
    with socket.socket() as any_socket:
        outcome = inherited.assign(bind, dict.fromkeys(holds, any_socket))
    assert {endpoint: listener is not None for endpoint, listener in outcome.items()} == assigned


def test_an_address_that_is_held_and_not_configured_is_an_error_that_says_what_to_do() -> None:
    with (
        socket.socket() as any_socket,
        pytest.raises(
            InvalidArgument, match=r"systemd holds tcp://0\.0\.0\.0:5555 .* bind has tcp://127.*ListenStream="
        ),
    ):
        inherited.assign([TCP], {TCP: any_socket, "tcp://0.0.0.0:5555": any_socket})


def test_a_router_takes_over_and_leaves_the_listeners_to_the_next(held: dict[str, socket.socket]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wakeup = Wakeup()
    for _ in range(3):
        with ExitStack() as stack:
            for endpoint in held:
                client = stack.enter_context(context.socket(zmq.DEALER))
                client.set(zmq.LINGER, 0)
                client.connect(endpoint)  # before anybody accepts
                client.send(endpoint.encode())
            router = Router(Limits(), Admission(Clients(), max_requests=100, max_bytes=1 << 20))
            stack.callback(router.close, 0)
            router.watch(wakeup)
            for endpoint, listener in inherited.listeners(copies(held)).items():
                router.bind(endpoint, listener)
            router.bind("tcp://127.0.0.1:*")  # one of its own beside them
            assert router.endpoints[:2] == list(held)
            seen = set()
            while len(seen) < len(held):
                router.wait(1000)
                if (message := router.receive()) is not None:
                    seen.add(bytes(message.header or b"").decode())
            assert seen == set(held)
    wakeup.close()
    context.term()
    assert all(os.path.exists(endpoint[6:]) for endpoint in held if endpoint.startswith("ipc://"))
