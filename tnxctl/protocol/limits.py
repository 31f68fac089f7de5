"""Limits of a message and of its values, and the names that models and versions may have. No I/O, no numpy."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from tnxctl.protocol.errors import InvalidArgument

MIB: Final = 1 << 20  # bytes
VERSION: Final = 1
DEFAULT_PORT = 5555
MAX_ID = 2**63 - 1
MAX_DIM = 2**63 - 1
MAX_RANK = 64  # of numpy
MAX_DEADLINE_US = 24 * 3600 * 1e6
MAX_CLOCK_US = 1e16  # three hundred years
DEFAULT_PRIORITY = 1
LOWEST_PRIORITY = 3
MAX_WEIGHT = 1e9
MAX_TENSORS = 1024
MAX_RECORDING_S = 24 * 3600.0

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Pattern of the name of a model: the name of a folder, too, on every system, and never one with an "@"."""

MODEL_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
"""Pattern of the name of a version."""

_GRAMMAR = "a name of up to 64 letters, digits, '.', '_' and '-', a letter or digit first, and a whole number from 1"

MESSAGE_BYTES = 256 * MIB
"""Most bytes of all tensors of a message, unless limits say otherwise."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one message. Checked before anything is allocated for it.

    Attributes:
        header_bytes: length of the msgpack header.
        tensors: tensor frames in one message.
        rank: axes of one tensor.
        message_bytes: all tensor frames together; also the most that one frame may have.
        strings: elements of all BYTES tensors together. Each takes some 0.2 µs to read, and memory of its own.
    """

    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 64 * 1024
    tensors: Annotated[int, msgspec.Meta(ge=1, le=MAX_TENSORS)] = 64
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 16
    message_bytes: Annotated[int, msgspec.Meta(ge=1024)] = MESSAGE_BYTES
    strings: Annotated[int, msgspec.Meta(ge=1)] = 65_536


def split_title(title: str) -> tuple[str, str]:
    """NAME and VERSION of NAME@VERSION, or NAME and "" of a name alone. Raises InvalidArgument."""
    name, at, version = title.partition("@")
    if not MODEL_NAME.fullmatch(name) or (at and not MODEL_VERSION.fullmatch(version)):
        raise InvalidArgument(f"{excerpt(title)} is not a model: NAME or NAME@VERSION, {_GRAMMAR}")
    return name, version


def check_name(name: str) -> None:
    """Check that this is NAME, without a version. Raises InvalidArgument."""
    if split_title(name)[1]:
        raise InvalidArgument(f"model {excerpt(name)}: expected the name alone, without a version")


def check_version(version: str) -> None:
    """Check that this is VERSION. Raises InvalidArgument."""
    if not MODEL_VERSION.fullmatch(version):
        raise InvalidArgument(f"{excerpt(version)} is not a version: a whole number from 1")


def excerpt(value: object, length: int = 60) -> str:
    """A value as error sentences show it: on one line, and no longer than that."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
