"""Key ring: the keys that may connect, as the file of authorized keys said when it was read last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tnxctl.keys import authorized
from tnxctl.protocol.roles import Role


@dataclass(frozen=True, slots=True)
class AuthorizedKey:
    """One key that may connect.

    Attributes:
        name: of the client that has it. key: the public key, in Z85. role: of its connections.
        max_requests, max_bytes, rate: limits of its own; None: those of all clients.
        share: of its turns, relative to those of others.
    """

    name: str
    key: str
    role: Role
    max_requests: int | None = None
    max_bytes: int | None = None
    rate: float | None = None
    share: float = 1.0


class KeyRing:
    """Keys of one file.

    Args:
        path: of the file, see `tnxctl.keys.authorized`.

    Attributes:
        by_key: entries by public key, in the order of the file.

    Raises:
        InvalidArgument: the file cannot be read, or has a mistake; the sentence names its line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.by_key: dict[str, AuthorizedKey] = {}
        self.reload()

    def reload(self) -> None:
        """Read the file again. One with a mistake changes nothing. Raises as `KeyRing` does."""
        found = authorized.read(self.path).values()
        self.by_key = {
            entry.key: AuthorizedKey(
                entry.name,
                entry.key,
                Role[entry.role.upper()],
                entry.max_requests,
                entry.max_bytes,
                entry.rate,
                entry.share,
            )
            for entry in found
        }
