"""Routing ids that libzmq assigns, claimed by a peer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest

from conftest import Daemon
from invariants import check_alive, needs_proc, unharmed
from raw import good, reply
from tnxctl.protocol import wire
from zmtp import Peer

# The first names that the first and the second ROUTER of a process give with libzmq 4.3.5, where nobody has seeded
# glibc's random numbers.
UNSEEDED = 0x6B8B4567, 0xE43C9869


@pytest.mark.slow
@needs_proc
def test_claimed_routing_ids_do_not_end_the_process(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon("--model", "mlp")
    with unharmed(daemon), contextlib.ExitStack() as stack:
        for number in range(150):
            peer = stack.enter_context(Peer(daemon.endpoint))
            peer.greet(b"\0" + (UNSEEDED[number % 2] + 20 + number).to_bytes(4, "big"))
        for _ in range(300):
            with Peer(daemon.endpoint) as honest:
                honest.greet()
        check_alive(daemon)


@pytest.mark.parametrize("identity", [b"\0abc", b"\0\0\0\0\1", b"\0" * 200])
def test_peer_with_a_claimed_routing_id_is_cut_off(daemon: Daemon, identity: bytes) -> None:
    with Peer(daemon.endpoint, timeout=60) as peer:
        peer.greet(identity).write(good())
        peer.read_end()
    check_alive(daemon)


def test_peer_with_a_routing_id_of_its_own_is_served(daemon: Daemon) -> None:
    with Peer(daemon.endpoint) as peer:
        peer.greet(b"mine").write(good())
        assert isinstance(reply(peer), wire.Result)
