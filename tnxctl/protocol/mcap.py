"""Records of MCAP files (https://mcap.dev/spec), as bytes and back. No compression, no index, no I/O of its own.

The package `mcap` does far more, at a price: it copies the data of each message twice under the GIL, which the serving
loop needs (64 KiB: 9 µs of user time, where to lay out the head takes 1), and allocates what a file claims to hold.
What is written here it reads, and so do other tools for such files. Files that those have put into chunks can be read
here if the chunks are not compressed.

A file that was cut off is good up to its last whole record.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.limits import excerpt

MAGIC = b"\x89MCAP0\r\n"

_HEADER, _FOOTER, _CHANNEL, _MESSAGE, _CHUNK, _METADATA, _DATA_END = 0x01, 0x02, 0x04, 0x05, 0x06, 0x0C, 0x0F

_RECORD = struct.Struct("<BQ")  # kind, length of what follows
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_MESSAGE_FIELDS = struct.Struct("<HIQQ")  # channel, sequence, time of the log, time of publication
_MESSAGE_HEAD = struct.Struct("<BQHIQQ")
_SMALL_BYTES = 1 << 20
"""Most bytes of a record that describes others."""

HEAD_BYTES = _MESSAGE_HEAD.size
"""Bytes of a message's record before its data."""


@dataclass(frozen=True)
class Channel:
    """Description of the messages of one kind."""

    number: int
    topic: str
    encoding: str
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Message:
    """One message. Attributes: channel: its number. time_ns: when it was logged, in nanoseconds since 1970."""

    channel: int
    time_ns: int
    data: bytes


@dataclass(frozen=True)
class Metadata:
    """Fields under a name, about the whole file or what follows."""

    name: str
    fields: Mapping[str, str]


def beginning(profile: str, library: str) -> bytes:
    """The first bytes of a file. Args: library: the program that writes it."""
    return MAGIC + _record(_HEADER, _text(profile) + _text(library))


def channel(number: int, topic: str, encoding: str, metadata: Mapping[str, str]) -> bytes:
    """Record of a channel, which comes before its messages."""
    no_schema = 0
    return _record(_CHANNEL, _U16.pack(number) + _U16.pack(no_schema) + _text(topic) + _text(encoding) + _map(metadata))


def message_head(channel: int, sequence: int, time_ns: int, nbytes: int) -> bytes:
    """Beginning of the record of a message; so many bytes of data follow."""
    return _MESSAGE_HEAD.pack(_MESSAGE, _MESSAGE_FIELDS.size + nbytes, channel, sequence & 0xFFFFFFFF, time_ns, time_ns)


def metadata(name: str, fields: Mapping[str, str]) -> bytes:
    """Record of fields under a name."""
    return _record(_METADATA, _text(name) + _map(fields))


def end() -> bytes:
    """The last bytes of a file: without a summary, and without checksums."""
    return _record(_DATA_END, bytes(4)) + _record(_FOOTER, bytes(20)) + MAGIC


def records(file: BinaryIO, most_bytes: int) -> Iterator[Channel | Message | Metadata]:
    """Records of a file, up to its end or where it was cut off.

    Args:
        file: open for reading. One that still grows is read as far as it goes now.
        most_bytes: of one message.

    Raises:
        InvalidArgument: it is no such file, or not from here on; the sentence says where and why.
    """
    size = file.seek(0, 2)
    file.seek(0)
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise InvalidArgument(
            "it is no recording: it begins with " + repr(magic) if magic else "it is no recording, but empty"
        )
    at = len(MAGIC)
    while True:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            raise CutOff(at)
        kind, length = _RECORD.unpack(head)
        if kind == _FOOTER:
            return
        if length > size - at - _RECORD.size:  # before anything is allocated for it
            raise CutOff(at)
        if kind in _READERS or kind == _CHUNK:
            most = most_bytes + HEAD_BYTES if kind in (_MESSAGE, _CHUNK) else _SMALL_BYTES
            if length > most:
                raise InvalidArgument(f"at byte {at}, a record claims {length} bytes, more than the limit of {most}")
            body = file.read(length)
            if len(body) < length:
                raise CutOff(at)
            yield from _chunk(body, at) if kind == _CHUNK else [_read(kind, body, at)]
        else:
            file.seek(length, 1)
        at += _RECORD.size + length


class CutOff(InvalidArgument):
    """A file that ends within a record. Attributes: whole_bytes: up to the end of the last one."""

    def __init__(self, whole_bytes: int) -> None:
        super().__init__(f"it was cut off: the last whole record ends at byte {whole_bytes}")
        self.whole_bytes = whole_bytes


def _chunk(body: bytes, at: int) -> Iterator[Channel | Message | Metadata]:
    """Records of a chunk, which begins with two times, its size and a checksum."""
    compression = ""
    try:
        compression, begin = _take_text(body, 28)
        (size,) = _U64.unpack_from(body, begin)
        begin += _U64.size
        if compression or size != len(body) - begin:
            raise ValueError
        while begin < len(body):
            kind, length = _RECORD.unpack_from(body, begin)
            begin += _RECORD.size
            if length > len(body) - begin:
                raise ValueError
            if kind in _READERS:
                yield _read(kind, body[begin : begin + length], at)
            begin += length
    except (struct.error, ValueError):
        why = (
            f"compressed ({excerpt(compression)}): mcap decompress makes one that is not" if compression else "damaged"
        )
        raise InvalidArgument(f"at byte {at}, a chunk is {why}") from None


def _read(kind: int, body: bytes, at: int) -> Channel | Message | Metadata:
    try:
        return _READERS[kind](body)
    except (struct.error, ValueError):
        raise InvalidArgument(f"at byte {at}, a record is damaged") from None


def _read_channel(body: bytes) -> Channel:
    (number,) = _U16.unpack_from(body)
    topic, at = _take_text(body, 4)
    encoding, at = _take_text(body, at)
    fields, _ = _take_map(body, at)
    return Channel(number, topic, encoding, fields)


def _read_message(body: bytes) -> Message:
    channel, _, time_ns, _ = _MESSAGE_FIELDS.unpack_from(body)
    return Message(channel, time_ns, body[_MESSAGE_FIELDS.size :])


def _read_metadata(body: bytes) -> Metadata:
    name, at = _take_text(body, 0)
    fields, _ = _take_map(body, at)
    return Metadata(name, fields)


_READERS: dict[int, Callable[[bytes], Channel | Message | Metadata]] = {
    _CHANNEL: _read_channel,
    _MESSAGE: _read_message,
    _METADATA: _read_metadata,
}


def _record(kind: int, body: bytes) -> bytes:
    return _RECORD.pack(kind, len(body)) + body


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    return _U32.pack(len(data)) + data


def _map(fields: Mapping[str, str]) -> bytes:
    body = b"".join(_text(key) + _text(value) for key, value in fields.items())
    return _U32.pack(len(body)) + body


def _take_text(body: bytes, at: int) -> tuple[str, int]:
    """A text, and where it ends. Raises ValueError or struct.error: there is none."""
    (length,) = _U32.unpack_from(body, at)
    at += _U32.size
    if length > len(body) - at:
        raise ValueError
    return body[at : at + length].decode(), at + length


def _take_map(body: bytes, at: int) -> tuple[dict[str, str], int]:
    (length,) = _U32.unpack_from(body, at)
    at += _U32.size
    until = at + length
    if until > len(body):
        raise ValueError
    fields = {}
    while at < until:
        key, at = _take_text(body, at)
        fields[key], at = _take_text(body, at)
    return fields, at
