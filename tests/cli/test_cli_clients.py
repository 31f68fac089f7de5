"""`tnxctl whoami` and `tnxctl clients`, against a daemon that only pretends."""

from __future__ import annotations

import json

import msgspec

from fake_daemon import ALICE, IDENTITY, KEY, FakeDaemon
from tnxctl.cli import exits
from tool import ask


def test_whoami_shows_name_role_and_limits() -> None:
    with FakeDaemon() as fake:
        lines = ask(fake, "whoami").stdout.splitlines()
    assert lines == [
        "alice, known by its key, at 10.0.0.7",
        "role         predict: may run models, and see health and models",
        "connections  3",
        "in flight    at most 256 requests, and 64.0 MiB of inputs",
        "rate         at most 500 requests a second",
        "share        2 times the turns of others",
    ]


def test_whoami_of_a_daemon_that_asks_for_no_key() -> None:
    plain = msgspec.structs.replace(IDENTITY, name="127.0.0.1", by="address", role="admin", rate=0.0, share=1.0)
    with FakeDaemon(identity=plain) as fake:
        shown = ask(fake, "whoami").stdout
        document = json.loads(ask(fake, "whoami", "--json").stdout)
    assert shown.startswith("127.0.0.1, known by its address, at 10.0.0.7\nrole         admin: may run models")
    assert "no limit" in shown
    assert "share" not in shown
    assert document == {
        "endpoint": fake.endpoint,
        "name": "127.0.0.1",
        "by": "address",
        "role": "admin",
        "address": "10.0.0.7",
        "connections": 3,
        "max_requests": 256,
        "max_mb": 64.0,
        "rate": 0.0,
        "share": 1.0,
    }


def test_clients_are_a_table_and_a_document() -> None:
    with FakeDaemon(more_clients=7) as fake:
        header, first, second, more = ask(fake, "clients").stdout.splitlines()
        document = json.loads(ask(fake, "clients", "--json").stdout)
    assert " ".join(header.split()) == "NAME ROLE ADDRESS CONNECTIONS FOR REQUESTS IN FLIGHT RECEIVED"
    assert " ".join(first.split()) == "alice predict 10.0.0.7, 10.0.0.8 3 2 h 5 min 1200 4 3.0 MiB"
    assert " ".join(second.split()) == "10.0.0.9 - - 1 0 ms 0 0 -"
    assert more == "and 7 more with fewer requests"
    assert document["clients"][0] == msgspec.json.decode(msgspec.json.encode(ALICE))
    assert document["total"] == 9


def test_kick_tells_how_many_connections_were_ended() -> None:
    with FakeDaemon() as fake:
        assert ask(fake, "clients", "kick", "alice").stdout == "alice: 3 connections ended\n"
        assert ask(fake, "clients", "kick", "10.0.0.9").stdout == "10.0.0.9: 1 connection ended\n"
        document = json.loads(ask(fake, "clients", "kick", "alice", "--json").stdout)
        unknown = ask(fake, "clients", "kick", "bob")
    assert document == {"endpoint": fake.endpoint, "client": "alice", "connections": 3}
    assert unknown.exit_code == exits.Exit.REFUSED
    assert "'bob'" in unknown.stderr


def test_keys_that_a_daemon_lets_in_are_a_table_and_a_document() -> None:
    with FakeDaemon(more_keys=2) as fake, FakeDaemon(keys=()) as empty:
        title, header, row, gap, more = ask(fake, "keys", "list").stdout.splitlines()
        document = json.loads(ask(fake, "keys", "list", "--json").stdout)
        none = ask(empty, "keys", "list").stdout
    assert title == f"Let in by {fake.endpoint}"
    assert " ".join(header.split()) == "NAME ROLE CONNECTIONS PUBLIC KEY"
    assert " ".join(row.split()) == f"alice predict 3 {KEY.key}"
    assert (gap, more) == ("", "and 2 more")
    assert (document["total"], document["keys"][0]["name"]) == (3, "alice")
    assert none == "It lets nobody in by a key.\n"


def test_what_a_daemon_says_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2Jgone\r\n\u202e"
    identity = msgspec.structs.replace(IDENTITY, name=evil, by=evil, role=evil, address=evil)
    client = msgspec.structs.replace(ALICE, name=evil, role=evil, addresses=(evil,))
    key = msgspec.structs.replace(KEY, name=evil, role=evil, key=evil)
    with FakeDaemon(identity=identity, clients=(client,), keys=(key,)) as fake:
        for verb in (("whoami",), ("clients",), ("clients", "kick", evil), ("keys", "list")):
            shown = ask(fake, *verb).output
            assert "gone" in shown, verb
            assert not {"\x1b", "\r", "\u202e"} & set(shown), verb
