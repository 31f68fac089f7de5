"""Wire protocol, version 1: the header of a message. No socket, no clock, no I/O, no numpy.

A message is one msgpack header followed by one raw frame per tensor, little-endian, in C order;
`docs/protocol.md` is the specification. `frames` is about the tensors. Both halves of TensorNext import this
module, `tnxctl health` too, so it stays light.

Headers are msgpack maps. Arrays would save little (measured in docs/performance.md), too little to give up names that
a reader of a packet capture understands and that an older peer can skip.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec

from tnxctl.protocol.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from typing_extensions import Buffer

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
MAX_RANK = 64

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a model may be called: a name for a folder, too, on every system, and never one with an "@"."""

MODEL_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
"""The names that a version may have."""

_GRAMMAR = "a name of up to 64 letters, digits, '.', '_' and '-', a letter or digit first, and a whole number from 1"


_MESSAGE_BYTES = 256 * 1024 * 1024


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one message. Checked before anything is allocated for it.

    Attributes:
        header_bytes: length of the msgpack header.
        tensors: tensor frames in one message.
        rank: axes of one tensor.
        message_bytes: all tensor frames together; also the most that one frame may have.
    """

    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 64 * 1024
    tensors: Annotated[int, msgspec.Meta(ge=1, le=MAX_TENSORS)] = 64
    rank: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)] = 16
    message_bytes: Annotated[int, msgspec.Meta(ge=1024)] = _MESSAGE_BYTES


# How long what a header holds may be. With a bound, what is too long is refused before it is decoded.
_Name = Annotated[str, msgspec.Meta(max_length=1024)]
_Title = Annotated[str, msgspec.Meta(max_length=256)]
_Word = Annotated[str, msgspec.Meta(max_length=64)]


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Name, datatype and shape of one tensor, on the wire as `[name, datatype, [d0, d1, ...]]`.

    In a message the shape is that of the frame that follows; in a model's signature an axis of -1 takes any length.
    """

    name: _Name
    datatype: _Word
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_RANK)]


# --- headers -------------------------------------------------------------------------------------------------

_Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
_Version = Literal[1]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]  # NaN is not >= 0 either


class Predict(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="predict", omit_defaults=True, gc=False):
    """Run a model once on the tensors that follow.

    Attributes:
        inputs: one entry per tensor frame, in order. A single input may have the name "": the model's only one.
        model: name of the model, or NAME@VERSION for that version alone; "" is the daemon's default model.
        prefer_gpu: run on a GPU if one qualifies, else on the CPU. False: run on the CPU.
        min_gpu_memory_mb: free memory in MiB that a GPU needs to qualify; never negative or NaN.
        device: "" to go by prefer_gpu, "auto" for the device that is predicted to be done first, or "cpu", "cuda:0",
            ...: that one or an error.
        deadline_us: microseconds from when the message came to the daemon after which the answer is worthless; None: as
            the model says, which usually is none.
        sent_us: when it was sent, in microseconds of any clock of the sender's that goes steadily. Only differences
            count: they tell the daemon how long the message has waited to be taken up.
        priority: 0 (first) to 3 (last); None: as the model says, which usually is DEFAULT_PRIORITY.
        route_key: requests with the same key go to the same version while traffic is split; "": those of one
            connection do.
        max_reply_bytes: most bytes that all tensors of the answer may have together.
    """

    v: _Version
    id: _Id
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    model: _Title = ""
    prefer_gpu: bool = True
    min_gpu_memory_mb: _NotNegative = 0.0
    device: _Word = ""
    deadline_us: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_US)] | None = None
    sent_us: Annotated[float, msgspec.Meta(ge=0, le=MAX_CLOCK_US)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=LOWEST_PRIORITY)] | None = None
    route_key: _Name = ""
    max_reply_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = _MESSAGE_BYTES


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="cancel", gc=False):
    """Withdraw the predict request with this id, sent on the same connection.

    It has no answer of its own: the request gets CANCELLED if it still waited, else what it would have got anyway.
    """

    v: _Version
    id: _Id


class Health(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="health", gc=False):
    """Ask how the daemon is."""

    v: _Version
    id: _Id


class Metadata(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="metadata", omit_defaults=True, gc=False
):
    """Ask what a model takes and gives: NAME, NAME@VERSION, or "" for the daemon's default model."""

    v: _Version
    id: _Id
    model: _Title = ""


class Models(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="models", gc=False):
    """Ask for all models and their versions."""

    v: _Version
    id: _Id


class Load(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="load", gc=False):
    """Load NAME@VERSION, or what the model.toml of NAME says, traffic included.

    NAME@VERSION gets no traffic of its name yet while another version of the name serves.
    Answered when it is loaded and warm, with `ModelsReport` about the versions of that name.
    """

    v: _Version
    id: _Id
    model: _Title


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="unload", gc=False):
    """Stop serving NAME@VERSION, or all versions of NAME. What was taken in is finished first.

    Answered when its memory has been freed, with `ModelsReport` about the versions of that name.
    """

    v: _Version
    id: _Id
    model: _Title


class Route(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="route", omit_defaults=True):
    """Split the traffic of a model. Answered at once with `ModelsReport` about the versions of that name.

    Attributes:
        model: its name, without a version.
        weights: version -> share of the requests that name no version, relative to the sum; empty: all go to the
            newest version.
        shadow: version that gets copies of them and whose answers nobody sees; "": none.
    """

    v: _Version
    id: _Id
    model: _Title
    weights: Annotated[
        dict[_Title, Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)]], msgspec.Meta(max_length=1024)
    ] = {}
    shadow: _Title = ""


class Reload(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reload", gc=False):
    """Look at the model repository again. Answered with `ReloadReport` when all is as the repository says."""

    v: _Version
    id: _Id


class Compare(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="compare", gc=False):
    """Ask how the answers of a shadow version differ. Answered with `Comparison`.

    Attributes:
        model: its name. baseline: the version that answers. candidate: the shadow.
    """

    v: _Version
    id: _Id
    model: _Title
    baseline: _Title
    candidate: _Title


Request = Predict | Cancel | Health | Metadata | Models | Load | Unload | Route | Reload | Compare


class Timing(msgspec.Struct, frozen=True, gc=False):
    """Microseconds that a request spent in each stage in the daemon. The seven stages sum to `total_us`.

    Attributes:
        receive_us: taking the frames from the socket, decoding and validating them.
        queue_us: waiting for a lane.
        gather_us: placing the rows of the batch side by side in the staging buffer.
        h2d_us: host to device copy (0 on a CPU).
        compute_us: the forward, with its launch.
        d2h_us: device to host copy (0 on a CPU).
        reply_us: from the end of the batch to the encoding of this reply.
    """

    receive_us: float
    queue_us: float
    gather_us: float
    h2d_us: float
    compute_us: float
    d2h_us: float
    reply_us: float
    total_us: float


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="result", gc=False):
    """Answer to `Predict`; one tensor frame follows per entry of `outputs`, in order.

    Attributes:
        model, version: what ran.
        device: where it ran: "cpu", "cuda:0", ...
        reason: why there, in words.
        batch_size: rows in the batch that the request rode in, its own included.
        latency_ms: the forward on the device, for the whole batch.
        gpu_memory_mb: free memory of that GPU in MiB when the batch was done; 0 on a CPU.
        predicted_us: when the request came, the microseconds until it would be done, as predicted then; what they
            were in fact is queue to d2h of the timing.
    """

    v: _Version
    id: _Id
    model: str
    version: str
    outputs: tuple[TensorSpec, ...]
    device: str
    reason: str
    batch_size: int
    latency_ms: float
    gpu_memory_mb: float
    timing: Timing
    predicted_us: float = 0.0


class DeviceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One device of the daemon.

    Attributes:
        name: "cpu", "cuda:0", ...
        status: "ready", or "failed" (then `error` says why and nothing is routed there).
        description: the vendor's name of it.
        lanes, busy_lanes: places where batches run, one at a time each.
        queued_rows: rows that wait for a lane of this device.
        memory_free_mb, memory_total_mb: in MiB; for the CPU, of the host, within the limits of the daemon.
    """

    name: str
    status: str
    description: str = ""
    lanes: int = 0
    busy_lanes: int = 0
    queued_rows: int = 0
    memory_free_mb: float = 0.0
    memory_total_mb: float = 0.0
    error: str = ""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one model: its signature, where it is loaded, how it is.

    Attributes:
        version: "" for what is no version, because something is wrong with the model; its status is "failed".
        status: "ready"; "starting": being loaded; "draining": finishes what it has and goes; "unloaded"; "evicted":
            unloaded to make room, and loaded again when it is asked for; "failed" (then `error` says why).
        inputs, outputs: -1 is an axis of any length. For a model that batches, axis 0 counts rows.
        example_shapes: one per input, of one row, for which the model is known to work; (): not known yet.
        max_batch_size: most rows in one batch; 0 for a model that takes no batch axis.
        default: whether requests that name no model go to this name.
        format: "built-in", "pt2", "safetensors", "torchscript" or "onnx".
        traffic: its share of the requests for this name that name no version, 0 to 1. shadow: whether it gets copies
            of them.
        memory_mb: weights and buffers in MiB, on each of its devices.
        requests: how many were taken in for it. load_s: how long loading and warm-up took, in seconds.
        notes: what an operator should know, such as a deprecated format.
        state: of the module, between requests: "pure": it holds nothing that changes; "scratch": it writes what no
            other request reads; "shared": requests share it, as model.toml says. "": not known yet.
        audited: requests that were computed again, alone. audit_differences: those that got another answer then.
    """

    name: str
    version: str
    status: str
    default: bool = False
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int = 0
    devices: tuple[str, ...] = ()
    error: str = ""
    format: str = ""
    traffic: float = 0.0
    shadow: bool = False
    memory_mb: float = 0.0
    requests: int = 0
    load_s: float = 0.0
    notes: tuple[str, ...] = ()
    example_shapes: tuple[tuple[int, ...], ...] = ()
    state: str = ""
    audited: int = 0
    audit_differences: int = 0


class HealthReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="health"):
    """Answer to `Health`.

    Attributes:
        status: "starting", "ready" or "draining".
        cuda_available: whether at least one CUDA device is ready.
        current_device: where a request that prefers a GPU would run now.
        gpu_memory_free_mb: free memory of that GPU in MiB; 0 without one.
        version: of the daemon. uptime_s: seconds since it started.
        queued: requests that wait. running: requests on a lane.
        requests: predict requests, and other messages that were refused. replies: results sent.
        errors: error replies by code. undeliverable: answers whose client was gone. abandoned: requests taken out of
            the queue because their client was gone.
        prediction_error_us: how far the predictions of the last requests were off, on average.
        max_message_bytes: most bytes that all tensors of a request may have together; 0: not told.
        connections: now. connections_refused: not let in, since their client had too many. connections_cut: ended by
            the daemon, since they took too much of what is everybody's.
        traffic_mb: memory in MiB of what is received, in flight and owed. traffic_limit_mb: the most that it may be.
        traffic_owed_mb: of this, replies that clients have not taken yet.
    """

    v: _Version
    id: _Id
    status: str
    cuda_available: bool
    current_device: str
    gpu_memory_free_mb: float
    version: str
    uptime_s: float
    devices: tuple[DeviceInfo, ...]
    models: tuple[ModelInfo, ...]
    queued: int
    running: int
    requests: int
    replies: int
    errors: dict[str, int]
    undeliverable: int = 0
    abandoned: int = 0
    prediction_error_us: float = 0.0
    max_message_bytes: int = 0
    connections: int = 0
    connections_refused: int = 0
    connections_cut: int = 0
    traffic_mb: float = 0.0
    traffic_limit_mb: float = 0.0
    traffic_owed_mb: float = 0.0


class MetadataReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="metadata"):
    """Answer to `Metadata`."""

    v: _Version
    id: _Id
    model: ModelInfo


class ModelsReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="models"):
    """Answer to `Models`, `Load`, `Unload` and `Route`. Attributes: models: one entry per version."""

    v: _Version
    id: _Id
    models: tuple[ModelInfo, ...]


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reload"):
    """Answer to `Reload`.

    Attributes:
        loaded, unloaded: versions, as NAME@VERSION, that came and went.
        failed: what could not be loaded, by NAME@VERSION or NAME or path, and why; the version before it still serves.
    """

    v: _Version
    id: _Id
    loaded: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    failed: dict[str, str] = {}


class OutputDifference(msgspec.Struct, frozen=True, kw_only=True):
    """The difference between two versions in one output.

    Attributes:
        name: of the output. elements: compared so far.
        max_abs, mean_abs: absolute difference, over all elements that are finite in both.
        argmax_agreement: share of the rows whose largest element along the last axis is at the same place; None if
            that axis has one element or none.
        misfits: times that shape or datatype differed, or only one of the two was finite.
    """

    name: str
    elements: int
    max_abs: float
    mean_abs: float
    argmax_agreement: float | None
    misfits: int


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of the last forwards, in microseconds per batch."""

    count: int
    p50_us: float
    p90_us: float
    p99_us: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="compare"):
    """Answer to `Compare`.

    Attributes:
        requests: answered by the baseline and computed by the candidate too. errors: of these, failed there.
        skipped: copies that found no free capacity.
        outputs: one entry per output of the baseline.
        baseline_us, candidate_us: the forwards of the same batches.
        last_error: what the candidate's last failure said.
    """

    v: _Version
    id: _Id
    model: str
    baseline: str
    candidate: str
    requests: int
    errors: int
    skipped: int
    outputs: tuple[OutputDifference, ...]
    baseline_us: Percentiles
    candidate_us: Percentiles
    last_error: str = ""


class ErrorReply(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error", omit_defaults=True, gc=False
):
    """The answer instead of any other.

    Attributes:
        id: of the request; None when the request was too broken to have one.
        code: name of a gRPC status code, see `tnxctl.protocol.errors`.
        message: a sentence that says what was wrong with which value.
        retry_after_us: the same request may well succeed that many microseconds later; None says nothing about that.
    """

    v: _Version
    id: _Id | None
    code: str
    message: str
    retry_after_us: float | None = None


Reply = Result | HealthReport | MetadataReport | ModelsReport | ReloadReport | Comparison | ErrorReply

_encoder = msgspec.msgpack.Encoder()
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)

# What msgspec raises on bytes it cannot use; hostile nesting shows as RecursionError, bad UTF-8 as ValueError.
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


def split_title(title: str) -> tuple[str, str]:
    """NAME and VERSION of NAME@VERSION, or NAME and "" of a name alone. Raises InvalidArgument."""
    name, at, version = title.partition("@")
    if not MODEL_NAME.fullmatch(name) or (at and not MODEL_VERSION.fullmatch(version)):
        raise InvalidArgument(f"{excerpt(title)} is not a model: NAME or NAME@VERSION, {_GRAMMAR}")
    return name, version


def check_name(name: str) -> None:
    """Look whether this is NAME, without a version. Raises InvalidArgument."""
    if split_title(name)[1]:
        raise InvalidArgument(f"model {excerpt(name)}: expected the name alone, without a version")


def check_version(version: str) -> None:
    """Look whether this is VERSION. Raises InvalidArgument."""
    if not MODEL_VERSION.fullmatch(version):
        raise InvalidArgument(f"{excerpt(version)} is not a version: a whole number from 1")


def _check_header_size(frame: Buffer, limits: Limits) -> None:
    size = len(memoryview(frame))
    if size > limits.header_bytes:
        raise InvalidArgument(f"the header has {size} bytes, more than the limit of {limits.header_bytes}")


# What follows serves headers already refused. Beyond so many bytes only the whole numbers and strings at the beginning
# of the map are looked at: to refuse must not cost more than to accept.
_SECOND_LOOK = 1024

_CANCEL = msgspec.msgpack.encode("cancel")


def _first_scalars(frame: Buffer) -> dict[bytes, int | bytes]:
    """Whole numbers and strings among the first entries of a map, by key: as far as keys and values are short."""
    data = bytes(memoryview(frame)[:_SECOND_LOOK])
    found: dict[bytes, int | bytes] = {}
    if not 0x80 <= data[0] <= 0x8F:
        return found
    at = 1
    for _ in range(data[0] & 0x0F):
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
_id_decoder: msgspec.msgpack.Decoder[int] = msgspec.msgpack.Decoder(_Id)
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


def excerpt(value: object, length: int = 60) -> str:
    """A value as error sentences show it: on one line, and no longer than that."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."
