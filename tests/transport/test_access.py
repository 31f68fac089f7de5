"""Access control: roles by address, user, group and key, under every setting of remote_control."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tnxctl.keys import pairs
from tnxctl.protocol.wire import Role
from tnxd.transport.access import Access
from tnxd.transport.key_ring import KeyRing

LOOPBACK, STRANGER = "127.0.0.1", "192.0.2.7"
ROOT, OWN = "localhost:0:0:77", f"localhost:{os.geteuid()}:{os.getegid()}:77"
OTHER, MEMBER = "localhost:4711:4711:77", f"localhost:4711:{os.getegid()}:77"


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    """Keys of the roles that they are named by."""
    tables = (
        f'[keys.{role}]\nkey = "{pairs.new(role).public}"\nrole = "{role}"\n'
        for role in ("observe", "predict", "admin")
    )
    (tmp_path / "keys.toml").write_text("\n".join(tables))
    return KeyRing(tmp_path / "keys.toml")


@pytest.mark.parametrize(
    ("control", "loopback", "stranger", "root"),
    [
        ("local", Role.ADMIN, Role.PREDICT, Role.ADMIN),
        ("any", Role.ADMIN, Role.ADMIN, Role.ADMIN),
        ("off", Role.PREDICT, Role.PREDICT, Role.PREDICT),
    ],
)
def test_roles_without_keys(control: str, loopback: Role, stranger: Role, root: Role) -> None:
    access = Access(None, control)
    assert access.role(LOOPBACK, "") == access.role("::1", "") == loopback
    assert access.role(STRANGER, "") == access.role("", "") == stranger
    assert access.role(ROOT, "") == access.role(OWN, "") == root
    assert access.role(LOOPBACK, "a key that nobody asked for") is None
    assert access.refusal(STRANGER, "") == ""


@pytest.mark.parametrize(("control", "admin"), [("local", Role.ADMIN), ("any", Role.ADMIN), ("off", Role.PREDICT)])
def test_roles_with_keys(ring: KeyRing, control: str, admin: Role) -> None:
    access = Access(ring, control)
    roles = {entry.name: access.role(STRANGER, key) for key, entry in ring.by_key.items()}
    assert roles == {"observe": Role.OBSERVE, "predict": Role.PREDICT, "admin": admin}
    for address in (LOOPBACK, STRANGER, ""):
        assert access.role(address, "") is None
        assert access.refusal(address, "") == "it shows no key"
    unknown = pairs.new("unknown").public
    assert access.role(LOOPBACK, unknown) is None
    assert access.refusal(LOOPBACK, unknown) == "its key is not authorized"
    assert access.role(ROOT, "") == admin


def test_members_of_the_group_are_known_while_they_are_connected() -> None:
    access = Access()
    for address, groups in ((OTHER, (9, os.getegid())), (MEMBER, ())):
        assert access.role(address, "") is None
        assert "its user 4711 is neither root" in access.refusal(address, "")
        access.joined(address, groups, True)
        access.joined(address, groups, True)
        assert access.role(address, "") == Role.PREDICT
        access.left(address)
        assert access.refusal(address, "") == ""
        access.left(address)
        assert access.role(address, "") is None
        access.left(address)
    access.joined(OTHER, (9, 10), True)
    assert access.role(OTHER, "") is None
    access.joined(OTHER, (9, 10), False)  # by a path that lets in its own group alone
    assert access.role(OTHER, "") == Role.PREDICT


def test_what_keeps_a_peer_from_a_role_is_named() -> None:
    assert Access(None, "off").limit(Role.ADMIN, LOOPBACK) == 'remote_control is "off"'
    assert Access(None, "local").limit(Role.ADMIN, STRANGER) == 'remote_control is "local"'
    assert Access(None, "local").limit(Role.ADMIN, OTHER) == ""
    assert Access(None, "local").limit(Role.PREDICT, STRANGER) == ""
