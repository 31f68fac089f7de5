"""Roles of peers, and the least role that each verb asks for. `docs/protocol.md` has the table in words."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from tnxctl.protocol.requests import (
    Cancel,
    Clients,
    Compare,
    Explain,
    Health,
    Keys,
    Kick,
    Load,
    Metadata,
    Models,
    Predict,
    PredictShared,
    Record,
    Recording,
    Reload,
    Request,
    Route,
    Share,
    Stats,
    StopRecording,
    Unload,
    WhoAmI,
)


class Role(enum.IntEnum):
    """Role of a peer. Each may do all that those before it may."""

    OBSERVE = 0
    PREDICT = 1
    ADMIN = 2

    @property
    def title(self) -> str:
        """Name of the role, as files and reports have it."""
        return self.name.lower()


LEAST_ROLES: Mapping[type[Request], Role] = {
    WhoAmI: Role.OBSERVE,
    Health: Role.OBSERVE,
    Metadata: Role.OBSERVE,
    Models: Role.OBSERVE,
    Compare: Role.OBSERVE,
    Stats: Role.OBSERVE,
    Explain: Role.OBSERVE,
    Cancel: Role.OBSERVE,  # it withdraws nobody's request but one's own
    Predict: Role.PREDICT,
    PredictShared: Role.PREDICT,
    Share: Role.PREDICT,
    Load: Role.ADMIN,
    Unload: Role.ADMIN,
    Route: Role.ADMIN,
    Reload: Role.ADMIN,
    Clients: Role.ADMIN,
    Kick: Role.ADMIN,
    Keys: Role.ADMIN,
    Record: Role.ADMIN,
    StopRecording: Role.ADMIN,
    Recording: Role.ADMIN,
}
"""Least role for each verb: the one table that says what a role may do. A verb without an entry is nobody's."""

ORDERS = (Load, Unload, Route, Reload, Kick, Record, StopRecording)
"""Verbs that change what others get, or keep what they sent: the log tells of each."""


def verb_name(verb: type[Request]) -> str:
    """Name of a verb, as the wire has it."""
    return str(verb.__struct_config__.tag)
