"""A daemon that only pretends: answers by the book, late, wrongly or never, as a test wants it."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import zmq

from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import datatype_of
from tnxctl.protocol.errors import InvalidArgument, NotFound, TensorNextError
from tnxctl.protocol.frames import view_tensors
from tnxctl.protocol.strings import encode

MLP = wire.ModelInfo(
    name="mlp",
    version="1",
    status="ready",
    default=True,
    inputs=(wire.TensorSpec("input", "FP32", (-1, 256)),),
    outputs=(wire.TensorSpec("output", "FP32", (-1, 128)),),
    max_batch_size=64,
    devices=("cpu",),
)
DIGITS = wire.ModelInfo(
    name="digits",
    version="3",
    status="ready",
    inputs=(wire.TensorSpec("image", "FP32", (-1, 64)),),
    outputs=(wire.TensorSpec("scores", "FP32", (-1, 10)),),
    max_batch_size=64,
    devices=("cpu",),
)
RESNET = wire.ModelInfo(
    name="resnet",
    version="1",
    status="ready",
    inputs=(wire.TensorSpec("image", "FP32", (-1, 3, 224, 224)),),
    outputs=(wire.TensorSpec("scores", "FP32", (-1, 1000)),),
    max_batch_size=64,
    devices=("cpu", "cuda:0"),
    format="pt2",
    traffic=1.0,
    memory_mb=97.5,
    requests=120,
    load_s=3.25,
)
RESNETS = (RESNET, msgspec.structs.replace(RESNET, version="2", status="unloaded", devices=(), traffic=0.0))
CPU = wire.DeviceInfo(
    name="cpu",
    status="ready",
    description="a processor of many words that no terminal has room for, at 3.1 GHz",
    lanes=2,
    busy_lanes=1,
    memory_free_mb=900.0,
    memory_total_mb=15974.0,
)
ALICE = wire.ClientInfo(
    name="alice",
    by="key",
    role="predict",
    addresses=("10.0.0.7", "10.0.0.8"),
    connections=3,
    connected_s=7509.0,
    requests=1200,
    in_flight=4,
    received_bytes=3 * wire.MIB,
)
SILENT = wire.ClientInfo(
    name="10.0.0.9",
    by="address",
    role="",
    addresses=(),
    connections=1,
    connected_s=0.0,
    requests=0,
    in_flight=0,
    received_bytes=0,
)
KEY = wire.KeyInfo(
    name="alice",
    role="predict",
    key="rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7",
    connections=3,
    max_requests=256,
    max_mb=64.0,
)
IDENTITY = wire.Identity(
    v=1,
    id=0,
    name="alice",
    by="key",
    role="predict",
    address="10.0.0.7",
    connections=3,
    max_requests=256,
    max_mb=64.0,
    rate=500.0,
    share=2.0,
)
TIMING = wire.Timing(
    receive_us=10.0,
    queue_us=20.0,
    gather_us=5.0,
    h2d_us=0.0,
    compute_us=100.0,
    d2h_us=0.0,
    reply_us=15.0,
    total_us=150.0,
)

STATS = wire.StatsReport(v=1, id=0, status="ready", version="0.1.0", started_s=1000.0, uptime_us=7509e6)

Outputs = dict[str, np.ndarray]
Change = wire.Load | wire.Unload | wire.Route | wire.Reload
Compute = Callable[[wire.Predict, Outputs], Outputs]


def row_sums(request: wire.Predict, inputs: Outputs) -> Outputs:
    """Model digits -> 10 and others -> 128 columns; column j of a row is the sum of the input row, plus j."""
    name, columns = ("scores", 10) if request.model == "digits" else ("output", 128)
    (array,) = inputs.values()
    return {name: (array.sum(axis=1, keepdims=True) + np.arange(columns)).astype(np.float32)}


def obey(request: Change, models: tuple[wire.ModelInfo, ...]) -> tuple[wire.ModelInfo, ...]:
    """The models after a change, as far as clients can tell."""
    if isinstance(request, wire.Reload):
        return models
    name, version = wire.split_title(request.model)
    changed = []
    for model in models:
        if model.name == name and isinstance(request, wire.Route):
            total = sum(request.weights.values()) or 1.0
            share = request.weights.get(model.version, 0.0) / total
            model = msgspec.structs.replace(model, traffic=share, shadow=model.version == request.shadow)
        elif model.name == name and version in ("", model.version):
            loads = isinstance(request, wire.Load)
            model = msgspec.structs.replace(
                model, status="ready" if loads else "unloaded", devices=("cpu",) if loads else ()
            )
        changed.append(model)
    return tuple(changed)


def comparison(request: wire.Compare) -> wire.Comparison:
    """Two outputs, one without an arg-max, and a failure."""
    return wire.Comparison(
        v=1,
        id=request.id,
        model=request.model,
        baseline=request.baseline,
        candidate=request.candidate,
        requests=200,
        errors=1,
        skipped=7,
        outputs=(
            wire.OutputDifference(
                name="scores", elements=200_000, max_abs=1.5e-5, mean_abs=2e-7, argmax_agreement=0.995, misfits=0
            ),
            wire.OutputDifference(
                name="mask", elements=200, max_abs=0.0, mean_abs=0.0, argmax_agreement=None, misfits=3
            ),
        ),
        baseline_us=wire.Percentiles(count=150, p50_us=8000.0, p90_us=9000.0, p99_us=12000.0),
        candidate_us=wire.Percentiles(count=150, p50_us=4000.0, p90_us=5000.0, p99_us=6500.0),
        last_error="it met a NaN",
    )


@dataclass(frozen=True)
class Behaviour:
    """Settings of how the fake behaves.

    Attributes:
        compute: inputs -> outputs; a TensorNextError that it raises becomes the error reply.
        delay_s: from a predict request to its reply. load_delay_s: from a change of the models to its reply.
        looks: how many requests for the models have to come before a change is answered.
        change: a change, models -> models; a TensorNextError that it raises becomes the error reply.
        reloaded: what reload reports say, the `v` and `id` aside.
        mute: no verb is ever answered.
        device, reason, predicted_us: what results say.
        version_of: the version that the result of the nth predict request says; None: the model's.
        abandoned, prediction_error_us, resent: what health reports say.
        identity: what whoami reports say. clients: that are connected. keys: that may connect.
        more_clients, more_keys: that no report has room for.
        stats: what the nth answer about counts says, the `id` aside. slowest: what explanations say.
    """

    status: str = "ready"
    models: tuple[wire.ModelInfo, ...] = (MLP, DIGITS)
    devices: tuple[wire.DeviceInfo, ...] = (CPU,)
    errors: tuple[tuple[str, int], ...] = ()
    compute: Compute = row_sums
    delay_s: float = 0.0
    load_delay_s: float = 0.0
    looks: int = 0
    change: Callable[[Change, tuple[wire.ModelInfo, ...]], tuple[wire.ModelInfo, ...]] = obey
    reloaded: dict[str, object] = field(default_factory=dict)
    mute: bool = False
    device: str = "cpu"
    reason: str = "no GPU here"
    predicted_us: float = 110.0
    version_of: Callable[[int], str] | None = None
    abandoned: int = 0
    resent: int = 0
    prediction_error_us: float = 0.0
    identity: wire.Identity = IDENTITY
    clients: tuple[wire.ClientInfo, ...] = (ALICE, SILENT)
    more_clients: int = 0
    keys: tuple[wire.KeyInfo, ...] = (KEY,)
    more_keys: int = 0
    stats: Callable[[int], wire.StatsReport] = lambda _: STATS
    slowest: tuple[wire.SlowRequest, ...] = ()


class FakeDaemon:
    """A ROUTER in a thread, from `with` to the end of it.

    Attributes:
        endpoint: where it listens.
        models: as they are now.
        predicts: the predict requests that came, in order. inputs: their tensors.
        changes: the requests that change the models, in order.
        requests: how many requests of any verb came. looks_at_stats: those for counts.
        cancelled: ids of those that their clients withdrew; they are computed all the same.
    """

    def __init__(self, endpoint: str = "tcp://127.0.0.1:*", **behaviour: object) -> None:
        self._behaviour = replace(Behaviour(), **behaviour)
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.bind(endpoint)
        self.endpoint = self._router.last_endpoint.decode()
        self.models = self._behaviour.models
        self.predicts: list[wire.Predict] = []
        self.changes: list[Change] = []
        self.inputs: list[Outputs] = []
        self.cancelled: list[int] = []
        self._stop, self._stopped = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._stop.bind("inproc://stop")
        self._stopped.connect("inproc://stop")
        self.requests = 0
        self.looks_at_stats = 0
        self._arrival = threading.Condition()
        self._due: list[tuple[float, int, Sequence[bytes]]] = []
        self._order = itertools.count()
        self._looks_left = self._behaviour.looks
        self._held: list[tuple[float, int, Sequence[bytes]]] = []
        self._thread = threading.Thread(target=self._serve, name="fake daemon")

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"")
        self._thread.join()
        self._context.destroy(linger=0)

    def wait_for_requests(self, count: int, timeout_s: float) -> bool:
        """Wait until so many requests of any verb have come. False if they do not come in time."""
        with self._arrival:
            return self._arrival.wait_for(lambda: self.requests >= count, timeout_s)

    def wait_for_predicts(self, count: int, timeout_s: float) -> bool:
        """Wait until so many predict requests have come. False if they do not come in time."""
        with self._arrival:
            return self._arrival.wait_for(lambda: len(self.predicts) >= count, timeout_s)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) * 1e3 if self._due else None
            ready = dict(poller.poll(wait))
            if self._stopped in ready:
                return
            if self._router in ready:
                peer, *frames = self._router.recv_multipart()
                reply = self._answer(frames)
                with self._arrival:
                    self.requests += 1
                    self._arrival.notify_all()
                if reply is not None:
                    self._schedule(peer, frames[0], reply)
            while self._due and self._due[0][0] <= time.monotonic():
                self._router.send_multipart(heapq.heappop(self._due)[2])

    def _schedule(self, peer: bytes, header: bytes, reply: Sequence[bytes]) -> None:
        """Put a reply among those that are due. One to a change may have to wait until clients have looked."""
        request = wire.decode_request(header, wire.Limits())
        if isinstance(request, wire.Models):
            self._looks_left -= 1
        entry = (time.monotonic() + self._delay_s(header, reply), next(self._order), [peer, *reply])
        if isinstance(request, Change) and self._looks_left > 0:
            self._held.append(entry)
            return
        heapq.heappush(self._due, entry)
        if self._looks_left <= 0:
            for held in self._held:
                heapq.heappush(self._due, held)
            self._held.clear()

    def _delay_s(self, header: bytes, reply: list[bytes]) -> float:
        if len(reply) > 1:
            return self._behaviour.delay_s
        request = wire.decode_request(header, wire.Limits())
        return self._behaviour.load_delay_s if isinstance(request, Change) else 0.0

    def _answer(self, frames: list[bytes]) -> list[bytes] | None:
        limits = wire.Limits()
        request = wire.decode_request(frames[0], limits)
        if isinstance(request, wire.Cancel):
            self.cancelled.append(request.id)
            return None
        if self._behaviour.mute:
            return None
        try:
            if isinstance(request, wire.Predict):
                return self._predict(request, view_tensors(request.inputs, frames[1:], limits))
            if isinstance(request, wire.Metadata):
                return [wire.encode(wire.MetadataReport(v=1, id=request.id, model=self._model(request.model)))]
            if isinstance(request, Change):
                return [wire.encode(self._change(request))]
            if isinstance(request, wire.Compare):
                self._model(request.model)
                return [wire.encode(comparison(request))]
            if isinstance(request, wire.WhoAmI | wire.Clients | wire.Kick | wire.Keys):
                return [wire.encode(self._about_clients(request))]
            if isinstance(request, wire.Stats):
                self.looks_at_stats += 1
                return [wire.encode(msgspec.structs.replace(self._behaviour.stats(self.looks_at_stats), id=request.id))]
            if isinstance(request, wire.Explain):
                return [wire.encode(self._explain(request))]
            if isinstance(request, wire.Models):
                return [wire.encode(wire.ModelsReport(v=1, id=request.id, models=self.models))]
            return [wire.encode(self._health(request.id))]
        except TensorNextError as error:
            return [wire.encode(wire.ErrorReply(v=1, id=request.id, code=error.code, message=error.message))]

    def _about_clients(self, request: wire.WhoAmI | wire.Clients | wire.Kick | wire.Keys) -> wire.Reply:
        if isinstance(request, wire.WhoAmI):
            return msgspec.structs.replace(self._behaviour.identity, id=request.id)
        clients, keys = self._behaviour.clients, self._behaviour.keys
        if isinstance(request, wire.Keys):
            return wire.KeysReport(v=1, id=request.id, keys=keys, total=len(keys) + self._behaviour.more_keys)
        if isinstance(request, wire.Clients):
            total = len(clients) + self._behaviour.more_clients
            return wire.ClientsReport(v=1, id=request.id, clients=clients, total=total)
        count = sum(client.connections for client in clients if client.name == request.client)
        if not count:
            raise NotFound(f"no other connection is of a client {request.client!r}")
        return wire.KickReport(v=1, id=request.id, connections=count)

    def _explain(self, request: wire.Explain) -> wire.Explanation:
        model = self._model(request.model) if request.model else None
        found = tuple(
            slow
            for slow in self._behaviour.slowest
            if request.request in (None, slow.id) and (model is None or model.name == slow.model)
        )
        return wire.Explanation(v=1, id=request.id, requests=found)

    def _model(self, title: str) -> wire.ModelInfo:
        name, version = wire.split_title(title) if title else ("", "")
        for model in self.models:
            if (model.name == name and version in ("", model.version)) or (not name and model.default):
                return model
        raise NotFound(f"no model {title!r}")

    def _change(self, request: Change) -> wire.ModelsReport | wire.ReloadReport:
        self.changes.append(request)
        name = "" if isinstance(request, wire.Reload) else self._model(request.model).name
        self.models = self._behaviour.change(request, self.models)
        if isinstance(request, wire.Reload):
            return wire.ReloadReport(v=1, id=request.id, **self._behaviour.reloaded)
        return wire.ModelsReport(v=1, id=request.id, models=tuple(m for m in self.models if m.name == name))

    def _predict(self, request: wire.Predict, arrays: Sequence[np.ndarray]) -> list[bytes]:
        model = self._model(request.model)
        inputs = {spec.name: array for spec, array in zip(request.inputs, arrays, strict=True)}
        self.predicts.append(request)
        self.inputs.append({name: array.copy() for name, array in inputs.items()})
        for spec in request.inputs:
            wanted = model.inputs[0].shape[1:]
            fits = len(wanted) == len(spec.shape[1:]) and all(
                length in (-1, got) for length, got in zip(wanted, spec.shape[1:], strict=True)
            )
            if spec.name in ("", "input", "image") and not fits:
                raise InvalidArgument(f"input {spec.name!r}: shape {list(spec.shape)} does not fit {model.name}")
        outputs = self._behaviour.compute(request, inputs)
        version_of = self._behaviour.version_of
        specs = tuple(
            wire.TensorSpec(name, str(datatype_of(array.dtype)), array.shape) for name, array in outputs.items()
        )
        header = wire.Result(
            v=1,
            id=request.id,
            model=model.name,
            version=model.version if version_of is None else version_of(len(self.predicts)),
            outputs=specs,
            device=self._behaviour.device,
            reason=self._behaviour.reason,
            batch_size=arrays[0].shape[0] if arrays[0].ndim else 1,
            latency_ms=0.1,
            gpu_memory_mb=0.0,
            timing=TIMING,
            predicted_us=self._behaviour.predicted_us,
        )
        frames = [encode(array) if array.dtype.hasobject else array for array in outputs.values()]
        return [wire.encode(header), *(frame.tobytes() for frame in frames)]

    def _health(self, request_id: int) -> wire.HealthReport:
        return wire.HealthReport(
            v=1,
            id=request_id,
            status=self._behaviour.status,
            cuda_available=False,
            current_device="cpu",
            gpu_memory_free_mb=0.0,
            version="0.1.0",
            uptime_s=7509.0,
            devices=self._behaviour.devices,
            models=self.models,
            queued=1,
            running=2,
            requests=1205,
            replies=1200,
            errors=dict(self._behaviour.errors),
            undeliverable=0,
            abandoned=self._behaviour.abandoned,
            prediction_error_us=self._behaviour.prediction_error_us,
            resent=self._behaviour.resent,
        )
