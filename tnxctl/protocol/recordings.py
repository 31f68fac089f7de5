"""Recordings of predict requests: what their MCAP files hold. The daemon writes them, `tnxctl replay` reads them.

    metadata "tensornext"   about the recording, first
    metadata "client"       number and name of a client, before its first request
    channel                 one per version: its topic is NAME@VERSION, its encoding `ENCODING`
    message                 one request, logged when the daemon took it up
    metadata "end"          counts, last; a recording that was cut off has none

The data of a message are the number of the client and the length of the header, 4 bytes each, little-endian, the header
as it came, and then each tensor frame after its length in 8 bytes. docs/protocol.md has it, too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from tnxctl.protocol import mcap, wire
from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.limits import MAX_RANK, MAX_RECORDING_S, MAX_TENSORS, MIB, Limits, split_title
from tnxctl.protocol.roles import verb_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Buffer

PROFILE = "tensornext"
ENCODING = "tensornext-predict"
ABOUT, CLIENT, END = "tensornext", "client", "end"

_HEAD = struct.Struct("<II")
_LENGTH = struct.Struct("<Q")

MOST_BYTES = 1 << 31
"""Most bytes of one request: far beyond what a daemon takes by default."""

_LIMITS = Limits(header_bytes=16 * MIB, tensors=MAX_TENSORS, rank=MAX_RANK, message_bytes=MOST_BYTES)

_LONGEST_NS = int(2 * MAX_RECORDING_S * 1e9)
"""Longest time that may lie between the first request and another one: beyond it, a file makes no sense."""


def message(
    channel: int, sequence: int, time_ns: int, client: int, header: Buffer, frames: Sequence[Buffer]
) -> list[Buffer]:
    """Parts of the record of a request, for a gathering write: nothing is copied."""
    sizes = [memoryview(frame).nbytes for frame in frames]
    header_bytes = memoryview(header).nbytes
    nbytes = _HEAD.size + header_bytes + sum(sizes) + _LENGTH.size * len(sizes)
    parts: list[Buffer] = [
        mcap.message_head(channel, sequence, time_ns, nbytes) + _HEAD.pack(client, header_bytes),
        header,
    ]
    for frame, size in zip(frames, sizes, strict=True):
        parts += (_LENGTH.pack(size), frame)
    return parts


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """One request of a recording.

    Attributes:
        offset_ns: when the daemon took it up, from the first one on.
        title: NAME@VERSION that it was for. client: name of its sender; "": not known.
        request: its header. frames: its tensors.
    """

    offset_ns: int
    title: str
    client: str
    request: wire.Predict
    frames: tuple[memoryview, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(frame.nbytes for frame in self.frames)


@dataclass
class RecordingReader:
    """Requests of a recording in the order of the file, when it is iterated over.

    Attributes:
        about, ending: what the file says of itself: at its beginning, and at its end.
        channels: what it says of each version, by NAME@VERSION.
        skipped: messages that are no requests. last_skipped: why the last one is none.
        damage: why the file could not be read to its end; "": it was, or nobody tried.
    """

    file: BinaryIO
    about: Mapping[str, str] = field(default_factory=dict)
    ending: Mapping[str, str] = field(default_factory=dict)
    channels: dict[str, Mapping[str, str]] = field(default_factory=dict)
    skipped: int = 0
    last_skipped: str = ""
    damage: str = ""

    def __iter__(self) -> Iterator[RecordedRequest]:
        """Iterate over the requests. Raises InvalidArgument: the file is no recording at all."""
        titles: dict[int, str] = {}
        clients: dict[int, str] = {}
        first_ns: int | None = None
        read_any = False
        try:
            for record in mcap.records(self.file, MOST_BYTES):
                read_any = True
                if isinstance(record, mcap.Channel):
                    if record.encoding == ENCODING and _is_title(record.topic):
                        titles[record.number] = record.topic
                        self.channels[record.topic] = record.metadata
                elif isinstance(record, mcap.Metadata):
                    self._note(record, clients)
                else:
                    first_ns = record.time_ns if first_ns is None else first_ns
                    try:
                        request = _request(record, record.time_ns - first_ns, titles, clients)
                    except TensorNextError as error:
                        self.skipped += 1
                        self.last_skipped = error.message
                    else:
                        yield request
        except InvalidArgument as error:
            if not read_any and not isinstance(error, mcap.CutOff):
                raise
            self.damage = error.message

    def _note(self, record: mcap.Metadata, clients: dict[int, str]) -> None:
        if record.name == ABOUT:
            self.about = record.fields
        elif record.name == END:
            self.ending = record.fields
        elif record.name == CLIENT and record.fields.get("number", "").isdecimal():
            clients[int(record.fields["number"][:10])] = record.fields.get("name", "")


def _is_title(topic: str) -> bool:
    """Whether a topic is NAME@VERSION."""
    try:
        return bool(split_title(topic)[1])
    except InvalidArgument:
        return False


def _request(
    record: mcap.Message, offset_ns: int, titles: Mapping[int, str], clients: Mapping[int, str]
) -> RecordedRequest:
    """The request that a message holds. Raises TensorNextError: it holds none."""
    title = titles.get(record.channel)
    if title is None:
        raise InvalidArgument(f"channel {record.channel} is none of requests")
    if abs(offset_ns) > _LONGEST_NS:
        raise InvalidArgument(f"a request was logged {offset_ns / 1e9:.0f} s after the first one")
    data = memoryview(record.data)
    if data.nbytes < _HEAD.size:
        raise InvalidArgument(f"a message of {data.nbytes} bytes is no request")
    client, header_bytes = _HEAD.unpack_from(data)
    at = _HEAD.size + header_bytes
    if at > data.nbytes:
        raise InvalidArgument(f"a message of {data.nbytes} bytes claims a header of {header_bytes}")
    request = wire.decode_request(data[_HEAD.size : at], _LIMITS)
    if not isinstance(request, wire.Predict):
        raise InvalidArgument(f"a message holds a {verb_name(type(request))} request, not one to predict")
    frames: list[memoryview] = []
    while at < data.nbytes:
        if data.nbytes - at < _LENGTH.size:
            raise InvalidArgument(f"a message ends within the length of tensor {len(frames)}")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > data.nbytes - at:
            raise InvalidArgument(f"tensor {len(frames)} of a message claims {length} bytes, {data.nbytes - at} follow")
        frames.append(data[at : at + length])
        at += length
        if len(frames) > MAX_TENSORS:
            raise InvalidArgument(f"a message has more than {MAX_TENSORS} tensors")
    return RecordedRequest(max(offset_ns, 0), title, clients.get(client, ""), request, tuple(frames))
