"""The client for asyncio. `tnxctl.loop_driver` drives its calls."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tnxctl import process
from tnxctl.balancer import Balancer
from tnxctl.busypoll import check_busy_poll
from tnxctl.durations import spell
from tnxctl.encoder import DEFAULT_TIMEOUT_S
from tnxctl.endpoint import DEFAULT_ENDPOINT
from tnxctl.loop_driver import LoopDriver, OtherThreadDriver, driver_of
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import (
    ClientsReport,
    Comparison,
    HealthReport,
    Identity,
    KeysReport,
    Limits,
    ModelInfo,
    RecordingReport,
    ReloadReport,
    SlowRequest,
    StatsReport,
)
from tnxctl.results import Result, Traffic
from tnxctl.sessions import session_of
from tnxctl.tracing import traceparent_of

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
else:
    Array = Any  # see `tnxctl.results`


class AsyncClient:
    """`tnxctl.Client` with `await`: same arguments, results and errors.

        async with AsyncClient("192.168.1.100") as tnx:
            results = await asyncio.gather(*(tnx.predict(x) for x in batches))

    It belongs to the event loop of its first call, and is used from that loop's thread only. Cancelling a task
    cancels its prediction. The arrays of a call must stay unchanged until it is done.

    Args:
        busy_poll: seconds for which the loop looks for what comes next without sleeping, at most, while there is one
            call at a time and each has been short; from 0 (never) to 1. It is there sooner so, and a core has no rest.
    """

    def __init__(
        self,
        endpoint: str | Sequence[str] = DEFAULT_ENDPOINT,
        *,
        timeout: float = DEFAULT_TIMEOUT_S,
        limits: Limits | None = None,
        hedge: bool | float = False,
        key: str | os.PathLike[str] | None = None,
        server_key: str | None = None,
        shared_memory: bool = False,
        busy_poll: float = 0.0,
    ) -> None:
        self._given = endpoint
        self._busy_poll_s = check_busy_poll(busy_poll)
        self._session = session_of(endpoint, timeout, limits, hedge, key, server_key, shared_memory)
        self._encoder = self._session.encoder
        self._driver: LoopDriver | OtherThreadDriver | None = None
        self._generation = process.forks

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.endpoint}, timeout {spell(self._session.timeout)}>"

    def __reduce__(self) -> NoReturn:
        raise process.pickle_error(self, f"{self._given!r}, timeout={self._session.timeout:g}")

    @property
    def endpoint(self) -> str:
        """The daemon's address, as ZeroMQ spells it; of several, with commas between them."""
        return self._session.endpoint

    @property
    def shares_memory(self) -> bool:
        """Whether large tensors go through shared memory now; with several daemons, to any of them."""
        return self._session.shares_memory

    @property
    def traffic(self) -> Traffic | None:
        """The numbers of what was sent to each of several daemons, moved and hedged; with one daemon None."""
        return self._session.traffic if isinstance(self._session, Balancer) else None

    async def predict(
        self,
        inputs: object,
        *,
        model: str = "",
        prefer_gpu: bool = True,
        min_gpu_memory_mb: float = 0.0,
        device: str = "",
        deadline: float | None = None,
        priority: int | None = None,
        route_key: str = "",
        traceparent: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a model once, see `Client.predict`."""
        call = self._encoder.predict(
            inputs,
            model=model,
            prefer_gpu=prefer_gpu,
            min_gpu_memory_mb=min_gpu_memory_mb,
            device=device,
            deadline=deadline,
            priority=priority,
            route_key=route_key,
            timeout=timeout,
            now=time.monotonic(),
            traceparent=traceparent_of(traceparent),
        )
        return await self._here().run(call)

    async def health(self, *, timeout: float | None = None) -> HealthReport:
        """The state of the daemon."""
        return await self._here().run(self._encoder.health(timeout=timeout, now=time.monotonic()))

    async def metadata(self, model: str = "", *, timeout: float | None = None) -> ModelInfo:
        """The inputs and outputs of a model, see `Client.metadata`."""
        return await self._here().run(self._encoder.metadata(model, timeout=timeout, now=time.monotonic()))

    async def cast(self, inputs: object, model: str = "", *, timeout: float | None = None) -> dict[str, Array]:
        """The inputs as arrays of the datatypes that a model takes, see `Client.cast`."""
        from tnxctl.casting import cast

        return cast(inputs, await self.metadata(model, timeout=timeout))

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every version of every model, loaded or not."""
        return await self._here().run(self._encoder.models(timeout=timeout, now=time.monotonic()))

    async def load(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Load a version and wait until it is warm, see `Client.load`."""
        return await self._here().run(self._encoder.load(model, timeout=timeout, now=time.monotonic()))

    async def unload(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Stop serving a version and wait until its memory is free, see `Client.unload`."""
        return await self._here().run(self._encoder.unload(model, timeout=timeout, now=time.monotonic()))

    async def route(
        self,
        model: str,
        weights: Mapping[str, float] | Mapping[int, float],
        shadow: str | int = "",
        *,
        timeout: float | None = None,
    ) -> tuple[ModelInfo, ...]:
        """Split the traffic of a model, see `Client.route`."""
        call = self._encoder.route(model, weights, shadow=shadow, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def reload(self, *, timeout: float | None = None) -> ReloadReport:
        """Have the daemon scan its model repository again, see `Client.reload`."""
        return await self._here().run(self._encoder.reload(timeout=timeout, now=time.monotonic()))

    async def compare(
        self, model: str, baseline: str | int, candidate: str | int, *, timeout: float | None = None
    ) -> Comparison:
        """The differences of a shadow version's answers, see `Client.compare`."""
        call = self._encoder.compare(model, baseline, candidate, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def whoami(self, *, timeout: float | None = None) -> Identity:
        """The name that the daemon knows this client by, its role and its limits."""
        return await self._here().run(self._encoder.whoami(timeout=timeout, now=time.monotonic()))

    async def clients(self, *, timeout: float | None = None) -> ClientsReport:
        """The clients that are connected to the daemon, see `Client.clients`."""
        return await self._here().run(self._encoder.clients(timeout=timeout, now=time.monotonic()))

    async def kick(self, client: str, *, timeout: float | None = None) -> int:
        """End all connections of a client but this one, see `Client.kick`."""
        call = self._encoder.kick(client, timeout=timeout, now=time.monotonic())
        return (await self._here().run(call)).connections

    async def keys(self, *, timeout: float | None = None) -> KeysReport:
        """The keys that may connect, see `Client.keys`."""
        return await self._here().run(self._encoder.keys(timeout=timeout, now=time.monotonic()))

    async def stats(self, *, timeout: float | None = None) -> StatsReport:
        """The raw counts of the daemon since its start, see `Client.stats`."""
        return await self._here().run(self._encoder.stats(timeout=timeout, now=time.monotonic()))

    async def explain(
        self, request: int | None = None, *, model: str = "", timeout: float | None = None
    ) -> tuple[SlowRequest, ...]:
        """The slowest requests of the last minute, see `Client.explain`."""
        call = self._encoder.explain(request, model, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def record(
        self,
        file: str,
        *,
        seconds: float = 60.0,
        model: str = "",
        sample: float = 1.0,
        timeout: float | None = None,
    ) -> RecordingReport:
        """Have the daemon write the requests that come to a file on its host, see `Client.record`."""
        call = self._encoder.record(file, seconds, model, sample, timeout=timeout, now=time.monotonic())
        return await self._here().run(call)

    async def stop_recording(self, *, timeout: float | None = None) -> RecordingReport:
        """End the recording that is under way, see `Client.stop_recording`."""
        return await self._here().run(self._encoder.stop_recording(timeout=timeout, now=time.monotonic()))

    async def recording(self, *, timeout: float | None = None) -> RecordingReport:
        """The recording that is under way, or else the last one, see `Client.recording`."""
        return await self._here().run(self._encoder.recording(timeout=timeout, now=time.monotonic()))

    async def close(self) -> None:
        """Close the connection. Calls under way fail with Cancelled. Idempotent."""
        if self._generation == process.forks:  # else it is a parent's
            self._here().close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        driver = getattr(self, "_driver", None)
        if (
            driver is not None and self._generation == process.forks
        ):  # else it is a parent's, and so is the loop's poller
            driver.forget()

    def _here(self) -> LoopDriver | OtherThreadDriver:
        """The driver, bound to the running loop by the first call."""
        loop = asyncio.get_running_loop()
        if self._generation != process.forks and self._driver is not None:
            raise process.fork_error(self.endpoint)
        if self._driver is None:
            self._generation = process.forks
            self._driver = driver_of(self._session, loop, self._busy_poll_s)
        elif self._driver.loop is not loop:
            raise FailedPrecondition(f"the client of {self.endpoint} belongs to another event loop: make one per loop")
        return self._driver
