"""TLS of the bridge: a certificate and its key, read so that a mistake in them is a sentence."""

from __future__ import annotations

import ssl
from pathlib import Path

from tnxctl.protocol.errors import InvalidArgument


def context(certfile: str, keyfile: str) -> ssl.SSLContext:
    """A context of a server, of TLS 1.2 or newer.

    Raises:
        InvalidArgument: a file cannot be read or holds something else, or the key is encrypted or another's.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    load(made, certfile, keyfile)
    return made


def load(context: ssl.SSLContext, certfile: str, keyfile: str) -> None:
    """Read the files: connections from now on use them.

    One in use wants files that `context` took: after a mistake it has one of the two files, and can serve nobody.

    Raises:
        InvalidArgument: as `context`.
    """
    for path in (certfile, keyfile):
        try:
            with Path(path).open("rb") as file:
                file.read(1)
        except OSError as error:
            raise InvalidArgument(f"{path}: {error.strerror}") from None
    try:
        context.load_cert_chain(certfile, keyfile, password=_refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key is not that of the certificate"
        else:
            why = f"not a certificate and its key in PEM, without a password: {error.reason or error}"
        raise InvalidArgument(f"{certfile}, {keyfile}: {why}") from None
    except _Encrypted:
        raise InvalidArgument(f"{keyfile}: the key is encrypted, and nobody is here to type a password") from None


class _Encrypted(Exception):
    """The key asks for a password."""


def _refuse() -> str:
    raise _Encrypted
