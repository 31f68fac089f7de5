"""A client with keys at real doors: let in by the right ones, and told at once, and for good, where it is not."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from fixed_pairs import fixed_pair
from guarded import GuardedDaemon
from peers import FakeDaemon as OpenDaemon
from peers import X, echo, equal, free_endpoint
from tnxctl import AsyncClient, Client, connection, link
from tnxctl.channels import libzmq
from tnxctl.cli.bench.loops import Connection
from tnxctl.cli.exits import Exit
from tnxctl.keys import known_hosts, lines, pairs, places
from tnxctl.protocol.errors import Unauthenticated, Unavailable
from tool import run

PATIENCE_S = 60.0  # far more than any refusal takes: only so that a client that hangs fails its test

ALICE, DAEMON, OTHER = map(fixed_pair, ("alice", "gpu-box", "gpu-box"), (1, 1, 2))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    places.pair_file("alice").parent.mkdir(parents=True)
    pairs.write(places.pair_file("alice"), ALICE)


@pytest.fixture
def daemon() -> Iterator[GuardedDaemon]:
    with GuardedDaemon(DAEMON) as running:
        trust(running.endpoint)
        yield running


def trust(endpoint: str, daemon: pairs.Pair = DAEMON) -> None:
    known_hosts.trust(places.known_hosts(), endpoint, pairs.server_line(daemon), "alice", replace=True)


# --- ways to ask ---------------------------------------------------------------------------------------------


def alone(endpoint: str) -> Any:
    with Client(endpoint, timeout=PATIENCE_S) as tnx:
        return tnx.predict(X)


def by_a_future(endpoint: str) -> Any:
    with Client(endpoint, timeout=PATIENCE_S) as tnx:
        futures = [tnx.submit(X) for _ in range(5)]
        return next(future.result() for future in reversed(futures))


def in_a_loop(endpoint: str) -> Any:
    async def ask() -> Any:
        async with AsyncClient(endpoint, timeout=PATIENCE_S) as tnx:
            return await tnx.predict(X)

    return asyncio.run(ask())


WAYS = [alone, by_a_future, in_a_loop]


# --- let in --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", WAYS)
def test_both_keys_are_found_by_the_host(daemon: GuardedDaemon, ask: Callable[[str], Any]) -> None:
    assert equal(ask(daemon.endpoint), X)
    assert daemon.asked == [(b"CURVE", lines.decode(ALICE.public, ""))]


def test_a_benchmark_finds_them_as_well(daemon: GuardedDaemon) -> None:
    with Connection(daemon.endpoint, PATIENCE_S):
        assert daemon.asked == [(b"CURVE", lines.decode(ALICE.public, ""))]


def test_a_command_finds_them_as_well(daemon: GuardedDaemon) -> None:
    assert run("predict", "--host", daemon.endpoint, "--timeout", 60).exit_code == Exit.OK
    assert {mechanism for mechanism, *_ in daemon.asked} == {b"CURVE"}


def test_a_program_may_bring_its_own(tmp_path: Path) -> None:
    bob = pairs.new("bob")
    pairs.write(tmp_path / "bob.key", bob)
    with (
        GuardedDaemon(DAEMON) as daemon,
        Client(
            daemon.endpoint, key=tmp_path / "bob.key", server_key=pairs.server_line(DAEMON), timeout=PATIENCE_S
        ) as tnx,
    ):
        assert equal(tnx.predict(X), X)
        assert daemon.asked == [(b"CURVE", lines.decode(bob.public, ""))]


def test_without_keys_nothing_changes(tmp_path: Path) -> None:
    for endpoint in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/daemon"):
        with OpenDaemon(echo, endpoint) as daemon, Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            assert equal(tnx.predict(X), X)


# --- not let in ----------------------------------------------------------------------------------------------


def refusing() -> GuardedDaemon:
    """A daemon that does not have the client's key on its list."""
    return GuardedDaemon(DAEMON, "400")


def impostor() -> GuardedDaemon:
    """Another one, or a daemon with a new key."""
    return GuardedDaemon(OTHER)


def without_handler() -> GuardedDaemon:
    """A daemon where nobody decides who gets in."""
    return GuardedDaemon(DAEMON, handler=False)


def without_keys() -> GuardedDaemon:
    """A daemon that asks for no keys."""
    return GuardedDaemon(None)


REFUSALS = [
    (refusing, r"does not let alice in: its key, .* is not among those that tnxctl keys allow has added there"),
    (impostor, r"has not the key that .*known_hosts\.toml expects there, .* tnxctl keys trust HOST LINE --replace"),
    (without_handler, r"or lets nobody in"),
    (without_keys, r"the listener there uses no keys, but .*known_hosts\.toml expects one"),
]


class HastyListener:
    """A listener that hangs up on whoever names another mechanism, before it has sent its own, as libzmq may."""

    def __init__(self, mechanism: bytes) -> None:
        self._greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._socket.accept()
                threading.Thread(target=self._greet, args=(peer,), daemon=True).start()

    def _greet(self, peer: socket.socket) -> None:
        with contextlib.suppress(OSError), peer:
            heard = b""
            peer.sendall(self._greeting[:12])  # with its version, which a peer waits for before it names a mechanism
            while len(heard) < 12 and (part := peer.recv(64)):
                heard += part
            peer.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                heard += peer.recv(64)
            if len(heard) == 12:  # it waits for the mechanism
                peer.sendall(self._greeting[12:])
                peer.recv(64)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.mark.parametrize("ask", [alone, *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS[1:])])
@pytest.mark.parametrize(
    ("mechanism", "knows", "sentence"),
    [
        (b"CURVE", False, r"the daemon there asks for a key, and its own is not known by this address"),
        (b"NULL", True, r"the listener there uses no keys, but .*known_hosts\.toml expects one"),
    ],
)
def test_a_listener_that_hangs_up_at_once_is_asked_for_its_mechanism(
    monkeypatch: pytest.MonkeyPatch, mechanism: bytes, knows: bool, sentence: str, ask: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(connection, "MAX_FAILED_HANDSHAKES", 1000)  # which come sooner than its answer
    with HastyListener(mechanism) as listener:
        if knows:
            trust(listener.endpoint)
        with pytest.raises(Unauthenticated, match=sentence):
            ask(listener.endpoint)


def test_a_listener_of_another_kind_is_no_refusal() -> None:
    """It ends each connection, as a proxy does whose daemon is away."""
    with HastyListener(b"NULL") as listener, Client(listener.endpoint, timeout=1.0) as tnx, pytest.raises(Unavailable):
        tnx.health()


@pytest.mark.parametrize("ask", WAYS)
@pytest.mark.parametrize(("door", "sentence"), REFUSALS)
def test_a_client_that_is_not_let_in_knows_it_at_once(
    door: Callable[[], GuardedDaemon], sentence: str, ask: Callable[[str], Any]
) -> None:
    with door() as daemon:
        trust(daemon.endpoint)
        with pytest.raises(Unauthenticated, match=sentence):
            ask(daemon.endpoint)


@pytest.mark.parametrize("ask", WAYS)
def test_a_client_without_keys_is_told_where_they_come_from(ask: Callable[[str], Any]) -> None:
    with GuardedDaemon(DAEMON) as daemon:
        with pytest.raises(Unauthenticated, match=r"asks for a key, and its own is not known.*: tnxctl keys new NAME"):
            ask(daemon.endpoint)
        assert daemon.asked == []


def test_a_client_without_keys_may_be_refused_for_what_it_is() -> None:
    with (
        GuardedDaemon(None, "400") as daemon,
        pytest.raises(Unauthenticated, match=r"does not let this client in$"),
    ):
        alone(daemon.endpoint)


@pytest.mark.parametrize("status", ["", "300"])
@pytest.mark.parametrize("ask", WAYS)
def test_silence_has_an_end(monkeypatch: pytest.MonkeyPatch, status: str, ask: Callable[[str], Any]) -> None:
    for module in (libzmq, link):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.05)
    with GuardedDaemon(DAEMON, status) as daemon:
        trust(daemon.endpoint)
        while not daemon.asked:  # by a client that has not given up before it came to that
            # Which of the two it says depends on when this thread saw the events.
            with pytest.raises(Unauthenticated, match=r"did not finish the handshake with keys|or lets nobody in"):
                ask(daemon.endpoint)


def test_a_call_that_ends_in_silence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tnxctl.connection.SILENCE_S", 0.01)
    with GuardedDaemon(DAEMON, "") as daemon:
        trust(daemon.endpoint)
        with (
            Client(daemon.endpoint, timeout=5.0) as tnx,
            pytest.raises(Unauthenticated, match=r"no connection within .*5 s: .* did not finish the handshake"),
        ):
            tnx.health()


def test_a_command_that_is_not_let_in_is_refused() -> None:
    with refusing() as daemon:
        trust(daemon.endpoint)
        done = run("health", "--host", daemon.endpoint, "--timeout", PATIENCE_S)
    assert done.exit_code == Exit.REFUSED
    assert "does not let alice in" in done.stderr


def test_a_benchmark_that_is_not_let_in_is_refused() -> None:
    with refusing() as daemon:
        trust(daemon.endpoint)
        with pytest.raises(Unauthenticated), Connection(daemon.endpoint, PATIENCE_S):
            pass


def test_nobody_there_is_not_a_refusal() -> None:
    endpoint = free_endpoint()
    trust(endpoint)
    with Client(endpoint, timeout=5.0) as tnx, pytest.raises(Unavailable, match="nobody listens there"):
        tnx.predict(X)


# --- as time goes by -----------------------------------------------------------------------------------------


def test_all_that_is_under_way_fails_when_a_key_is_revoked(daemon: GuardedDaemon) -> None:
    with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        tnx.health()
        daemon.restart(DAEMON, "400")
        futures = [tnx.submit(X) for _ in range(5)]
        for future in futures:
            assert isinstance(future.exception(), Unauthenticated)
        for call in (lambda: tnx.load("digits"), tnx.health):
            with pytest.raises(Unauthenticated):
                call()


def test_a_client_is_let_in_once_its_key_is_there() -> None:
    with GuardedDaemon(DAEMON, "400", "400", "200") as daemon:
        trust(daemon.endpoint)
        with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
            for _ in range(2):
                with pytest.raises(Unauthenticated):
                    tnx.predict(X)
            assert equal(tnx.predict(X), X)
        assert len(daemon.asked) == 3


def test_a_restart_of_a_daemon_with_keys_costs_no_error(daemon: GuardedDaemon) -> None:
    with Client(daemon.endpoint, timeout=PATIENCE_S) as tnx:
        stop = threading.Event()
        answers: list[bool] = []

        def ask() -> None:
            while not stop.is_set():
                answers.append(equal(tnx.predict(X), X))

        asking = threading.Thread(target=ask)
        asking.start()
        for _ in range(5):
            seen = len(answers)
            while len(answers) < seen + 5 and asking.is_alive():
                stop.wait(0.001)
            daemon.restart(DAEMON)
        seen = len(answers)
        while len(answers) < seen + 5 and asking.is_alive():
            stop.wait(0.001)
        stop.set()
        asking.join(PATIENCE_S)
    assert all(answers)
    assert len(answers) >= 30


@pytest.mark.parametrize("pair", [DAEMON, None])
def test_a_daemon_without_room_is_asked_again(pair: pairs.Pair | None) -> None:
    with GuardedDaemon(pair, "500", "500", "500", "500", "200") as daemon:
        if pair is not None:
            trust(daemon.endpoint)
        assert equal(alone(daemon.endpoint), X)
        assert len(daemon.asked) == 5


def test_a_daemon_that_stays_without_room_is_unavailable() -> None:
    with (
        GuardedDaemon(None, "500") as daemon,
        Client(daemon.endpoint, timeout=5.0) as tnx,
        pytest.raises(Unavailable, match="lets nobody more in for now"),
    ):
        tnx.predict(X)
