"""The client for ordinary code: blocking calls, and futures for many calls at once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tnxctl import process
from tnxctl.balancer import Balancer
from tnxctl.driver import ThreadDriver
from tnxctl.durations import spell
from tnxctl.encoder import DEFAULT_TIMEOUT_S
from tnxctl.endpoint import DEFAULT_ENDPOINT
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


class Client:
    """A client of one daemon, or of several that serve the same models.

        with Client("192.168.1.100", timeout=5.0) as tnx:
            result = tnx.predict(x, model="digits")
            result.output, result.device, result.timing.total_us

    Thread-safe: any number of threads may use one client at once, over its one connection. It connects when the
    first call needs it, and again when the daemon comes back: a call succeeds if its timeout allows for that. What was
    under way is sent again then, so a prediction may be computed more than once; it is answered once
    (docs/protocol.md, "Resending").
    After a fork, the child needs a client of its own; one that has been used before answers every call with
    FailedPrecondition there, as do futures that were not done. A client cannot be pickled or copied: pass its address.

    Every call takes a `timeout` in seconds, the client's own where it is None, and raises one of
    `tnxctl.protocol.errors`:
    InvalidArgument before anything is sent, Unavailable if the daemon could not be reached in time,
    Unauthenticated, at once, if the daemon does not let this client in or is not the one that is known,
    DeadlineExceeded if it could but did not answer, or if a deadline passed, Cancelled if the client was closed
    meanwhile, FailedPrecondition if it was closed before, ResourceExhausted if too much is under way already,
    Internal for a malformed answer, and whatever error the daemon answers. The daemon is told of a prediction that was
    given up, by Ctrl-C for instance, and does not compute it if it has not yet begun.

    `load`, `unload`, `route` and `reload` change what the daemon serves, for everybody, and write it to no file. The
    daemon goes on with them when nobody waits any more, after a timeout or Ctrl-C. They are not sent again on a new
    connection, as the others are, unless the daemon says that it stops and has not done them: a connection that breaks
    under them is an Unavailable error, `models` tells what has become of them, and to ask for the same once more does
    no harm. `load`, `unload` and `reload` take long, so
    their timeout is `tnxctl.encoder.LOAD_TIMEOUT_S`, ten minutes, unless the client's own is longer; to reach
    the daemon, they take no longer than the client's own. A daemon that lets no client change what it serves answers
    them with PermissionDenied.

    With several endpoints, `predict`, `submit`, `metadata` and `cast` go to any of the daemons, the least busy first,
    and move on to another one within their time, see `tnxctl.balancer`. All other calls are about one daemon, and raise
    InvalidArgument: make a client for that one. Each daemon splits traffic for itself.

    Args:
        endpoint: an address, a host name, tcp://... or ipc://..., see `tnxctl.endpoint.parse_endpoint`; or a list of
            them.
        timeout: seconds allowed to a call that names no timeout of its own.
        limits: most that a message may hold. A larger request is refused here, a larger answer by the daemon, before it
            computes it if it can. The number of tensors and axes is bounded by the models of the
            daemon.
        hedge: with several endpoints, whether a request that takes longer than 95 % of those before it is sent to a
            second daemon as well, and the earlier answer taken. At most 5 % of all requests are; `traffic` counts them.
            A number, 0.99 for instance, is another share.
        key: file with the secret that this client shows to the daemon, or the name of a pair that `tnxctl keys new` has
            made; None: as `tnxctl keys trust` was told of this endpoint.
        server_key: the line that `tnxctl keys server` prints on the daemon's host, or the 40 characters of the key in
            it: nothing else is let answer; None: as `tnxctl keys trust` was told. Where neither is given or known, no
            keys are used.
        shared_memory: whether large tensors go through memory that the daemon shares with this client, which takes
            endpoints on ipc:// and Linux. It begins once a connection stands and the daemon has agreed; until then, and
            where it does not or no room is left, they go over the socket. Outputs look into that memory for as long as
            the program holds them, and are copies to nobody else: a process forked meanwhile must not go on reading
            them. See docs/protocol.md, "Shared memory".

    Raises:
        InvalidArgument: the endpoint, the timeout or the share is not one; no memory can be shared there; or a file
            with keys has a mistake, cannot be read, or is not its owner's alone.
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
    ) -> None:
        self._given = endpoint
        self._session = session_of(endpoint, timeout, limits, hedge, key, server_key, shared_memory)
        self._encoder = self._session.encoder
        self._driver = ThreadDriver(self._session)

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

    def predict(
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
        """Run a model once.

        Args:
            inputs: one array for a model with one input, else a mapping of input names to arrays. An array is
                anything with `__array__` or `__dlpack__`, a string, or lists of strings: see
                `tnxctl.tensors.to_wire`. No other thread may change it until the call is over.
            model: name of the model, or NAME@VERSION for that version alone; "" is the daemon's default model.
            prefer_gpu: run on a GPU if one qualifies, else on the CPU. False: run on the CPU.
            min_gpu_memory_mb: free memory in MiB that a GPU needs to qualify.
            device: "" to go by `prefer_gpu`; "auto" for the device that is predicted to be done first; "cpu",
                "cuda:0", ... for that one or an error.
            deadline: seconds from now after which the answer is worthless, at most a day; None: what the model's
                configuration says, which usually is none. The daemon refuses at once what it cannot make, and
                the call fails with DeadlineExceeded at the deadline at the latest, connected or not. Once it has
                refused some, no more calls like them are sent than it takes, and the others fail at once
                (`tnxctl.request_windows`). The timeout counts as well: the earlier of the two is kept.
            priority: 0 (first) to 3 (last); None: what the model's configuration says.
            route_key: requests with the same key go to the same version while the traffic of a model is split; "":
                those of one connection do.
            traceparent: the span that the request belongs to, as W3C Trace Context has it in an HTTP header; the
                daemon may record its stages below that one. None: OpenTelemetry's current span, if the application
                has one. "": none. A malformed one counts as none.
        """
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
        return self._driver.run(call)

    def submit(
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
    ) -> Future[Result]:
        """Run a model as `predict` does, but return a future of the result at once.

        The inputs are copied: their memory may be used again at once. Cancelling the future cancels the request at the
        daemon, too. Callbacks run in the thread that reads all replies, so they must not wait for another future; they
        may use the client. An argument that can never work raises InvalidArgument here, not from the future.
        """
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
            copy=True,
        )
        return self._driver.submit(call)

    def health(self, *, timeout: float | None = None) -> HealthReport:
        """The state of the daemon."""
        return self._driver.run(self._encoder.health(timeout=timeout, now=time.monotonic()))

    def metadata(self, model: str = "", *, timeout: float | None = None) -> ModelInfo:
        """The inputs and outputs of a model: NAME, NAME@VERSION, or "" for the daemon's default model.

        A name alone means the version that gets most of its traffic.

        Raises:
            NotFound: there is no such model or version.
        """
        return self._driver.run(self._encoder.metadata(model, timeout=timeout, now=time.monotonic()))

    def cast(self, inputs: object, model: str = "", *, timeout: float | None = None) -> dict[str, Array]:
        """The inputs as arrays of the datatypes that a model takes, for `predict` and `submit`.

            tnx.predict(tnx.cast([[5.1, 3.5, 1.4, 0.2]], "iris"), model="iris")

        It asks for the signature each time. With a signature at hand, from `metadata`, call `tnxctl.casting.cast`.

        Args:
            inputs: one value for a model with one input, else a mapping of input names to values. A value is an array,
                a tensor, a DataFrame, lists, a number or a string. Numbers that a datatype cannot hold become what
                numpy makes of them: fractions are cut, large integers wrap.
            model: NAME, NAME@VERSION, or "" for the daemon's default model.

        Raises:
            InvalidArgument: a value is no array of numbers, or of strings where the model takes BYTES.
            NotFound: there is no such model or version.
        """
        from tnxctl.casting import cast

        return cast(inputs, self.metadata(model, timeout=timeout))

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Every version of every model, loaded or not."""
        return self._driver.run(self._encoder.models(timeout=timeout, now=time.monotonic()))

    def load(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Load a version and wait until it is warm.

        Args:
            model: NAME@VERSION for that version; while another one of the name serves, it gets no traffic of its name
                yet. NAME for what its model.toml wants, traffic included. A version that is loaded already, with
                the files as they are, stays as it is.

        Returns:
            One entry for each version of that name.

        Raises:
            NotFound: there is no such model or version.
            FailedPrecondition: it cannot be loaded; the sentence says why. The version that served before still does.
            ResourceExhausted: it does not fit into the memory budget of a device.
            DeadlineExceeded: it took longer than the daemon allows.
        """
        return self._driver.run(self._encoder.load(model, timeout=timeout, now=time.monotonic()))

    def unload(self, model: str, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """Stop serving a version and wait until its memory is free. Requests taken in before are answered.

        Args:
            model: NAME@VERSION, or NAME for all its versions.

        Returns:
            One entry for each version of that name.

        Raises:
            NotFound: there is no such model or version.
            FailedPrecondition: the version is not loaded.
        """
        return self._driver.run(self._encoder.unload(model, timeout=timeout, now=time.monotonic()))

    def route(
        self,
        model: str,
        weights: Mapping[str, float] | Mapping[int, float],
        shadow: str | int = "",
        *,
        timeout: float | None = None,
    ) -> tuple[ModelInfo, ...]:
        """Split the traffic of a model, that is, the requests which name no version.

            tnx.route("resnet", {1: 95, 2: 5})
            tnx.route("resnet", {}, shadow=2)

        Args:
            model: its name, without a version.
            weights: version -> share, relative to the sum; {}: the newest version takes all.
            shadow: version that gets copies of the requests, as far as there is free capacity, and whose answers
                nobody sees, see `compare`; "": none.

        Returns:
            One entry for each version of that name.

        Raises:
            InvalidArgument: a weight is negative or no finite number, all are 0, or the shadow has a weight as well.
            NotFound: there is no such model or version.
            FailedPrecondition: a version is not loaded, or its signature differs from that of the others.
        """
        return self._driver.run(
            self._encoder.route(model, weights, shadow=shadow, timeout=timeout, now=time.monotonic())
        )

    def reload(self, *, timeout: float | None = None) -> ReloadReport:
        """Have the daemon scan its model repository again, and wait until it serves what is there now.

        A version that cannot be loaded raises no error: it is in the `failed` of the report, and the one that served
        before still does.
        """
        return self._driver.run(self._encoder.reload(timeout=timeout, now=time.monotonic()))

    def compare(
        self, model: str, baseline: str | int, candidate: str | int, *, timeout: float | None = None
    ) -> Comparison:
        """The differences between the answers of a shadow version and of the one that answers, and how long both take.

        Args:
            model: its name. baseline: the version that answers. candidate: the shadow, see `route`.

        Raises:
            NotFound: there is no such model or version.
            FailedPrecondition: one of the two has not been loaded, or the candidate has had no copies of what the
                baseline answered.
        """
        return self._driver.run(
            self._encoder.compare(model, baseline, candidate, timeout=timeout, now=time.monotonic())
        )

    def whoami(self, *, timeout: float | None = None) -> Identity:
        """The name that the daemon knows this client by, its role and its limits."""
        return self._driver.run(self._encoder.whoami(timeout=timeout, now=time.monotonic()))

    def clients(self, *, timeout: float | None = None) -> ClientsReport:
        """The clients that are connected to the daemon. For the role admin, else PermissionDenied."""
        return self._driver.run(self._encoder.clients(timeout=timeout, now=time.monotonic()))

    def kick(self, client: str, *, timeout: float | None = None) -> int:
        """End all connections of a client but this one. For the role admin, else PermissionDenied.

        It may come back at once. To keep it out, take its key off the daemon's list.

        Args:
            client: its name, as in `clients`.

        Returns:
            Number of connections that were ended.

        Raises:
            NotFound: no such client is connected.
        """
        return self._driver.run(self._encoder.kick(client, timeout=timeout, now=time.monotonic())).connections

    def keys(self, *, timeout: float | None = None) -> KeysReport:
        """The keys that may connect, with their roles. For the role admin, else PermissionDenied.

        Raises:
            FailedPrecondition: the daemon asks for no keys.
        """
        return self._driver.run(self._encoder.keys(timeout=timeout, now=time.monotonic()))

    def stats(self, *, timeout: float | None = None) -> StatsReport:
        """The raw counts of the daemon since its start. Rates are differences of two of them."""
        return self._driver.run(self._encoder.stats(timeout=timeout, now=time.monotonic()))

    def explain(
        self, request: int | None = None, *, model: str = "", timeout: float | None = None
    ) -> tuple[SlowRequest, ...]:
        """The slowest requests of the last minute, the slowest first, with the time that each stage took.

        Args:
            request: its id, as its client gave it; None: all that are kept.
            model: NAME or NAME@VERSION; "": all.

        Raises:
            NotFound: there is no such model.
        """
        return self._driver.run(self._encoder.explain(request, model, timeout=timeout, now=time.monotonic()))

    def record(
        self,
        file: str,
        *,
        seconds: float = 60.0,
        model: str = "",
        sample: float = 1.0,
        timeout: float | None = None,
    ) -> RecordingReport:
        """Have the daemon write the predict requests that come from now on to a file on its host. For the role admin.

        It goes on whether or not this client stays; `recording` tells how far it is. It is not begun again on a new
        connection: where this one broke, `recording` tells whether it was.

        Args:
            file: name of a new file in the daemon's `record_directory`.
            seconds: length of the recording, a day at most.
            model: NAME or NAME@VERSION whose requests are written; "": all.
            sample: share of the requests that is written, chosen at random.

        Raises:
            FailedPrecondition: the daemon's configuration allows no recordings, another one is under way, or the file
                cannot be written.
            AlreadyExists: there is such a file.
        """
        call = self._encoder.record(file, seconds, model, sample, timeout=timeout, now=time.monotonic())
        return self._driver.run(call)

    def stop_recording(self, *, timeout: float | None = None) -> RecordingReport:
        """End the recording that is under way, and wait until its file is closed. For the role admin.

        Raises:
            FailedPrecondition: none is under way.
        """
        return self._driver.run(self._encoder.stop_recording(timeout=timeout, now=time.monotonic()))

    def recording(self, *, timeout: float | None = None) -> RecordingReport:
        """The recording that is under way, or else the last one. For the role admin."""
        return self._driver.run(self._encoder.recording(timeout=timeout, now=time.monotonic()))

    def close(self) -> None:
        """Close the connection. Calls under way fail with Cancelled. Idempotent."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
