"""Configuration of the daemon: flags over environment over file over defaults, as one frozen Struct."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec

from tnxctl.files import tomlfile
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import DEFAULT_PORT, MIB, Limits
from tnxd.device_kinds import DEVICE, DEVICES

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_LEVELS: tuple[str, ...] = get_args(LogLevel)

LogFormat = Literal["text", "json"]
LOG_FORMATS: tuple[str, ...] = get_args(LogFormat)

_Count = Annotated[int, msgspec.Meta(ge=0, le=1024)]
_Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the pool of CPU lanes.

    Attributes:
        workers: lanes, each a thread that runs one batch at a time; 0: as many as cores.
        threads: most torch threads of one batch; 0: up to eight, as there are cores. 1: each batch has one.
        scheduling: of the lanes' threads. "idle": they run only where nothing else of this machine wants a core, which
            keeps the serving thread quick; "normal": as all others.
        inline_limit_us: batches that are predicted to take no longer run on the serving thread itself, in microseconds.
            0 hands every batch to a worker.
    """

    workers: _Count = 0
    threads: _Count = 0
    scheduling: Literal["normal", "idle"] = "normal"
    inline_limit_us: Annotated[float, msgspec.Meta(ge=0)] = 1000.0


class Streams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of every device of a kind with streams.

    Attributes:
        lanes: streams per device, each with a thread that issues batches. Batches of one follow each other, those of
            several share the device.
        depth: batches of each lane that may be under way at a time: one is computed while others are copied.
    """

    lanes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    depth: Annotated[int, msgspec.Meta(ge=1, le=4)] = 2


class Cuda(Streams, frozen=True, forbid_unknown_fields=True):
    """Settings of every CUDA device.

    Attributes:
        graphs: whether forwards are captured when a model is loaded, to be started as a whole, where that is as fast.
    """

    graphs: bool = True


class Queue(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of the queue. Requests beyond one are refused with RESOURCE_EXHAUSTED.

    Attributes:
        max_requests: requests of all models. max_per_model: of one model; 0 is as many as of all.
        max_mb: input tensors of all models, in MiB. max_mb_per_model: of one model; 0 is as many as of all.
        max_delay_us: how long a batch smaller than its model's limit waits for company, in microseconds.
    """

    max_requests: Annotated[int, msgspec.Meta(ge=1)] = 16384
    max_per_model: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_delay_us: Annotated[float, msgspec.Meta(ge=0, le=10_000_000)] = 0.0
    max_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1024.0
    max_mb_per_model: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class Clients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits of one client, which is who has a key, an address, or a user on ipc://; and of the memory of all traffic.

    Attributes:
        max_connections: connections.
        max_requests: requests in flight. max_mb: their inputs, in MiB. Never more than three quarters of the queue.
        rate: requests a second; 0 sets no limit. These three may stand beside a key as well, for its holder alone.
        max_owed_mb: replies that one connection has not taken yet, in MiB; all of a client's may have four times that.
        memory_mb: most that all traffic may take, in MiB: what is received, waits, runs, and is owed.
        shared_memory_mb: memory that the daemon shares with clients on ipc:// who ask for it, in MiB, beside that; 0:
            none. One client may have three quarters of it, and each of its connections a quarter and 64 MiB at most.
    """

    max_connections: Annotated[int, msgspec.Meta(ge=1)] = 16384
    max_requests: Annotated[int, msgspec.Meta(ge=1)] = 12288
    max_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 768.0
    rate: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    max_owed_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 64.0
    memory_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 4096.0
    shared_memory_mb: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Keys (CURVE) that every tcp:// endpoint asks its peers for.

    Attributes:
        authorized: file of the keys that may connect, see `tnxctl.keys.authorized`; "": no keys are asked for.
        secret: file of the daemon's own pair; "": the credential `CREDENTIAL` that systemd passes.
    """

    authorized: str = ""
    secret: str = ""


CREDENTIAL = "tnxd.key"
"""Name of the systemd credential that holds the daemon's own pair of keys."""


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Limits in MiB of what the weights of all models may take; 0 sets no limit.

    When a model does not fit beside the others, the least recently used ones leave, and come back when asked for.

    Attributes:
        cpu_mb: on the CPU. cuda_mb, xpu_mb: on each CUDA device or XPU. mps_mb: on the GPU of an Apple computer.
    """

    cpu_mb: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    cuda_mb: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    xpu_mb: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    mps_mb: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0

    def nbytes(self, kind: str) -> int:
        """The limit of a kind of device, in bytes."""
        limit_mb: float = getattr(self, f"{kind}_mb")
        return int(limit_mb * MIB)


class Traces(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Spans of sampled requests (OpenTelemetry).

    Attributes:
        endpoint: address of a receiver of OTLP over HTTP; without a path, /v1/traces. "": nothing is recorded.
    """

    endpoint: str = ""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All settings of the daemon.

    Attributes:
        bind: endpoints to listen on, tcp:// or ipc://; ADDRESS:PORT alone is tcp://; port * picks a free one.
        insecure: listen on addresses other than loopback without asking anybody for a key.
        models: built-in models to serve; empty: all of them, or none where there is a repository.
        model_repository: directory of models, see docs/models.md; "": none.
        require_manifest: refuse a version without SHA256SUMS.
        default_model: for requests that name none; "" is the first one that can be served: built-in ones first, then
            by name.
        remote_control: which clients have the role admin: by "local" those on this host, on loopback or as root or the
            daemon's user on ipc, and those whose key says so; by "any", also all on tcp that are asked for no key; by
            "off", nobody. true is "any" and false is "off".
        devices: "auto", or names and kinds of devices: "cpu", "cuda", "cuda:N", "xpu", "xpu:N", "mps".
        spin_us: longest time in microseconds that the loop polls before it blocks; 0 blocks at once.
        drain_timeout_s: how long SIGTERM waits for running requests.
        load_timeout_s: a model that takes longer to load and warm up has failed.
        optimize_s: how long a faster variant of a model's network is looked for when it is loaded; 0: not at all.
        cache_directory: what was compiled for that is kept there; "auto" is the cache directory of the service or, for
            a user, tensornext in $XDG_CACHE_HOME or ~/.cache; "": nothing is kept.
        record_directory: the directory for recordings of requests, see `tnxd.recording`; "": nothing is recorded.
        record_max_mb: most MiB of one recording. record_queue_mb: of requests that wait to be written to it.
        stall_timeout_s: a batch that runs longer is given up; a model may have a limit of its own.
        on_device_loss: when a device is lost for good, "restart" finishes what is under way elsewhere and exits with 1,
            for a service manager to start the daemon anew; "continue" goes on without the device; "auto" restarts if
            systemd started the daemon.
        on_hang: when a batch on the serving thread does not come back, nothing can be served: "restart" exits with 1,
            "continue" waits for it, "auto" restarts if systemd started the daemon.
        log_format: "text" for people; "json" makes each line of the log and of output an event for machines.
    """

    bind: _Names = (f"tcp://127.0.0.1:{DEFAULT_PORT}",)
    insecure: bool = False
    models: tuple[str, ...] = ()
    model_repository: str = ""
    require_manifest: bool = False
    default_model: str = ""
    remote_control: Literal["local", "any", "off"] | bool = "local"
    devices: _Names = ("auto",)
    spin_us: Annotated[float, msgspec.Meta(ge=0, le=10_000)] = 100.0
    drain_timeout_s: _Positive = 30.0
    load_timeout_s: _Positive = 300.0
    optimize_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    cache_directory: str = "auto"
    record_directory: str = ""
    record_max_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1024.0
    record_queue_mb: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 64.0
    stall_timeout_s: _Positive = 60.0
    on_device_loss: Literal["auto", "restart", "continue"] = "auto"
    on_hang: Literal["auto", "restart", "continue"] = "auto"
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    cpu: Cpu = Cpu()
    cuda: Cuda = Cuda()
    xpu: Streams = Streams()
    queue: Queue = Queue()
    clients: Clients = Clients()
    keys: Keys = Keys()
    memory: Memory = Memory()
    traces: Traces = Traces()
    limits: Limits = Limits()


def control_of(config: Config) -> str:
    """Clients that may send admin commands: "local", "any" or "off"."""
    control = config.remote_control
    if isinstance(control, bool):
        return "any" if control else "off"
    return control


_ADDRESS = re.compile(r"[^/]+:(\d+|\*)")


def load(path: Path | None, overrides: Mapping[str, Any]) -> Config:
    """Read a TOML file and lay the overrides (flags, environment) over it.

    Args:
        path: None for the defaults alone.
        overrides: top-level keys, and tables as nested mappings; None means "not given".

    Raises:
        InvalidArgument: the file cannot be read, a key is unknown, a value is out of range. The sentence names it.
    """
    origin = "configuration"
    settings: dict[str, Any] = {}
    if path is not None:
        origin = str(path)
        settings = tomlfile.read(path)
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            table = settings.setdefault(key, {})
            if isinstance(table, dict):
                table.update({name: item for name, item in value.items() if item is not None})
        elif value is not None:
            settings[key] = value
    config = tomlfile.convert(settings, Config, origin)
    config = msgspec.structs.replace(config, bind=tuple(map(_with_transport, config.bind)))
    _check(config, origin)
    return config


def _with_transport(endpoint: str) -> str:
    """Endpoint with its transport: ADDRESS:PORT alone is tcp://."""
    return f"tcp://{endpoint}" if _ADDRESS.fullmatch(endpoint) else endpoint


def _check(config: Config, origin: str) -> None:
    for endpoint in config.bind:
        if not endpoint.startswith(("tcp://", "ipc://")):
            raise InvalidArgument(
                f"{origin}: bind: {endpoint!r} is not an endpoint: tcp://ADDRESS:PORT or ipc://PATH, "
                f"tcp://127.0.0.1:{DEFAULT_PORT} for one"
            )
        port = endpoint.rpartition(":")[2]
        if endpoint.startswith("tcp://") and not (port == "*" or (port.isdigit() and int(port) < 65536)):
            raise InvalidArgument(f"{origin}: bind: {endpoint!r} has no port from 1 to 65535, or *")
    receiver = config.traces.endpoint
    if receiver and not (receiver.startswith(("http://", "https://")) and urlsplit(receiver).hostname):
        raise InvalidArgument(
            f"{origin}: traces.endpoint: {receiver!r} is not an address: http://127.0.0.1:4318 for one"
        )
    message_mb = (config.limits.message_bytes + config.limits.header_bytes) / MIB
    for key in ("max_mb", "memory_mb"):
        value = getattr(config.clients, key)
        if value < message_mb:
            raise InvalidArgument(
                f"{origin}: clients.{key}: {value:g} MiB are less than one message may have by [limits], "
                f"{message_mb:g} MiB"
            )
    if 0 < config.clients.shared_memory_mb < 1:
        raise InvalidArgument(
            f"{origin}: clients.shared_memory_mb: {config.clients.shared_memory_mb:g} MiB are too few to share: at "
            f"least 1, or 0 for none"
        )
    for name in config.models:
        if config.models.count(name) > 1:
            raise InvalidArgument(f"{origin}: models: {name!r} stands there twice")
    for device in config.devices:
        if device != "auto" and not DEVICE.fullmatch(device):
            raise InvalidArgument(f"{origin}: devices: {device!r} is none of auto, {DEVICES}")
