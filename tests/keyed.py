"""Daemons that ask for keys, and bare peers that show one: real CURVE, with nothing of the client in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from conftest import Daemon, serving_daemon
from dealer import Dealer
from tnxctl.keys import pairs
from tnxctl.keys.pairs import Pair
from tnxctl.protocol import wire


@dataclass
class Keyed:
    """Daemon that asks for keys.

    Attributes:
        pair: its own. people: pairs of clients by name, who may connect or not. folder: of its files.
    """

    daemon: Daemon
    pair: Pair
    people: Mapping[str, Pair]
    folder: Path

    @property
    def endpoint(self) -> str:
        """Where it asks for keys."""
        return self.daemon.endpoint

    @property
    def local(self) -> str:
        """Where it asks for none: its ipc:// endpoint."""
        return f"ipc://{self.folder}/tnx"

    @property
    def authorized(self) -> Path:
        """File of the keys that may connect."""
        return self.folder / "authorized_keys.toml"

    def authorize(self, settings: Mapping[str, str]) -> wire.ReloadReport:
        """Let exactly these clients connect, and have the daemon read that. Args: settings: by name, the role first."""
        self.authorized.write_text(listed(self.people, settings))
        return self.reload()

    def reload(self) -> wire.ReloadReport:
        """Have the daemon read its files again, by a peer on ipc:// who may do all."""
        with Dealer(self.local) as admin:
            admin.socket.send(wire.encode(wire.Reload(v=wire.VERSION, id=1)))
            report, _ = admin.receive()
        assert isinstance(report, wire.ReloadReport), report
        return report

    def dealer(self, name: str) -> Dealer:
        """Peer that shows the key of a client."""
        return dealer(self.endpoint, self.pair.public, self.people[name])


def listed(people: Mapping[str, Pair], settings: Mapping[str, str]) -> str:
    """File of authorized keys. Args: settings: by name, the role and behind it lines of more settings."""
    tables = []
    for name, setting in settings.items():
        role, _, more = setting.partition("\n")
        tables.append(f'[keys.{name}]\nkey = "{people[name].public}"\nrole = "{role}"\n{more}\n')
    return "\n".join(tables)


@contextlib.contextmanager
def keyed_daemon(
    folder: Path,
    settings: Mapping[str, str],
    *arguments: str,
    config: str = "",
    program: tuple[str, ...] = ("-m", "tnxd"),
    environment: dict[str, str] | None = None,
) -> Iterator[Keyed]:
    """Daemon that asks for keys on tcp://, and for none on ipc://.

    Args:
        settings: of the clients that may connect, see `listed`. Others have pairs and may not: eve and mallory.
        config: more of its configuration, before the tables.
    """
    pair = pairs.new("daemon")
    pairs.write(folder / "tnxd.key", pair)
    people = {name: pairs.new(name) for name in (*settings, "eve", "mallory")}
    authorized = folder / "authorized_keys.toml"
    authorized.write_text(listed(people, settings))
    (folder / "tnxd.toml").write_text(f'{config}\n[keys]\nauthorized = "{authorized}"\nsecret = "{folder}/tnxd.key"\n')
    binds = ("--bind", "tcp://127.0.0.1:*", "--bind", f"ipc://{folder}/tnx")
    arguments = ("--config", str(folder / "tnxd.toml"), *binds, *arguments)
    with serving_daemon(folder / "log", *arguments, program=program, environment=environment) as daemon:
        yield Keyed(daemon, pair, people, folder)


def dealer(endpoint: str, server: str, pair: Pair, events: list[zmq.Socket[bytes]] | None = None) -> Dealer:
    """Peer that shows a key.

    Args:
        server: public key that the daemon should have. events: gets a monitor of its socket.
    """

    def show(socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
        if events is not None:
            events.append(socket.get_monitor_socket())

    return Dealer(endpoint, prepare=show)


def next_event(monitor: zmq.Socket[bytes], *wanted: int) -> tuple[int, int]:
    """The next event of a socket among those wanted, and its value."""
    while True:
        assert monitor.poll(60_000), "nothing happened"
        event = recv_monitor_message(monitor)
        if event["event"] in wanted:
            return event["event"], event["value"]


def ask(peer: Dealer, request: wire.Request) -> wire.Reply:
    """The reply to a request without tensors."""
    peer.socket.send(wire.encode(request))
    reply, _ = peer.receive()
    return reply


def whoami(peer: Dealer) -> wire.Identity:
    """Identity of a peer, as the daemon tells it."""
    reply = ask(peer, wire.WhoAmI(v=wire.VERSION, id=7))
    assert isinstance(reply, wire.Identity), reply
    return reply
