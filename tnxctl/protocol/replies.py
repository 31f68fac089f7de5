"""Headers of the replies of a daemon, and the reports that they hold. `docs/protocol.md` is the specification."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from tnxctl.protocol.fields import Id, Span, TensorSpec, Version
from tnxctl.protocol.statistics import Explanation, StatsReport
from tnxctl.protocol.timings import StepTiming, Timing


class Result(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="result", gc=False):
    """Answer to `Predict`; one tensor frame follows per entry of `outputs`, in order.

    None follows where the outputs lie in shared memory instead.

    Of a pipeline, `device` and `reason` are those of all steps, `batch_size` and `gpu_memory_mb` those of the step that
    ended last; `timing` and `latency_ms` sum up the steps that led to it, each of which waited for the one before.

    Attributes:
        model, version: what ran.
        device: where it ran: "cpu", "cuda:0", ...
        reason: why there, in words.
        batch_size: rows in the batch that the request rode in, its own included.
        latency_ms: the forward on the device, for the whole batch.
        gpu_memory_mb: free memory of that GPU in MiB when the batch was done; 0 on a CPU.
        predicted_us: when the request came, the microseconds until it would be done, as predicted then; what they
            were in fact is queue to d2h of the timing.
        steps: of a pipeline, in the order of its description. Other models have none.
        shared: where each output lies in the memory that the connection shares, within the space of the request.
    """

    v: Version
    id: Id
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
    steps: tuple[StepTiming, ...] | UnsetType = UNSET
    shared: tuple[Span, ...] | UnsetType = UNSET


class Shared(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="shared", gc=False):
    """Answer to `Share`: the memory is shared from now on. Attributes: nbytes: of it."""

    v: Version
    id: Id
    nbytes: int


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


class PipelineStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a pipeline, as its description says.

    Attributes:
        name: of the step. model: NAME, whose traffic it follows, or NAME@VERSION for that version alone.
        inputs: input of the model -> what feeds it: an input of the pipeline, or "STEP.OUTPUT".
    """

    name: str
    model: str
    inputs: dict[str, str]


class PipelineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The graph of a pipeline. Attributes: outputs: output of the pipeline -> what it is, "STEP.OUTPUT"."""

    steps: tuple[PipelineStep, ...]
    outputs: dict[str, str]


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
        format: "built-in", "pt2", "safetensors", "torchscript", "onnx", "pipeline" or "python".
        traffic: its share of the requests for this name that name no version, 0 to 1. shadow: whether it gets copies
            of them.
        memory_mb: weights and buffers in MiB, on each of its devices.
        requests: how many were taken in for it. load_s: how long loading and warm-up took, in seconds.
        notes: what an operator should know, such as a deprecated format.
        state: of the module, between requests: "pure": it holds nothing that changes; "scratch": it writes what no
            other request reads; "shared": requests share it, as model.toml says. "": not known yet.
        audited: requests that were computed again, alone. audit_differences: those that got another answer then.
        pipeline: its steps, if it is a pipeline.
        restarts: how often a process that runs it was started again, since it had ended.
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
    pipeline: PipelineInfo | UnsetType = UNSET
    restarts: int = 0


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
        connections: now. connections_refused: not let in, since their client had too many, or no key that may connect.
            connections_cut: ended by the daemon, since they took too much of what is everybody's, their key was taken
            back, or an admin wanted it.
        traffic_mb: memory in MiB of what is received, in flight and owed. traffic_limit_mb: the most that it may be.
        traffic_owed_mb: of this, replies that clients have not taken yet.
        resent: predict requests, of all `requests`, that had been sent before, as their headers say.
    """

    v: Version
    id: Id
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
    resent: int = 0


class MetadataReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="metadata"):
    """Answer to `Metadata`."""

    v: Version
    id: Id
    model: ModelInfo


class ModelsReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="models"):
    """Answer to `Models`, `Load`, `Unload` and `Route`. Attributes: models: one entry per version."""

    v: Version
    id: Id
    models: tuple[ModelInfo, ...]


class ReloadReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reload"):
    """Answer to `Reload`.

    Attributes:
        loaded, unloaded: versions, as NAME@VERSION, that came and went.
        failed: what could not be loaded, by NAME@VERSION or NAME or path, and why; the version before it still serves.
    """

    v: Version
    id: Id
    loaded: tuple[str, ...] = ()
    unloaded: tuple[str, ...] = ()
    failed: dict[str, str] = {}


class OutputDifference(msgspec.Struct, frozen=True, kw_only=True):
    """The difference between two versions in one output.

    Attributes:
        name: of the output. elements: compared so far.
        max_abs, mean_abs: absolute difference, over all elements that are finite in both. Strings are 0 apart if they
            are equal, else 1.
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

    v: Version
    id: Id
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


class Identity(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="whoami"):
    """Answer to `WhoAmI`.

    Attributes:
        name: of the client: that of its key, `uid:` and a number on ipc://, or else its address.
        by: what the name was told by: "key", "user" or "address".
        role: "observe", "predict" or "admin".
        address: where this connection comes from. connections: of this client, this one among them.
        max_requests: most requests in flight. max_mb: of their inputs, in MiB. rate: requests a second; 0: no limit.
        share: of the lanes while others want them too, relative to theirs.
    """

    v: Version
    id: Id
    name: str
    by: str
    role: str
    address: str
    connections: int
    max_requests: int
    max_mb: float
    rate: float = 0.0
    share: float = 1.0


class ClientInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One client that is connected.

    Attributes:
        name, by: as in `Identity`.
        role: the highest of its connections; "" while nothing came of them.
        addresses: of its connections, eight at most.
        connections: open ones. connected_s: seconds since the first of them said something.
        requests: predict requests taken in, since the daemon knows the client. in_flight: of these, not answered yet.
        received_bytes: of its messages.
    """

    name: str
    by: str
    role: str
    addresses: tuple[str, ...]
    connections: int
    connected_s: float
    requests: int
    in_flight: int
    received_bytes: int


class ClientsReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="clients"):
    """Answer to `Clients`.

    Attributes:
        clients: those with most requests first, 1,000 at most. total: how many there are.
    """

    v: Version
    id: Id
    clients: tuple[ClientInfo, ...]
    total: int


class KickReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="kick"):
    """Answer to `Kick`. Attributes: connections: number of those that were ended."""

    v: Version
    id: Id
    connections: int


class KeyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One key that may connect.

    Attributes:
        name, role: as the file says. key: the public key, 40 characters of Z85.
        connections: open ones of this key that have said something.
        max_requests, max_mb, rate, share: as in `Identity`.
    """

    name: str
    role: str
    key: str
    connections: int
    max_requests: int
    max_mb: float
    rate: float = 0.0
    share: float = 1.0


class KeysReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="keys"):
    """Answer to `Keys`.

    Attributes:
        keys: in the order of the file, 1,000 at most. total: how many there are.
    """

    v: Version
    id: Id
    keys: tuple[KeyInfo, ...]
    total: int


class RecordingReport(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="recording"):
    """Answer to `Record`, `StopRecording` and `Recording`.

    Attributes:
        state: "off": there was none since the daemon's start; "recording"; "ended".
        path: of the file, on the daemon's host. file_bytes: written to it so far.
        seconds, model, sample: as in `Record`. elapsed_s: seconds since it began, or that it took.
        requests: written so far. dropped: those that found no room in the queue to the disk.
        reason: why it ended: "" if its time was over.
    """

    v: Version
    id: Id
    state: str
    path: str = ""
    file_bytes: int = 0
    seconds: float = 0.0
    model: str = ""
    sample: float = 1.0
    elapsed_s: float = 0.0
    requests: int = 0
    dropped: int = 0
    reason: str = ""


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

    v: Version
    id: Id | None
    code: str
    message: str
    retry_after_us: float | None = None


Reply = (
    Result
    | Shared
    | HealthReport
    | MetadataReport
    | ModelsReport
    | ReloadReport
    | Comparison
    | Identity
    | ClientsReport
    | KickReport
    | KeysReport
    | StatsReport
    | Explanation
    | RecordingReport
    | ErrorReply
)
