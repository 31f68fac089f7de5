"""Roles: what each may ask for, who has which, and what the log tells of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import zmq

import zmtp
from dealer import Dealer, rows
from keyed import Keyed, ask, keyed_daemon, whoami
from tnxctl.protocol import wire
from tnxctl.protocol.recordings import RecordingReader
from tnxctl.protocol.wire import LEAST_ROLES, Role

V = wire.VERSION

# One request of each verb, which does no harm where it is allowed.
SAMPLES: dict[type[wire.Request], wire.Request] = {
    wire.WhoAmI: wire.WhoAmI(v=V, id=1),
    wire.Health: wire.Health(v=V, id=1),
    wire.Metadata: wire.Metadata(v=V, id=1),
    wire.Models: wire.Models(v=V, id=1),
    wire.Compare: wire.Compare(v=V, id=1, model="mlp", baseline="1", candidate="2"),
    wire.Cancel: wire.Cancel(v=V, id=1),
    wire.Predict: wire.Predict(v=V, id=1, inputs=(), model="mlp"),
    wire.PredictShared: wire.PredictShared(v=V, id=1, inputs=(), model="mlp"),
    wire.Share: wire.Share(v=V, id=1, address="@0", token="0" * 16),
    wire.Load: wire.Load(v=V, id=1, model="nope"),
    wire.Unload: wire.Unload(v=V, id=1, model="nope"),
    wire.Route: wire.Route(v=V, id=1, model="nope"),
    wire.Reload: wire.Reload(v=V, id=1),
    wire.Clients: wire.Clients(v=V, id=1),
    wire.Kick: wire.Kick(v=V, id=1, client="nobody"),
    wire.Keys: wire.Keys(v=V, id=1),
    wire.Record: wire.Record(v=V, id=1, file="no/name"),
    wire.StopRecording: wire.StopRecording(v=V, id=1),
    wire.Recording: wire.Recording(v=V, id=1),
    wire.Stats: wire.Stats(v=V, id=1),
    wire.Explain: wire.Explain(v=V, id=1),
}

ROLES = {"olga": "observe", "paul": "predict", "ada": "admin"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Keyed]:
    with tempfile.TemporaryDirectory(prefix="keyed-") as folder:
        os.chmod(folder, 0o755)  # other users may come to its ipc:// path
        recordings = ("--record-directory", folder)
        with keyed_daemon(Path(folder), ROLES, "--model", "mlp", *recordings) as running:
            yield running


def test_every_verb_has_a_least_role() -> None:
    assert set(LEAST_ROLES) == set(get_args(wire.Request)) == set(SAMPLES)


@pytest.mark.parametrize("name", ROLES)
def test_each_role_may_do_what_the_table_says(keyed: Keyed, name: str) -> None:
    role = Role[ROLES[name].upper()]
    with keyed.dealer(name) as peer:
        for kind, request in SAMPLES.items():
            peer.socket.send(wire.encode(request))
            if kind is wire.Cancel:
                continue  # it has no answer, but an error would be one: the next reply is that of the next request
            reply, _ = peer.receive()
            refused = isinstance(reply, wire.ErrorReply) and reply.code == "PERMISSION_DENIED"
            assert refused == (role < LEAST_ROLES[kind]), (kind, reply)
            if refused:
                verb, least = kind.__struct_config__.tag, LEAST_ROLES[kind].title
                assert reply == wire.ErrorReply(
                    v=V,
                    id=1,
                    code="PERMISSION_DENIED",
                    message=f"{verb} is for the role {least}, and {name} has {role.title}",
                )


def test_the_log_tells_who_was_refused_and_who_gave_orders(keyed: Keyed) -> None:
    with keyed.dealer("paul") as paul, keyed.dealer("ada") as ada:
        assert ask(paul, wire.Unload(v=V, id=1, model="m\nfake line")).code == "PERMISSION_DENIED"  # type: ignore[union-attr]
        assert ask(ada, wire.Load(v=V, id=1, model="mlp@7")).code == "NOT_FOUND"  # type: ignore[union-attr]
    log = keyed.daemon.logged(
        "WARNING tnxd.audit: paul at 127.0.0.1: unload 'm\\nfake line' refused, having the role predict",
        "INFO tnxd.audit: ada at 127.0.0.1: load 'mlp@7'",
    )
    assert "\nfake line" not in log


def test_what_a_client_may_not_ask_is_not_recorded(keyed: Keyed) -> None:
    with keyed.dealer("ada") as ada, keyed.dealer("olga") as olga, keyed.dealer("paul") as paul:
        begun = ask(ada, wire.Record(v=V, id=1, file="roles.mcap"))
        assert isinstance(begun, wire.RecordingReport), begun
        for peer in (olga, paul):
            peer.predict(rows(1))
            peer.receive()
        assert ask(paul, wire.StopRecording(v=V, id=2)).code == "PERMISSION_DENIED"  # type: ignore[union-attr]
        ended = ask(ada, wire.StopRecording(v=V, id=2))
    assert isinstance(ended, wire.RecordingReport), ended
    with (keyed.folder / "roles.mcap").open("rb") as file:
        assert [request.client for request in RecordingReader(file)] == ["paul"]


def test_a_flood_of_what_is_not_allowed_is_cut_off(keyed: Keyed) -> None:
    with keyed.dealer("olga") as olga, keyed.dealer("paul") as paul:
        monitor = olga.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        header = wire.encode(SAMPLES[wire.Predict])
        while not monitor.poll(0):
            for _ in range(1000):
                olga.socket.send(header)
        olga.socket.disable_monitor()
        monitor.close(0)
        paul.predict(rows(1))
        paul.result()


def test_clients_are_told_with_what_they_have_done(keyed: Keyed) -> None:
    with keyed.dealer("paul") as paul, keyed.dealer("paul") as again, keyed.dealer("ada") as ada:
        before = {info.name: info for info in clients(ada).clients}
        for _ in range(3):
            paul.predict(rows(1))
            paul.result()
        assert whoami(again).connections == 2
        report = clients(ada)
        assert report.total == len(report.clients)
        found = {info.name: info for info in report.clients}
        assert {"paul", "ada"} <= found.keys()
        told = found["paul"]
        assert (told.by, told.role, told.addresses, told.connections) == ("key", "predict", ("127.0.0.1",), 2)
        assert told.requests - (before["paul"].requests if "paul" in before else 0) == 3
        assert told.in_flight == 0
        assert told.received_bytes > 3 * rows(1).nbytes
        assert told.connected_s >= 0
        told_of: dict[str, tuple[str, str, int]] = {}
        while sum(connections for _, _, connections in told_of.values()) != 3:  # until it has seen earlier ones end
            keys = ask(ada, wire.Keys(v=V, id=1))
            assert isinstance(keys, wire.KeysReport)
            told_of = {info.name: (info.role, info.key, info.connections) for info in keys.keys}
        assert told_of == {
            name: (role, keyed.people[name].public, {"paul": 2, "ada": 1}.get(name, 0)) for name, role in ROLES.items()
        }


def clients(peer: Dealer) -> wire.ClientsReport:
    report = ask(peer, wire.Clients(v=V, id=1))
    assert isinstance(report, wire.ClientsReport), report
    return report


def test_a_kick_ends_all_connections_of_a_name_but_the_one_that_asks(keyed: Keyed) -> None:
    with (
        keyed.dealer("paul") as paul,
        keyed.dealer("paul") as twin,
        keyed.dealer("olga") as olga,
        keyed.dealer("ada") as ada,
        keyed.dealer("ada") as other,
    ):
        peers = {"paul": paul, "twin": twin, "olga": olga, "ada": ada, "other": other}
        assert [whoami(peer).role for peer in peers.values()] == ["predict", "predict", "observe", "admin", "admin"]
        ends = {name: peer.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED) for name, peer in peers.items()}
        assert ask(ada, wire.Kick(v=V, id=1, client="paul")) == wire.KickReport(v=V, id=1, connections=2)
        assert ends["paul"].poll(60_000)
        assert ends["twin"].poll(60_000)
        assert ask(ada, wire.Kick(v=V, id=2, client="ada")) == wire.KickReport(v=V, id=2, connections=1)
        assert ends["other"].poll(60_000)
        assert whoami(olga).name == "olga"
        assert not ends["olga"].poll(0)
        assert not ends["ada"].poll(0)
        assert whoami(paul).name == "paul"  # it has come again by itself
        unknown = ask(ada, wire.Kick(v=V, id=3, client="nobody"))
        assert isinstance(unknown, wire.ErrorReply)
        assert unknown.code == "NOT_FOUND"
        for peer, end in zip(peers.values(), ends.values(), strict=True):
            peer.socket.disable_monitor()
            end.close(0)


# --- users on ipc:// -----------------------------------------------------------------------------------------

SOMEBODY, SOME_GROUP = 12345, 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")


@contextlib.contextmanager
def being(user: int, group: int, *groups: int) -> Iterator[None]:
    """Be another user in between, as far as the kernel tells the other end of a connection."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def role_on(endpoint: str) -> str:
    """Role of this user on ipc://; "": it is not let in."""
    with zmtp.Peer(endpoint) as peer:
        try:
            peer.greet()
        except ConnectionError:
            return ""
        peer.write(zmtp.message(wire.encode(wire.WhoAmI(v=V, id=1))))
        (header,) = peer.read_message()
    found = wire.decode_reply(header, wire.Limits())
    assert isinstance(found, wire.Identity)
    return found.role


@needs_root
def test_users_on_ipc_have_roles(keyed: Keyed) -> None:
    """The daemon's user and group are root's here."""
    path = Path(keyed.local.removeprefix("ipc://"))
    assert role_on(keyed.local) == "admin"
    os.chown(path, 0, SOME_GROUP)
    path.chmod(0o770)
    with being(SOMEBODY, SOME_GROUP):
        assert role_on(keyed.local) == "predict"
    with being(SOMEBODY, 4711), pytest.raises(PermissionError):
        role_on(keyed.local)
    path.chmod(0o777)  # now its permissions say nothing
    with being(SOMEBODY, SOME_GROUP):
        assert role_on(keyed.local) == ""
    with being(SOMEBODY, 0):
        assert role_on(keyed.local) == "predict"
    with being(SOMEBODY, SOME_GROUP, 4711, 0):
        assert role_on(keyed.local) == "predict"
    with being(SOMEBODY, SOME_GROUP, 4711):
        assert role_on(keyed.local) == ""
    assert role_on(keyed.local) == "admin"
