"""Changes of the authorized keys while clients are connected: at once, and wholly or not at all."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from dealer import rows
from keyed import Keyed, ask, keyed_daemon, listed, next_event, whoami
from tnxctl import Client
from tnxctl.keys import pairs
from tnxctl.protocol import wire
from tnxctl.protocol.errors import Unauthenticated

V = wire.VERSION
PEOPLE = {"alice": "predict", "bob": "predict"}


@pytest.fixture(scope="module")
def daemon_with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed_daemon(tmp_path_factory.mktemp("keyed"), PEOPLE, "--model", "mlp") as running:
        yield running


@pytest.fixture
def keyed(daemon_with_keys: Keyed) -> Iterator[Keyed]:
    daemon_with_keys.authorize(PEOPLE)
    yield daemon_with_keys
    daemon_with_keys.authorized.touch()
    daemon_with_keys.authorized.chmod(0o644)


def refusal(monitor: zmq.Socket[bytes]) -> tuple[int, int]:
    """Outcome for a peer that was cut off and tries again: the event, and its value."""
    return next_event(monitor, zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_SUCCEEDED)


def test_a_key_that_is_revoked_is_cut_off_at_once_and_the_others_go_on(keyed: Keyed) -> None:
    with keyed.dealer("alice") as alice, keyed.dealer("alice") as silent, keyed.dealer("bob") as bob:
        for peer in (alice, bob):
            peer.predict(rows(1))
            peer.result()
        events = [peer.socket.get_monitor_socket() for peer in (alice, silent, bob)]
        report = keyed.authorize({"bob": "predict"})
        assert not report.failed
        assert refusal(events[0]) == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
        bob.predict(rows(1))
        bob.result()
        # This one has been let in, and has not said anything yet: now it does.
        silent.predict(rows(1))
        assert refusal(events[1]) == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
        assert not silent.socket.poll(0)
        assert not events[2].poll(0)
        for peer, monitor in zip((alice, silent, bob), events, strict=True):
            peer.socket.disable_monitor()
            monitor.close(0)
    keyed.daemon.logged("alice at 127.0.0.1: its key was removed; cut off")


def test_the_client_of_a_revoked_key_fails_at_once(keyed: Keyed, tmp_path: Path) -> None:
    pairs.write(tmp_path / "alice.key", keyed.people["alice"])
    with Client(keyed.endpoint, key=tmp_path / "alice.key", server_key=keyed.pair.public, timeout=60.0) as alice:
        alice.predict(np.ones((1, 256), "f4"))
        keyed.authorize({"bob": "predict"})
        with pytest.raises(Unauthenticated):
            alice.predict(np.ones((1, 256), "f4"))


def test_a_key_in_the_place_of_another_one_cuts_the_old_one_off(keyed: Keyed) -> None:
    with keyed.dealer("alice") as alice, keyed.dealer("bob") as bob:
        assert (whoami(alice).name, whoami(bob).name) == ("alice", "bob")
        monitor = alice.socket.get_monitor_socket()
        keyed.authorized.write_text(listed({"alice": keyed.people["eve"]}, {"alice": "predict"}))
        keyed.reload()
        assert refusal(monitor) == (zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400)
        with keyed.dealer("eve") as new:  # the pair that was made for eve is alice's now
            assert whoami(new).name == "alice"
        alice.socket.disable_monitor()
        monitor.close(0)


@pytest.mark.parametrize("by_signal", [False, True])
def test_roles_and_limits_change_on_connections_that_are_open(keyed: Keyed, by_signal: bool) -> None:
    with keyed.dealer("alice") as alice:
        alice.predict(rows(1))
        alice.result()
        monitor = alice.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        changed = {"alice": "observe\nmax_requests = 5\nmax_mb = 2\nrate = 100\nshare = 3", "bob": "predict"}
        if by_signal:
            keyed.authorized.write_text(listed(keyed.people, changed))
            keyed.daemon.process.send_signal(signal.SIGHUP)
            while whoami(alice).role != "observe":
                pass
        else:
            keyed.authorize(changed)
        found = whoami(alice)
        assert (found.role, found.max_requests, found.max_mb, found.rate, found.share) == (
            "observe",
            5,
            2.0,
            100.0,
            3.0,
        )
        alice.predict(rows(1))
        assert alice.error().code == "PERMISSION_DENIED"
        keyed.authorize({"alice": "admin", "bob": "predict"})
        assert isinstance(ask(alice, wire.Clients(v=V, id=1)), wire.ClientsReport)
        assert whoami(alice).max_requests > 5
        assert not monitor.poll(0)
        alice.socket.disable_monitor()
        monitor.close(0)


def broken_files(keyed: Keyed) -> dict[str, tuple[str, str]]:
    """Files with a mistake: what is wrong -> the file, and words of the complaint behind its path."""
    alice, bob = (f'key = "{keyed.people[name].public}"' for name in ("alice", "bob"))
    return {
        "no TOML": (f'[keys.bob]\n{bob}\nrole = "predict"\n[keys.alice\n', ""),
        "a short key": ('[keys.bob]\nkey = "short"\nrole = "predict"\n', ":2: "),
        "an unknown role": (f'[keys.bob]\n{bob}\nrole = "god"\n', ":3: "),
        "an unknown setting": (f'[keys.bob]\n{bob}\nrole = "admin"\nquota = 3\n', ":4: "),
        "two names for a key": (f'[keys.a]\n{alice}\nrole = "predict"\n[keys.b]\n{alice}\nrole = "admin"\n', ":5: "),
    }


def test_a_file_with_a_mistake_changes_nothing_and_its_line_is_named(keyed: Keyed) -> None:
    with keyed.dealer("alice") as alice:
        assert whoami(alice).name == "alice"
        for what, (text, place) in broken_files(keyed).items():
            keyed.authorized.write_text(text)
            ((path, why),) = keyed.reload().failed.items()
            assert path == str(keyed.authorized), what
            assert f"{path}{place}" in why, what
            alice.predict(rows(1))
            alice.result()
            with keyed.dealer("bob") as bob:
                assert whoami(bob).role == "predict"
        keyed.daemon.logged("the keys stay as they were", "god")


@pytest.mark.parametrize("damage", [lambda path: path.chmod(0o666), lambda path: path.unlink()])
def test_a_file_that_cannot_be_trusted_or_read_changes_nothing(keyed: Keyed, damage: Callable[[Path], None]) -> None:
    keyed.authorized.write_text(listed(keyed.people, {"mallory": "admin"}))
    damage(keyed.authorized)
    assert str(keyed.authorized) in keyed.reload().failed
    with keyed.dealer("alice") as alice:
        assert whoami(alice).name == "alice"
