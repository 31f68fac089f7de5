"""Access control: which peers may connect, under what name, and in which role.

A peer is told by its key, where a listener asks for one; by its user on ipc://; else by its address.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from tnxctl.protocol.roles import Role
from tnxd.transport.addresses import identified
from tnxd.transport.key_ring import AuthorizedKey, KeyRing


class Access:
    """Access control of one daemon.

    Args:
        ring: keys that may connect over tcp://; None: no keys are asked for.
        control: which peers without a key are admin: those on this host ("local"), "any", or none, and no key either
            ("off").

    Attributes:
        ring: as given.
    """

    def __init__(self, ring: KeyRing | None = None, control: str = "local") -> None:
        self.ring = ring
        self._control = control
        self._highest = Role.PREDICT if control == "off" else Role.ADMIN
        self._own_users = {0, os.geteuid()}
        self._own_group = os.getegid()
        self._members: dict[str, int] = {}  # connections by address on ipc://, of members of the group

    # --- peers on ipc:// ---------------------------------------------------------------------------------------

    def joined(self, address: str, groups: Iterable[int], is_open: bool) -> None:
        """Note a connection on ipc://, and whether a member of the group made it.

        The kernel tells the groups by the connection alone: in the user namespace of a service all other users look
        like nobody. A path that is closed to others has let in none but members of its own group.

        Args:
            groups: of the process at the other end. is_open: whether everybody may connect to the path.
        """
        if not is_open or self._own_group in groups or self._own_group == _credentials(address)[1]:
            self._members[address] = self._members.get(address, 0) + 1

    def left(self, address: str) -> None:
        """Note the end of a connection on ipc://."""
        if address in self._members:
            self._members[address] -= 1
            if not self._members[address]:
                del self._members[address]

    # --- who may do what ---------------------------------------------------------------------------------------

    def authorized(self, key: str) -> AuthorizedKey | None:
        """Entry of a public key; None if it may not connect."""
        return None if self.ring is None else self.ring.by_key.get(key)

    def refusal(self, address: str, key: str) -> str:
        """Reason why a peer may not connect; "" if it may. Args: key: "" if its listener asks for none."""
        if self.role(address, key) is not None:
            return ""
        if key:
            return "its key is not authorized"
        if is_ipc(address):
            return (
                f"its user {_credentials(address)[0]} is neither root nor the daemon's, nor in its group, and the path "
                "is open to all"
            )
        return "it shows no key"

    def role(self, address: str, key: str) -> Role | None:
        """Role of a peer; None if it may not be here, or not any more."""
        if key:
            entry = self.authorized(key)
            return None if entry is None else min(entry.role, self._highest)
        if is_ipc(address):
            if _credentials(address)[0] in self._own_users:
                return self._highest
            return Role.PREDICT if address in self._members else None
        if self.ring is not None:
            return None
        if self._control == "any" or (self._control == "local" and identified(address)[1]):
            return Role.ADMIN
        return Role.PREDICT

    def limit(self, role: Role, address: str) -> str:
        """Words for the setting that keeps a peer without a key from a role; "" if there is none."""
        if role <= Role.PREDICT:
            return ""
        if self._control == "off":
            return 'remote_control is "off"'
        return 'remote_control is "local"' if self.ring is None and not is_ipc(address) else ""


def is_ipc(address: str) -> bool:
    """Whether an address, as ZeroMQ writes it, is of a peer on ipc://."""
    return address.startswith("localhost:")


def _credentials(address: str) -> tuple[int, int]:
    """User and group of the process at the other end, from `localhost:UID:GID:PID`."""
    _, user, group, _ = address.split(":")
    return int(user), int(group)
