"""Pairs of keys, one file each: the secret in one line, from which the public key follows."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tnxctl.files import writing
from tnxctl.keys import guards, lines
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument


class Pair(NamedTuple):
    """A pair of keys in Z85, and the name of whose it is."""

    name: str
    public: str
    secret: str

    def __repr__(self) -> str:
        return f"<Pair of {self.name}, {self.public}>"  # logs and tracebacks show no secret


def new(name: str) -> Pair:
    """A new pair.

    Raises:
        InvalidArgument: the name is none, see `tnxctl.keys.lines`.
        FailedPrecondition: the ZeroMQ library here has no CURVE.
    """
    lines.check_name(name, "name")
    public, secret = _zmq_with_curve().curve_keypair()
    return Pair(name, public.decode(), secret.decode())


def write(path: Path, pair: Pair) -> None:
    """Write the secret of a pair to a file that its owner alone can read, whatever the umask.

    Raises:
        FileExistsError: there is a file already. A secret is never replaced: it could not be had again.
        OSError: it cannot be written. Nothing is left of it then.
    """
    comment = f"# TensorNext: the secret of {pair.name}. Whoever has this line is taken for {pair.name}."
    line = lines.spell(lines.SECRET, pair.name, pair.secret)
    writing.write(path, f"{comment}\n{line}\n", 0o600, replace=False)


def read(path: Path) -> Pair:
    """The pair whose secret is in a file.

    Raises:
        InvalidArgument: it cannot be read, belongs to somebody else, can be read by others, or holds no secret.
        FailedPrecondition: the ZeroMQ library here has no CURVE.
    """
    text = guards.read_secret(path)
    found = [
        (number, line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if len(found) != 1:
        what = f"{len(found)} lines that are no comments" if found else "nothing"
        raise InvalidArgument(f"{path}: expected one line, {lines.SECRET} NAME KEY, and found {what}")
    number, line = found[0]
    name, secret = lines.parse(line, lines.SECRET, f"{path}:{number}")
    return Pair(name, _zmq_with_curve().curve_public(secret.encode()).decode(), secret)


def client_line(pair: Pair) -> str:
    """The public line of a client, for the daemon's host."""
    return lines.spell(lines.CLIENT, pair.name, pair.public)


def server_line(pair: Pair) -> str:
    """The public line of a daemon, for its clients."""
    return lines.spell(lines.SERVER, pair.name, pair.public)


def _zmq_with_curve() -> ModuleType:
    import zmq

    if not zmq.has("curve"):
        raise FailedPrecondition("the ZeroMQ library here was built without CURVE: install pyzmq from PyPI")
    return zmq
