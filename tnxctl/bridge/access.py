"""Access: what a request may ask for, by the bearer token that it shows. The roles are those of the daemon's keys."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from pathlib import Path

from tnxctl.keys import tokens
from tnxctl.keys.tokens import Token
from tnxctl.protocol import wire
from tnxctl.protocol.errors import PermissionDenied, Unauthenticated
from tnxctl.protocol.roles import LEAST_ROLES, ORDERS, Role, verb_name

audit = logging.getLogger("tnxctl.bridge.audit")

_SCHEME = "bearer "
_MOST_CHARACTERS = 1024  # of a token


class Access:
    """The tokens of a bridge.

    Args:
        path: of the file with tokens; None: there are none, and everybody has the same role.
        default: that role.

    Raises:
        InvalidArgument: the file cannot be read, is not its owner's alone to change, or has a mistake.
    """

    def __init__(self, path: Path | None, default: Role) -> None:
        self._path = path
        self._default = default
        self._tokens: Mapping[str, Token] = {} if path is None else tokens.read(path)

    def reload(self) -> None:
        """Read the file again. Raises InvalidArgument: it has a mistake, and all stays as it was."""
        if self._path is not None:
            self._tokens = tokens.read(self._path)

    def admit(self, authorization: str, verb: type[wire.Request] | None, address: str, about: str = "") -> str:
        """Check that a request may ask for something, as `check` does. An order that it may give goes to the log.

        Args:
            about: the model that an order is about.
        """
        name = self.check(authorization, verb, address)
        if verb in ORDERS:
            who = name if name == address else f"{name} at {address}"
            audit.info("%s: %s %r", who, verb_name(verb), about[:100])
        return name

    def check(self, authorization: str, verb: type[wire.Request] | None, address: str) -> str:
        """Check that a request may ask for something.

        Args:
            authorization: value of the header of that name: "Bearer TOKEN"; "" without one.
            verb: what it asks of the daemon; None: nothing that anybody may not know.
            address: where it comes from.

        Returns:
            Who asks: the name of the token, or the address where there are none.

        Raises:
            Unauthenticated: there is no token, or one that is not known.
            PermissionDenied: its role does not do.
        """
        if verb is None:
            return address
        least = LEAST_ROLES.get(verb)
        if self._path is None:
            name, role = address, self._default
        else:
            token = self._find(authorization)
            name, role = token.name, Role[token.role.upper()]
        if least is None or role < least:
            wanted = least.title if least else "nobody"
            hint = "; --tokens gives the role to some" if self._path is None else ""
            raise PermissionDenied(f"{verb_name(verb)} is for the role {wanted}, and {name} has {role.title}{hint}")
        return name

    def _find(self, authorization: str) -> Token:
        if not authorization:
            raise Unauthenticated("a token is asked for here: Authorization: Bearer TOKEN")
        if authorization[: len(_SCHEME)].lower() != _SCHEME or len(authorization) > _MOST_CHARACTERS:
            raise Unauthenticated("expected the header Authorization: Bearer TOKEN")
        sha256 = tokens.digest(authorization[len(_SCHEME) :].strip())
        found = self._tokens.get(sha256)
        if found is None or not hmac.compare_digest(found.sha256, sha256):
            raise Unauthenticated("this token is not known")
        return found
