"""Raw contents of ModelInfer's messages, taken out and put in beside protobuf.

They are nearly all of a message with large tensors. Protobuf would copy them twice in each direction; here an input
is a view of what came, and an output is copied once. What is left for protobuf is small, and is bounded by that: of
many tiny fields it makes objects that take many times their memory.

https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections.abc import Iterable

from tnxctl.protocol.errors import InvalidArgument

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}

MOST_FIELDS = 8192
"""Most fields of a message, not counting those within others: 1024 inputs, outputs and parameters have room."""


def split(message: bytes, field: int) -> tuple[bytes, list[memoryview]]:
    """A message without a field of bytes, and the values of that field, which are views of the message.

    Raises:
        InvalidArgument: it is no message, or has more than `MOST_FIELDS`.
    """
    view = memoryview(message)
    tag = field << 3 | _BYTES
    kept: list[memoryview] = []
    values: list[memoryview] = []
    at = since = count = 0
    try:
        while at < len(message):
            count += 1
            if count > MOST_FIELDS:
                raise InvalidArgument(f"the message has more than {MOST_FIELDS} fields")
            begin = at
            found, at = _varint(message, at)
            kind = found & 7
            if kind == _BYTES:
                length, at = _varint(message, at)
                end = at + length
            elif kind == _VARINT:
                end = _varint(message, at)[1]
            else:
                end = at + _FIXED[kind]
            if end > len(message):
                raise IndexError
            if found == tag:
                kept.append(view[since:begin])
                values.append(view[at:end])
                since = end
            at = end
    except (IndexError, KeyError):
        raise InvalidArgument(f"the message is damaged at byte {at}") from None
    if not values:
        return message, values
    return b"".join([*kept, view[since:]]), values


def joined(message: bytes, field: int, values: Iterable[memoryview]) -> bytes:
    """A message with a field of bytes added, once for each value."""
    tag = _encoded(field << 3 | _BYTES)
    parts: list[bytes | memoryview] = [message]
    for value in values:
        parts += (tag + _encoded(len(value)), value)
    return b"".join(parts)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of variable length, and where it ends. Raises IndexError: the message ends before, or it is too long."""
    byte = message[at]
    if byte < 0x80:
        return byte, at + 1
    number, shift = byte & 0x7F, 7
    while shift < 64:
        at += 1
        byte = message[at]
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at + 1
        shift += 7
    raise IndexError


def _encoded(number: int) -> bytes:
    parts = bytearray()
    while number >= 0x80:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
