"""The requests of a client: arguments in, encoded calls out, and readers of the replies to them.

No socket, no thread, no clock: times come in as arguments, in seconds of any monotonic clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tnxctl.arguments import (
    check_deadline,
    check_flag,
    check_megabytes,
    check_name,
    check_priority,
    check_string,
    check_timeout,
    check_title,
    check_version,
    check_weights,
)
from tnxctl.call import Call, ReplyReader
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import (
    ClientsReport,
    Comparison,
    HealthReport,
    Identity,
    KeysReport,
    KickReport,
    Limits,
    ModelInfo,
    RecordingReport,
    ReloadReport,
    SlowRequest,
    StatsReport,
)
from tnxctl.results import Result

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 5.0
LOAD_TIMEOUT_S = 600.0
"""Timeout of `load`, `unload` and `reload`, unless that of the client is longer: large weights take their time to
read, compilers theirs, and what is unloaded first finishes what it has."""


class RequestEncoder:
    """Encodes the requests of one client. May be used from any thread.

    Args:
        timeout: seconds allowed to a call that names no timeout of its own.
        limits: most that a message may hold.

    Attributes:
        ids: the ids of the requests to come; each is used once.

    Raises:
        InvalidArgument: the timeout is not one.
    """

    def __init__(self, timeout: float, limits: Limits) -> None:
        self.timeout = check_timeout(timeout)
        self.limits = limits
        self.ids = itertools.count(1)

    def predict(
        self,
        inputs: object,
        *,
        model: str,
        prefer_gpu: bool,
        min_gpu_memory_mb: float,
        device: str,
        deadline: float | None,
        priority: int | None,
        route_key: str,
        timeout: float | None,
        now: float,
        traceparent: str = "",
        copy: bool = False,
    ) -> Call[Result]:
        """Encode a predict request.

        Args:
            inputs: one array, or a mapping of names to arrays: see `tnxctl.tensors.to_wire`.
            deadline: seconds from `now`; the call fails when it or the timeout is over, whichever is earlier.
            traceparent: as `tnxctl.tracing.traceparent_of` has it.
            copy: take the inputs as they are now. Otherwise they must stay unchanged until the call is done.

        Raises:
            InvalidArgument: an argument that can never work; the sentence names it.
        """
        from tnxctl.tensors import pack  # numpy costs more to import than all of `tnxctl health`

        specs, arrays, nbytes = pack(inputs, self.limits, copy)
        timeout_s = self._timeout_s(timeout)
        firm_deadline, deadline_us = False, None
        if deadline is not None:
            seconds = check_deadline(deadline)
            firm_deadline = seconds <= timeout_s
            timeout_s = min(seconds, timeout_s)
            deadline_us = timeout_s * 1e6
        request = wire.Predict(
            v=wire.VERSION,
            id=next(self.ids),
            inputs=specs,
            model=check_string("model", model),
            prefer_gpu=check_flag("prefer_gpu", prefer_gpu),
            min_gpu_memory_mb=check_megabytes("min_gpu_memory_mb", min_gpu_memory_mb),
            device=check_string("device", device),
            deadline_us=deadline_us,
            sent_us=None if deadline_us is None else now * 1e6,
            priority=None if priority is None else check_priority(priority),
            route_key=check_string("route_key", route_key),
            max_reply_bytes=self.limits.message_bytes,
            traceparent=traceparent,
        )
        return self._call(request, arrays, nbytes, _read_result, timeout_s, now, firm_deadline)

    def health(self, *, timeout: float | None, now: float) -> Call[HealthReport]:
        """Encode a health request."""
        request = wire.Health(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(HealthReport), self._timeout_s(timeout), now)

    def metadata(self, model: str, *, timeout: float | None, now: float) -> Call[ModelInfo]:
        """Encode a metadata request."""
        request = wire.Metadata(v=wire.VERSION, id=next(self.ids), model=check_string("model", model))
        return self._call(request, [], 0, _read_metadata, self._timeout_s(timeout), now)

    def models(self, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode a request for all models."""
        request = wire.Models(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _read_models, self._timeout_s(timeout), now)

    def load(self, model: str, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode a load request. Raises InvalidArgument if `model` is neither NAME nor NAME@VERSION."""
        request = wire.Load(v=wire.VERSION, id=next(self.ids), model=check_title(model))
        return self._slow_call(request, _read_models, timeout, now)

    def unload(self, model: str, *, timeout: float | None, now: float) -> Call[tuple[ModelInfo, ...]]:
        """Encode an unload request. Raises InvalidArgument if `model` is neither NAME nor NAME@VERSION."""
        request = wire.Unload(v=wire.VERSION, id=next(self.ids), model=check_title(model))
        return self._slow_call(request, _read_models, timeout, now)

    def route(
        self,
        model: str,
        weights: Mapping[str, float] | Mapping[int, float],
        *,
        shadow: str | int,
        timeout: float | None,
        now: float,
    ) -> Call[tuple[ModelInfo, ...]]:
        """Encode a route request. Raises InvalidArgument; the sentence names the argument."""
        request = wire.Route(
            v=wire.VERSION,
            id=next(self.ids),
            model=check_name(model),
            weights=check_weights(weights),
            shadow="" if shadow == "" else check_version("shadow", shadow),
        )
        return self._call(request, [], 0, _read_models, self._timeout_s(timeout), now)

    def reload(self, *, timeout: float | None, now: float) -> Call[ReloadReport]:
        """Encode a reload request."""
        request = wire.Reload(v=wire.VERSION, id=next(self.ids))
        return self._slow_call(request, _reader(ReloadReport), timeout, now)

    def compare(
        self, model: str, baseline: str | int, candidate: str | int, *, timeout: float | None, now: float
    ) -> Call[Comparison]:
        """Encode a compare request. Raises InvalidArgument; the sentence names the argument."""
        request = wire.Compare(
            v=wire.VERSION,
            id=next(self.ids),
            model=check_name(model),
            baseline=check_version("baseline", baseline),
            candidate=check_version("candidate", candidate),
        )
        return self._call(request, [], 0, _reader(Comparison), self._timeout_s(timeout), now)

    def whoami(self, *, timeout: float | None, now: float) -> Call[Identity]:
        """Encode a whoami request."""
        request = wire.WhoAmI(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(Identity), self._timeout_s(timeout), now)

    def clients(self, *, timeout: float | None, now: float) -> Call[ClientsReport]:
        """Encode a request for all clients."""
        request = wire.Clients(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(ClientsReport), self._timeout_s(timeout), now)

    def kick(self, client: str, *, timeout: float | None, now: float) -> Call[KickReport]:
        """Encode a request to end a client's connections. Raises InvalidArgument; the sentence names the argument."""
        request = wire.Kick(v=wire.VERSION, id=next(self.ids), client=check_string("client", client))
        return self._call(request, [], 0, _reader(KickReport), self._timeout_s(timeout), now)

    def keys(self, *, timeout: float | None, now: float) -> Call[KeysReport]:
        """Encode a request for the keys that may connect."""
        request = wire.Keys(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(KeysReport), self._timeout_s(timeout), now)

    def stats(self, *, timeout: float | None, now: float) -> Call[StatsReport]:
        """Encode a request for the raw counts."""
        request = wire.Stats(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(StatsReport), self._timeout_s(timeout), now)

    def explain(
        self, request: int | None, model: str, *, timeout: float | None, now: float
    ) -> Call[tuple[SlowRequest, ...]]:
        """Encode a request for the slowest requests. Raises InvalidArgument; the sentence names the argument."""
        if request is not None and not 0 <= request <= wire.MAX_ID:
            raise InvalidArgument(f"request is {request!r}, and ids are from 0 to {wire.MAX_ID}")
        asked = wire.Explain(v=wire.VERSION, id=next(self.ids), request=request, model=check_string("model", model))
        return self._call(asked, [], 0, _read_explanation, self._timeout_s(timeout), now)

    def record(
        self, file: str, seconds: float, model: str, sample: float, *, timeout: float | None, now: float
    ) -> Call[RecordingReport]:
        """Encode a request to record. Raises InvalidArgument; the sentence names the argument."""
        if not 0 < seconds <= wire.MAX_RECORDING_S:  # which NaN is not
            raise InvalidArgument(f"seconds is {seconds!r}, not above 0 and up to {wire.MAX_RECORDING_S:g}")
        if not 0 < sample <= 1:
            raise InvalidArgument(f"sample is {sample!r}, not above 0 and up to 1")
        request = wire.Record(
            v=wire.VERSION,
            id=next(self.ids),
            file=check_string("file", file),
            seconds=float(seconds),
            model=check_title(model) if model else "",
            sample=float(sample),
        )
        return self._call(request, [], 0, _reader(RecordingReport), self._timeout_s(timeout), now)

    def stop_recording(self, *, timeout: float | None, now: float) -> Call[RecordingReport]:
        """Encode a request to end the recording."""
        request = wire.StopRecording(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(RecordingReport), self._timeout_s(timeout), now)

    def recording(self, *, timeout: float | None, now: float) -> Call[RecordingReport]:
        """Encode a request about the recording."""
        request = wire.Recording(v=wire.VERSION, id=next(self.ids))
        return self._call(request, [], 0, _reader(RecordingReport), self._timeout_s(timeout), now)

    def _timeout_s(self, timeout: float | None) -> float:
        return self.timeout if timeout is None else check_timeout(timeout)

    def _slow_call(self, request: wire.Request, read: ReplyReader[T], timeout: float | None, now: float) -> Call[T]:
        """A call that may take long once it is sent, but waits for a connection no longer than others."""
        timeout_s = max(LOAD_TIMEOUT_S, self.timeout) if timeout is None else check_timeout(timeout)
        return self._call(request, [], 0, read, timeout_s, now, connect_timeout=min(self.timeout, timeout_s))

    def _call(
        self,
        request: wire.Request,
        arrays: list[Array],
        nbytes: int,
        read: ReplyReader[T],
        timeout_s: float,
        now: float,
        firm_deadline: bool = False,
        connect_timeout: float | None = None,
    ) -> Call[T]:
        try:
            header = wire.encode(request)
        except ValueError as error:  # a lone surrogate has no UTF-8
            raise InvalidArgument(f"the request cannot be encoded: {error}") from None
        if len(header) > self.limits.header_bytes:
            raise InvalidArgument(
                f"the header takes {len(header)} bytes, more than the limit of {self.limits.header_bytes}"
            )
        connect_timeout = timeout_s if connect_timeout is None else connect_timeout
        return Call(request, [header, *arrays], nbytes, read, timeout_s, connect_timeout, firm_deadline, now)


def _read_result(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> Result:
    if not isinstance(reply, wire.Result):
        raise _unexpected(reply, wire.Result)
    from tnxctl.tensors import unpack

    return Result(
        outputs=unpack(reply.outputs, frames[1:], limits),
        model=reply.model,
        version=reply.version,
        device=reply.device,
        reason=reply.reason,
        batch_size=reply.batch_size,
        latency_ms=reply.latency_ms,
        gpu_memory_mb=reply.gpu_memory_mb,
        timing=reply.timing,
        predicted_us=reply.predicted_us,
        steps=reply.steps or (),
    )


def _reader(kind: type[T]) -> ReplyReader[T]:
    """A reader of replies that are of this type and have no tensors."""

    def read(reply: wire.Reply, frames: Sequence[bytes], _: Limits) -> T:
        if not isinstance(reply, kind):
            raise _unexpected(reply, kind)
        if len(frames) > 1:
            raise InvalidArgument(f"{len(frames) - 1} tensor frames came with a reply that has none")
        return reply

    return read


def _read_metadata(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> ModelInfo:
    return _reader(wire.MetadataReport)(reply, frames, limits).model


def _read_explanation(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> tuple[SlowRequest, ...]:
    return _reader(wire.Explanation)(reply, frames, limits).requests


def _read_models(reply: wire.Reply, frames: Sequence[bytes], limits: Limits) -> tuple[ModelInfo, ...]:
    return _reader(wire.ModelsReport)(reply, frames, limits).models


def _unexpected(reply: wire.Reply, expected: type[Any]) -> InvalidArgument:
    return InvalidArgument(f"expected a {expected.__name__}, got a {type(reply).__name__}")
