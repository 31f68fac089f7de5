"""Admission by keys: who gets in, under what name, and who does not, with real keys against a real daemon."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from zmq.utils import z85

import zmtp
from dealer import Dealer, rows
from keyed import Keyed, dealer, keyed_daemon, next_event, whoami
from tnxctl import AsyncClient, Client
from tnxctl.keys import pairs
from tnxctl.protocol import wire
from tnxctl.protocol.errors import TensorNextError, Unauthenticated
from tnxd.transport import zap
from tnxd.transport.zap import ZapHandler

MOST_CONNECTIONS = 12


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    config = f"[clients]\nmax_connections = {MOST_CONNECTIONS}\n"
    people = {"alice": "predict", "bob": "predict", "olga": "observe"}
    with keyed_daemon(tmp_path_factory.mktemp("keyed"), people, "--model", "mlp", config=config) as running:
        yield running


@pytest.fixture
def client(keyed: Keyed, tmp_path: Path) -> Callable[..., Client]:
    """Makes the project's client, with the key of somebody."""

    def make(name: str, server: str = "") -> Client:
        path = tmp_path / f"{name}.key"
        pairs.write(path, keyed.people[name])
        return Client(keyed.endpoint, key=path, server_key=server or keyed.pair.public, timeout=60.0)

    return make


def test_a_key_that_may_connect_has_its_name_and_its_role(keyed: Keyed) -> None:
    with keyed.dealer("alice") as alice, keyed.dealer("alice") as again, keyed.dealer("olga") as olga:
        alice.predict(rows(1))
        assert alice.result()[0].model == "mlp"
        assert whoami(again).connections == 2
        found = whoami(alice)
        assert (found.name, found.by, found.role, found.address) == ("alice", "key", "predict", "127.0.0.1")
        assert (whoami(olga).name, whoami(olga).role) == ("olga", "observe")


def test_the_client_asks_by_its_key(keyed: Keyed, client: Callable[..., Client]) -> None:
    with client("alice") as alice:
        assert alice.predict(np.ones((1, 256), "f4"), model="mlp").model == "mlp"
        assert alice.whoami().name == "alice"
        with pytest.raises(TensorNextError, match="role admin") as caught:
            alice.kick("olga")
        assert caught.value.code == "PERMISSION_DENIED"


def test_ipc_asks_for_no_key_and_tells_the_user(keyed: Keyed) -> None:
    with Dealer(keyed.local) as local:
        found = whoami(local)
        assert (found.by, found.role) == ("user", "admin")
        assert found.name.startswith("uid:")


def test_a_key_that_is_not_on_the_list_is_refused_at_once(keyed: Keyed) -> None:
    events: list[zmq.Socket[bytes]] = []
    with dealer(keyed.endpoint, keyed.pair.public, keyed.people["eve"], events):
        failed = next_event(events[0], zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert failed == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
        events[0].close(0)
    keyed.daemon.logged("127.0.0.1 may not connect: its key is not authorized")


def test_the_client_fails_at_once_with_such_a_key(client: Callable[..., Client]) -> None:
    with client("eve") as eve, pytest.raises(Unauthenticated):
        eve.health()


@pytest.mark.parametrize("public", ["", "other"])
def test_peers_without_the_keys_of_this_daemon_get_nothing_and_others_go_on(keyed: Keyed, public: str) -> None:
    """No key at all, and the key of another daemon."""
    events: list[zmq.Socket[bytes]] = []

    def watch(socket: zmq.Socket[bytes]) -> None:
        events.append(socket.get_monitor_socket())

    other = pairs.new("other").public
    with (
        dealer(keyed.endpoint, other, keyed.people["alice"], events)
        if public
        else Dealer(keyed.endpoint, prepare=watch)
    ) as stranger:
        stranger.socket.send(wire.encode(wire.Health(v=wire.VERSION, id=1)))
        ended = (zmq.EVENT_DISCONNECTED, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        assert next_event(events[0], zmq.EVENT_HANDSHAKE_SUCCEEDED, *ended)[0] in ended
        with keyed.dealer("alice") as alice:
            assert whoami(alice).name == "alice"
        assert not stranger.socket.poll(0)
        events[0].close(0)


def test_the_client_fails_at_once_with_a_wrong_key_of_the_daemon(client: Callable[..., Client]) -> None:
    with client("alice", server=pairs.new("other").public) as misled, pytest.raises(Unauthenticated):
        misled.health()


def test_a_client_without_a_key_is_told_to_have_one(keyed: Keyed) -> None:
    async def ask_without_a_key() -> None:
        async with AsyncClient(keyed.endpoint, timeout=60.0) as nobody:
            await nobody.health()

    with (
        Client(keyed.endpoint, timeout=60.0) as nobody,
        pytest.raises(Unauthenticated, match="asks for a key, and its own is not known"),
    ):
        nobody.health()
    with pytest.raises(Unauthenticated, match="asks for a key, and its own is not known"):
        asyncio.run(ask_without_a_key())


def test_a_user_id_that_a_peer_claims_counts_for_nothing(keyed: Keyed) -> None:
    """ZMTP lets peers send properties of any name; the daemon reads the one that its own handler has set."""
    with zmtp.Peer(keyed.local) as liar:
        liar.greet(User_Id=keyed.people["olga"].public.encode(), Peer_Address=b"192.0.2.7")
        liar.write(zmtp.message(wire.encode(wire.WhoAmI(v=wire.VERSION, id=1))))
        (header,) = liar.read_message()
    found = wire.decode_reply(header, wire.Limits())
    assert isinstance(found, wire.Identity)
    assert (found.by, found.role) == ("user", "admin")
    assert found.address.startswith("process ")


def test_connections_of_a_name_are_limited(keyed: Keyed) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MOST_CONNECTIONS):
            assert whoami(stack.enter_context(keyed.dealer("alice"))).name == "alice"
        events: list[zmq.Socket[bytes]] = []
        stack.enter_context(dealer(keyed.endpoint, keyed.pair.public, keyed.people["alice"], events))
        failed = next_event(events[0], zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED)
        assert failed == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 500)  # there is no room: it may come again
        assert whoami(stack.enter_context(keyed.dealer("bob"))).name == "bob"
        events[0].close(0)


# --- the handler itself: what libzmq would have to get wrong for it ----------------------------------------------

KEY = bytes(range(32))


@pytest.fixture
def questions() -> Iterator[Callable[..., list[bytes]]]:
    """Asks a handler that lets everybody in who asks as is right, but fails at one address."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()

    def judge(address: str, key: str) -> tuple[bytes, str]:
        if address == "6.6.6.6":
            raise RuntimeError("a defect")
        return zap.ADMITTED, "OK"

    handler = ZapHandler(context, judge)
    asking = context.socket(zmq.REQ)
    asking.connect("inproc://zeromq.zap.01")

    def ask(
        domain: bytes, mechanism: bytes, *credentials: bytes, version: bytes = b"1.0", address: bytes = b"1.2.3.4"
    ) -> list[bytes]:
        asking.send_multipart([version, b"1", domain, address, b"", mechanism, *credentials])
        assert handler.socket.poll(60_000)
        handler.answer(lambda: None)
        assert asking.poll(60_000)
        return asking.recv_multipart()

    yield ask
    asking.close(0)
    handler.close()
    context.term()


def test_the_handler_lets_in_who_shows_itself_as_is_asked_for(questions: Callable[..., list[bytes]]) -> None:
    assert questions(zap.LOCAL_DOMAIN, b"NULL")[2:5] == [b"200", b"OK", b""]
    assert questions(zap.KEYS_DOMAIN, b"CURVE", KEY)[2:5] == [b"200", b"OK", z85.encode(KEY)]


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials"),
    [
        (b"", b"NULL", ()),
        (b"", b"CURVE", (KEY,)),
        (b"other", b"NULL", ()),
        (b"other", b"CURVE", (KEY,)),
        (zap.KEYS_DOMAIN, b"NULL", ()),
        (zap.KEYS_DOMAIN, b"PLAIN", (b"alice", b"secret")),
        (zap.KEYS_DOMAIN, b"CURVE", ()),
        (zap.KEYS_DOMAIN, b"CURVE", (KEY, KEY)),
        (zap.KEYS_DOMAIN, b"CURVE", (KEY[:31],)),
        (zap.LOCAL_DOMAIN, b"CURVE", (KEY,)),
        (zap.LOCAL_DOMAIN, b"PLAIN", (b"alice", b"secret")),
        (zap.LOCAL_DOMAIN, b"NULL", (KEY,)),
    ],
)
def test_the_handler_refuses_everything_else(
    questions: Callable[..., list[bytes]], domain: bytes, mechanism: bytes, credentials: tuple[bytes, ...]
) -> None:
    status, _, user = questions(domain, mechanism, *credentials)[2:5]
    assert (status, user) == (b"400", b"")


def test_the_handler_refuses_another_version_and_goes_on_after_a_defect(questions: Callable[..., list[bytes]]) -> None:
    assert questions(zap.LOCAL_DOMAIN, b"NULL", version=b"2.0")[2] == b"400"
    assert questions(zap.LOCAL_DOMAIN, b"NULL", address=b"6.6.6.6")[2:5] == [b"500", b"the daemon failed at this", b""]
    assert questions(zap.LOCAL_DOMAIN, b"NULL")[2] == b"200"
