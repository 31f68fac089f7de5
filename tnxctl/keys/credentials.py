"""Credentials: what a client needs to connect by CURVE."""

from __future__ import annotations

from typing import NamedTuple


class Credentials(NamedTuple):
    """Credentials of a client with one daemon.

    Attributes:
        name: of the client's pair. public, secret: the pair, in Z85.
        server: public key that the daemon must have, in Z85.
        origin: where that key is from, for errors.
    """

    name: str
    public: str
    secret: str
    server: str
    origin: str

    def __repr__(self) -> str:
        return f"<Credentials of {self.name}, {self.public}>"  # logs and tracebacks show no secret
