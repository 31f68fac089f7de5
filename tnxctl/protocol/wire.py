"""Wire protocol, version 1: the header of a message. No socket, no clock, no I/O, no numpy.

A message is one msgpack header followed by one raw frame per tensor, little-endian, in C order;
`docs/protocol.md` is the specification. This module encodes and decodes headers, and has all names of the parts:

    limits      constants, limits of a message, names of models
    fields      types of fields
    requests    headers of requests
    replies     headers of replies; timings, statistics: reports that they hold
    roles       who may ask for what

`frames` is about the tensors. Both halves of TensorNext import this module, `tnxctl health` too, so it stays light.

Headers are msgpack maps. Arrays would save little (measured in docs/performance.md), too little to give up names that
a reader of a packet capture understands and that an older peer can skip.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from tnxctl.protocol.errors import InvalidArgument, Unimplemented
from tnxctl.protocol.fields import BYTES, Id, Span, TensorSpec
from tnxctl.protocol.limits import (
    DEFAULT_PORT,
    DEFAULT_PRIORITY,
    LOWEST_PRIORITY,
    MAX_CLOCK_US,
    MAX_DEADLINE_US,
    MAX_DIM,
    MAX_ID,
    MAX_RANK,
    MAX_RECORDING_S,
    MAX_TENSORS,
    MAX_WEIGHT,
    MIB,
    MODEL_NAME,
    MODEL_VERSION,
    VERSION,
    Limits,
    check_name,
    check_version,
    excerpt,
    split_title,
)
from tnxctl.protocol.replies import (
    ClientInfo,
    ClientsReport,
    Comparison,
    DeviceInfo,
    ErrorReply,
    HealthReport,
    Identity,
    KeyInfo,
    KeysReport,
    KickReport,
    MetadataReport,
    ModelInfo,
    ModelsReport,
    OutputDifference,
    Percentiles,
    PipelineInfo,
    PipelineStep,
    RecordingReport,
    ReloadReport,
    Reply,
    Result,
    Shared,
)
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
from tnxctl.protocol.roles import LEAST_ROLES, Role
from tnxctl.protocol.statistics import (
    STAGES,
    ClientStats,
    DeviceStats,
    Explanation,
    SlowRequest,
    StatsReport,
    VersionStats,
)
from tnxctl.protocol.timings import StepTiming, Timing

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BYTES",
    "DEFAULT_PORT",
    "DEFAULT_PRIORITY",
    "LEAST_ROLES",
    "LOWEST_PRIORITY",
    "MAX_CLOCK_US",
    "MAX_DEADLINE_US",
    "MAX_DIM",
    "MAX_ID",
    "MAX_RANK",
    "MAX_RECORDING_S",
    "MAX_TENSORS",
    "MAX_WEIGHT",
    "MIB",
    "MODEL_NAME",
    "MODEL_VERSION",
    "STAGES",
    "VERSION",
    "Cancel",
    "ClientInfo",
    "ClientStats",
    "Clients",
    "ClientsReport",
    "Compare",
    "Comparison",
    "DeviceInfo",
    "DeviceStats",
    "ErrorReply",
    "Explain",
    "Explanation",
    "Health",
    "HealthReport",
    "Identity",
    "KeyInfo",
    "Keys",
    "KeysReport",
    "Kick",
    "KickReport",
    "Limits",
    "Load",
    "Metadata",
    "MetadataReport",
    "ModelInfo",
    "Models",
    "ModelsReport",
    "OutputDifference",
    "Percentiles",
    "PipelineInfo",
    "PipelineStep",
    "Predict",
    "PredictShared",
    "Record",
    "Recording",
    "RecordingReport",
    "Reload",
    "ReloadReport",
    "Reply",
    "Request",
    "Result",
    "Role",
    "Route",
    "Share",
    "Shared",
    "SlowRequest",
    "Span",
    "Stats",
    "StatsReport",
    "StepTiming",
    "StopRecording",
    "TensorSpec",
    "Timing",
    "Unload",
    "VersionStats",
    "WhoAmI",
    "check_name",
    "check_version",
    "decode_reply",
    "decode_request",
    "encode",
    "excerpt",
    "request_id",
    "split_title",
]

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

# Errors of msgspec on bytes that it cannot use; hostile nesting shows as RecursionError, bad UTF-8 as ValueError.
_DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, ValueError)


def encode(header: Request | Reply) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(header)


def decode_request(frame: Buffer, limits: Limits) -> Request:
    """Read the header frame of a request.

    Raises:
        InvalidArgument: not a header, or a field has the wrong type or value.
        Unimplemented: another protocol version, or an unknown verb.
    """
    _check_header_size(frame, limits)
    try:
        return _request_decoder.decode(frame)
    except _DECODE_ERRORS as error:
        raise _header_error(frame, error) from None


def decode_reply(frame: Buffer, limits: Limits) -> Reply:
    """Read the header frame of a reply. Raises as `decode_request` does."""
    _check_header_size(frame, limits)
    try:
        return _reply_decoder.decode(frame)
    except _DECODE_ERRORS as error:
        raise _header_error(frame, error) from None


def request_id(frame: Buffer, limits: Limits) -> int | None:
    """The id in a header that `decode_request` refused, if it can be made out: the error reply carries it back.

    A header beyond the size limit is not looked into, and of one of more than a kilobyte only the beginning is. That of
    a `Cancel` has none: it carries the id of another request, whose answer the error would be taken for.
    """
    size = len(memoryview(frame))
    if size > limits.header_bytes:
        return None
    if size > _SECOND_LOOK:
        found = _first_scalars(frame)
        id_ = found.get(b"id")
        return id_ if isinstance(id_, int) and 0 <= id_ <= MAX_ID and found.get(b"type") != b"cancel" else None
    try:
        fields = _map_decoder.decode(frame)
        if "type" in fields and bytes(fields["type"]) == _CANCEL:
            return None
        return _id_decoder.decode(fields["id"])
    except (KeyError, *_DECODE_ERRORS):
        return None


def _check_header_size(frame: Buffer, limits: Limits) -> None:
    size = len(memoryview(frame))
    if size > limits.header_bytes:
        raise InvalidArgument(f"the header has {size} bytes, more than the limit of {limits.header_bytes}")


# The functions below serve headers already refused. Beyond so many bytes only the whole numbers and strings at the
# beginning of the map are looked at: to refuse must not cost more than to accept.
_SECOND_LOOK = 1024

_CANCEL = msgspec.msgpack.encode("cancel")
_MAP_16 = 0xDE  # a map with a count of two bytes, as a header of more than 15 fields has it


def _first_scalars(frame: Buffer) -> dict[bytes, int | bytes]:
    """Whole numbers and strings among the first entries of a map, by key: as far as keys and values are short."""
    data = bytes(memoryview(frame)[:_SECOND_LOOK])
    found: dict[bytes, int | bytes] = {}
    if 0x80 <= data[0] <= 0x8F:
        count, at = data[0] & 0x0F, 1
    elif data[0] == _MAP_16:
        count, at = int.from_bytes(data[1:3], "big"), 3
    else:
        return found
    for _ in range(count):
        if at >= len(data) or not 0xA0 <= data[at] <= 0xBF:
            break
        key = data[at + 1 : (at := at + 1 + (data[at] & 0x1F))]
        if at >= len(data):
            break
        kind = data[at]
        if kind <= 0x7F:
            found[key], size = kind, 1
        elif 0xCC <= kind <= 0xCF:
            size = 1 + (1 << (kind - 0xCC))
            if at + size > len(data):
                break
            found[key] = int.from_bytes(data[at + 1 : at + size], "big")
        elif 0xA0 <= kind <= 0xBF:
            size = 1 + (kind & 0x1F)
            found[key] = data[at + 1 : at + size]
        elif kind in (0xC0, 0xC2, 0xC3):
            size = 1
        elif kind in (0xCA, 0xCB):
            size = 5 if kind == 0xCA else 9
        else:
            break
        at += size
    return found


# It takes them apart one level at a time and leaves the values
# undecoded: decoded freely, 64 KiB of map keys with equal hashes would hold the process up for a fifth of a second.
_map_decoder = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_array_decoder = msgspec.msgpack.Decoder(list[msgspec.Raw])
_int_decoder = msgspec.msgpack.Decoder(int)
_id_decoder: msgspec.msgpack.Decoder[int] = msgspec.msgpack.Decoder(Id)
_PLACE = re.compile(r"`\$((?:\.\w+|\[\d+\])*)(?:\[\.\.\.\])?`$")  # [...] is some value of a map
_PLACE_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")


def _header_error(frame: Buffer, error: Exception) -> InvalidArgument | Unimplemented:
    """Say in words why a header was refused, naming the value."""
    version = _version(frame)
    if version not in (None, VERSION):
        return Unimplemented(f"protocol version {version} is not spoken here, only version {VERSION}")
    why = "nested too deep" if isinstance(error, RecursionError) else str(error).replace("`object`", "`map`")
    value = _value_at(frame, why) if len(memoryview(frame)) <= _SECOND_LOOK else _excerpt_msgpack(frame)
    if why.startswith("Invalid value") and why.endswith("`$.type`"):
        return Unimplemented(f"unknown message type {value}")
    return InvalidArgument(f"header: {why}: {value}")


def _version(frame: Buffer) -> int | None:
    if len(memoryview(frame)) > _SECOND_LOOK:
        version = _first_scalars(frame).get(b"v")
        return version if isinstance(version, int) else None
    try:
        return _int_decoder.decode(_map_decoder.decode(frame)["v"])
    except (KeyError, *_DECODE_ERRORS):
        return None


def _value_at(frame: Buffer, why: str) -> str:
    """The value that msgspec complains about. It names only the place (`$.inputs[0]`), and not always that."""
    value = frame
    place = _PLACE.search(why)
    try:
        for name, index in _PLACE_STEP.findall(place[1] if place else ""):
            value = _map_decoder.decode(value)[name] if name else _array_decoder.decode(value)[int(index)]
    except (KeyError, IndexError, *_DECODE_ERRORS):
        value = frame
    return _excerpt_msgpack(value)


def _excerpt_msgpack(value: Buffer) -> str:
    """A short value as Python writes it; of a longer one, or of what is no msgpack, the first bytes."""
    size = len(memoryview(value))
    data = bytes(memoryview(value)[:100])
    if size <= 100:
        try:
            return excerpt(msgspec.msgpack.decode(data, ext_hook=lambda code, data: (code, bytes(data))))
        except _DECODE_ERRORS:
            pass
    return f"{data[:50]!r}... ({size} bytes)" if size > 50 else repr(data)
