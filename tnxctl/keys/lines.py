"""Keys in one line: what people hand over, and what a file with a secret holds.

    tnx-client alice rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7   public, for `tnxctl keys allow`
    tnx-server gpu-box Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID   public, for `tnxctl keys trust`
    tnx-secret alice D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs   in a file that its owner alone can read

A key is 32 bytes, spelt as 40 characters of Z85 (https://rfc.zeromq.org/spec/32/). A line has a first word of its own
for each kind, so none is taken for another.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

from tnxctl.protocol.errors import InvalidArgument

CLIENT, SERVER, SECRET = "tnx-client", "tnx-server", "tnx-secret"

_PURPOSES = {
    CLIENT: "the line that tnxctl keys new prints",
    SERVER: "the line that tnxctl keys server prints",
    SECRET: "the secret of a pair",
}

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._@-]{0,63}")
_KEY_CHARACTERS = 40
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]*")


class NamedKey(NamedTuple):
    """A key in Z85, and the name of whose it is."""

    name: str
    key: str


def spell(kind: str, name: str, key: str) -> str:
    """The line of a key, without an end of line."""
    return f"{kind} {name} {key}"


def parse(line: str, kind: str, label: str) -> NamedKey:
    """The key in a line.

    Args:
        kind: `CLIENT`, `SERVER` or `SECRET`.
        label: what to call the line in errors, which repeat nothing that may be a secret.

    Raises:
        InvalidArgument: it is another kind of line, or its name or its key is none.
    """
    words = line.split()
    if len(words) != 3 or words[0] != kind:
        found = f", not {_PURPOSES[words[0]]}" if words and words[0] in _PURPOSES and words[0] != kind else ""
        raise InvalidArgument(f"{label}: expected {_PURPOSES[kind]}: {kind} NAME KEY, with its key in one word{found}")
    check_name(words[1], label)
    decode(words[2], label)
    return NamedKey(words[1], words[2])


def check_name(name: str, label: str) -> None:
    """Check the name of a key: it goes into names of files, logs and addresses' place.

    Raises:
        InvalidArgument: it is none.
    """
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{label}: {name!r} is not a name: a letter, then up to 63 letters, digits and . _ @ -")


def decode(key: str, label: str) -> bytes:
    """The 32 bytes of a key in Z85.

    Raises:
        InvalidArgument: it is no such key. Its text is not in the sentence: it may be a secret.
    """
    from zmq.utils import z85

    if len(key) != _KEY_CHARACTERS:
        raise InvalidArgument(f"{label}: a key has {_KEY_CHARACTERS} characters of Z85, not {len(key)}")
    try:
        if _Z85.fullmatch(key):
            return z85.decode(key)
    except struct.error:  # five characters that stand for more than four bytes
        pass
    raise InvalidArgument(f"{label}: not a key: it has characters that Z85 does not have, or not in this order")
