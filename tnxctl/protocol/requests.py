"""Headers of the requests of a client. `docs/protocol.md` is the specification."""

from __future__ import annotations

from typing import Annotated

import msgspec

from tnxctl.protocol.fields import Id, Name, NotNegative, Span, TensorSpec, Title, Version, Word
from tnxctl.protocol.limits import (
    LOWEST_PRIORITY,
    MAX_CLOCK_US,
    MAX_DEADLINE_US,
    MAX_ID,
    MAX_RECORDING_S,
    MAX_TENSORS,
    MAX_WEIGHT,
    MESSAGE_BYTES,
)


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
        attempt: 1 for a request that is sent for the first time, one more with each time that it is sent again.
        traceparent: the span that it belongs to, as W3C Trace Context has it: the daemon may record what it does below
            that one. What is malformed, or not sampled, is ignored; "": none.
    """

    v: Version
    id: Id
    inputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(max_length=MAX_TENSORS)]
    model: Title = ""
    prefer_gpu: bool = True
    min_gpu_memory_mb: NotNegative = 0.0
    device: Word = ""
    deadline_us: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_US)] | None = None
    sent_us: Annotated[float, msgspec.Meta(ge=0, le=MAX_CLOCK_US)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=LOWEST_PRIORITY)] | None = None
    route_key: Name = ""
    max_reply_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)] = MESSAGE_BYTES
    attempt: Annotated[int, msgspec.Meta(ge=1, le=MAX_ID)] = 1
    traceparent: Title = ""


class PredictShared(Predict, frozen=True, kw_only=True, tag_field="type", tag="predict_shared", gc=False):
    """A `Predict` with tensors in the memory that this connection shares, see `Share`.

    Attributes:
        shared: where each input lies; no tensor frames follow then. None: they follow.
        space: part of the memory for the outputs. They come as frames if it is None, or too small.
    """

    shared: Annotated[tuple[Span, ...], msgspec.Meta(max_length=MAX_TENSORS)] | None = None
    space: Span | None = None


class Share(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="share", gc=False):
    """Ask for memory that this connection shares with the daemon. Answered with `Shared`. Only over ipc://, on Linux.

    Attributes:
        address: of a Unix socket (SOCK_SEQPACKET) that this process listens on, in the abstract namespace, "@" and
            hexadecimal digits. The daemon connects, and sends the descriptor of the memory (SCM_RIGHTS) with the token.
            It is done with that when it answers. The memory is this client's for as long as it keeps that connection.
        token: by which the client knows that it was this daemon.
    """

    v: Version
    id: Id
    address: Annotated[str, msgspec.Meta(pattern="^@[0-9a-f]{1,64}$")]
    token: Annotated[str, msgspec.Meta(min_length=16, max_length=64, pattern="^[0-9a-f]*$")]


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="cancel", gc=False):
    """Withdraw the predict request with this id, sent on the same connection.

    It has no answer of its own: the request gets CANCELLED if it still waited, else what it would have got anyway.
    """

    v: Version
    id: Id


class Health(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="health", gc=False):
    """Ask for the health of the daemon."""

    v: Version
    id: Id


class Metadata(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="metadata", omit_defaults=True, gc=False
):
    """Ask for the signature of a model: NAME, NAME@VERSION, or "" for the daemon's default model."""

    v: Version
    id: Id
    model: Title = ""


class Models(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="models", gc=False):
    """Ask for all models and their versions."""

    v: Version
    id: Id


class Load(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="load", gc=False):
    """Load NAME@VERSION, or what the model.toml of NAME says, traffic included.

    NAME@VERSION gets no traffic of its name yet while another version of the name serves.
    Answered when it is loaded and warm, with `ModelsReport` about the versions of that name.
    """

    v: Version
    id: Id
    model: Title


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="unload", gc=False):
    """Stop serving NAME@VERSION, or all versions of NAME. Requests taken in are finished first.

    Answered when its memory has been freed, with `ModelsReport` about the versions of that name.
    """

    v: Version
    id: Id
    model: Title


class Route(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="route", omit_defaults=True):
    """Split the traffic of a model. Answered at once with `ModelsReport` about the versions of that name.

    Attributes:
        model: its name, without a version.
        weights: version -> share of the requests that name no version, relative to the sum; empty: all go to the
            newest version.
        shadow: version that gets copies of them and whose answers nobody sees; "": none.
    """

    v: Version
    id: Id
    model: Title
    weights: Annotated[
        dict[Title, Annotated[float, msgspec.Meta(ge=0, le=MAX_WEIGHT)]], msgspec.Meta(max_length=1024)
    ] = {}
    shadow: Title = ""


class Reload(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reload", gc=False):
    """Scan the model repository again. Answered with `ReloadReport` when all is as the repository says."""

    v: Version
    id: Id


class Compare(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="compare", gc=False):
    """Ask for the differences between a shadow version's answers and the baseline's. Answered with `Comparison`.

    Attributes:
        model: its name. baseline: the version that answers. candidate: the shadow.
    """

    v: Version
    id: Id
    model: Title
    baseline: Title
    candidate: Title


class WhoAmI(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="whoami", gc=False):
    """Ask who the daemon takes this peer for, and what it may do. Answered with `Identity`."""

    v: Version
    id: Id


class Clients(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="clients", gc=False):
    """Ask who is connected. Answered with `ClientsReport`."""

    v: Version
    id: Id


class Kick(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kick", gc=False):
    """End all connections of a client but the one that asks. Answered with `KickReport`.

    It may come back at once; to keep it out, take its key off the list.

    Attributes:
        client: its name, as in `ClientsReport`.
    """

    v: Version
    id: Id
    client: Name


class Keys(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="keys", gc=False):
    """Ask which keys may connect. Answered with `KeysReport`."""

    v: Version
    id: Id


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="stats", gc=False):
    """Ask for the raw counts since the start. Answered with `StatsReport`."""

    v: Version
    id: Id


class Explain(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="explain", omit_defaults=True, gc=False):
    """Ask for the slowest requests of the last minute. Answered with `Explanation`.

    Attributes:
        request: id of the request that is asked about; None: the slowest of each version.
        model: NAME or NAME@VERSION; "": all.
    """

    v: Version
    id: Id
    request: Id | None = None
    model: Title = ""


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="record", omit_defaults=True, gc=False):
    """Write the predict requests that come from now on to a file of the daemon's. Answered with `RecordingReport`.

    The answer comes when the file is open. One recording is under way at a time.

    Attributes:
        file: name of a new file in the directory that the daemon's configuration has for recordings.
        seconds: length of the recording.
        model: NAME or NAME@VERSION whose requests are written; "": those of all models.
        sample: share of the requests that is written, chosen at random.
    """

    v: Version
    id: Id
    file: Name
    seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_RECORDING_S)] = 60.0
    model: Title = ""
    sample: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class StopRecording(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="stop_recording", gc=False):
    """End the recording that is under way. Answered with `RecordingReport` when its file is closed."""

    v: Version
    id: Id


class Recording(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="recording", gc=False):
    """Ask about the recording that is under way, or else the last one. Answered with `RecordingReport`."""

    v: Version
    id: Id


Request = (
    Predict
    | PredictShared
    | Share
    | Cancel
    | Health
    | Metadata
    | Models
    | Load
    | Unload
    | Route
    | Reload
    | Compare
    | WhoAmI
    | Clients
    | Kick
    | Keys
    | Stats
    | Explain
    | Record
    | StopRecording
    | Recording
)
