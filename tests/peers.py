"""Daemons that the tests of the client talk to: real ROUTER sockets in a thread, answering as each test says.

With an event loop that watches no file descriptor, and the values that these tests share.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import zmq

from tnxctl.protocol import errors, wire
from tnxctl.results import Result

LIMITS = wire.Limits()
X = np.arange(6, dtype="f4").reshape(2, 3)
PATIENCE_S = 60.0  # for what must happen; never reached when all is well
TIMING = wire.Timing(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 28.0)


class Die(Exception):
    """Raised by an answer function: the daemon is gone at once, its port is free, nothing more is sent."""


@dataclass(frozen=True)
class Request:
    """A client's request: the decoded header, the raw tensor frames, and who sent it."""

    identity: bytes
    header: wire.Request
    tensors: list[bytes]

    @property
    def id(self) -> int:
        return self.header.id


Reply = Sequence[bytes]
Answer = Callable[[Request], Iterable[tuple[bytes, Reply]]]
"""A request -> the messages to send now, each with the identity of its receiver."""


class FakeDaemon:
    """Serves one endpoint until the `with` block ends.

    Attributes:
        endpoint: where it is, the same after a restart.
        received: every request as it comes. cancels: those that only withdraw another one; they get no answer.
        gone: set while it does not run.
    """

    def __init__(self, answer: Answer, endpoint: str = "") -> None:
        self.answer = answer
        self._port = held_port()
        self.endpoint = endpoint or endpoint_of(self._port)
        self.received: queue.Queue[Request] = queue.Queue()
        self.cancels: queue.Queue[Request] = queue.Queue()
        self.gone = threading.Event()
        self.error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.start()

    def start(self, answer: Answer | None = None) -> None:
        """Run, again perhaps, and with another answer."""
        self.stop()
        self.answer = answer or self.answer
        self.gone.clear()
        self._stop_reader, self._stop_writer = socket.socketpair()
        bound = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bound,), name="fake daemon")
        self._thread.start()
        assert bound.wait(PATIENCE_S), self.error

    def stop(self) -> None:
        """Be gone when this returns. Idempotent."""
        if self._thread is None:
            return
        self._stop_writer.send(b"\0")
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self._thread = None
        self._stop_reader.close()
        self._stop_writer.close()
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._port.close()
        self.stop()

    def _run(self, bound: threading.Event) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router = context.socket(zmq.ROUTER)
        try:
            router.set(zmq.LINGER, 0)
            router.set(zmq.IPV6, "[" in self.endpoint)
            router.bind(self.endpoint)
            self.endpoint = str(router.get_string(zmq.LAST_ENDPOINT))
            bound.set()
            poller = zmq.Poller()
            poller.register(router, zmq.POLLIN)
            poller.register(self._stop_reader.fileno(), zmq.POLLIN)
            while all(source is router for source, _ in poller.poll()):
                self._serve(router)
        except Die:
            pass
        except BaseException as error:
            self.error = error
        finally:
            router.close()
            context.term()
            self.gone.set()

    def _serve(self, router: zmq.Socket[bytes]) -> None:
        identity, header, *tensors = router.recv_multipart()
        request = Request(identity, wire.decode_request(header, LIMITS), tensors)
        if isinstance(request.header, wire.Cancel):
            self.cancels.put(request)
            return
        self.received.put(request)
        for receiver, reply in self.answer(request):
            router.send_multipart([receiver, *reply])


def call_until_it_says(tnx: Any, reason: str) -> None:
    """Call in vain until that is the reason: an attempt takes longer than a call where the machine is busy."""
    said = ""
    while reason not in said:
        try:
            raise AssertionError(f"it was answered: {tnx.predict(X, timeout=0.2)}")
        except errors.Unavailable as error:
            said = error.message
            assert ": no connection within 200 ms: " in said, said


class Proxy:
    """Forwards TCP connections to an endpoint, until it is told to swallow what comes.

    Attributes:
        endpoint: where clients connect. accepted: how many connections there have been.
    """

    def __init__(self, endpoint: str) -> None:
        self._target = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self._swallowed = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="proxy")]
        self._threads[0].start()

    def swallow(self, connections: int) -> None:
        """The first so many connections stay open and carry nothing from now on: what comes is read and dropped."""
        self._swallowed = connections

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # `close` alone would not wake the thread
        self._listener.close()
        self._threads[0].join(PATIENCE_S)
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
        for each in self._sockets:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            self.accepted += 1
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pump, args=(source, sink, self.accepted), name="proxy")
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if number > self._swallowed:
                    sink.sendall(data)
            if number > self._swallowed:
                sink.shutdown(socket.SHUT_WR)


# --- answers -------------------------------------------------------------------------------------------------


def echo(request: Request) -> list[tuple[bytes, Reply]]:
    """The inputs come back as outputs."""
    return [(request.identity, reply_to(request))]


def silence(request: Request) -> list[tuple[bytes, Reply]]:
    """No answer, ever."""
    return []


def die(request: Request) -> list[tuple[bytes, Reply]]:
    raise Die


def backwards(count: int) -> Answer:
    """Nothing until `count` requests have come, then all answers, the last one first."""
    waiting: list[Request] = []

    def answer(request: Request) -> list[tuple[bytes, Reply]]:
        waiting.append(request)
        return [message for held in reversed(waiting) for message in echo(held)] if len(waiting) == count else []

    return answer


def in_turn(*answers: Answer) -> Answer:
    """The first request gets the first answer, and so on; the last answer serves all the others."""
    left = list(answers)

    def answer(request: Request) -> Iterable[tuple[bytes, Reply]]:
        return (left.pop(0) if len(left) > 1 else left[0])(request)

    return answer


def messages(*replies: Callable[[Request], Reply]) -> Answer:
    """One message for each function, in this order."""

    def answer(request: Request) -> list[tuple[bytes, Reply]]:
        return [(request.identity, reply(request)) for reply in replies]

    return answer


def error(code: str, message: str) -> Answer:
    return messages(lambda request: [wire.encode(wire.ErrorReply(v=1, id=request.id, code=code, message=message))])


def reply_to(request: Request, **changes: Any) -> list[bytes]:
    """The right answer, with these fields of its header changed."""
    header: wire.Reply
    tensors: list[bytes] = []
    match request.header:
        case wire.Predict(inputs=inputs, model=model):
            tensors = request.tensors
            header = wire.Result(
                v=1,
                id=request.id,
                model=model or "mlp",
                version="1",
                outputs=inputs,
                device="cpu",
                reason="a test",
                batch_size=1,
                latency_ms=0.5,
                gpu_memory_mb=0.0,
                timing=TIMING,
                predicted_us=25.0,
            )
        case wire.Metadata(model=model):
            header = wire.MetadataReport(v=1, id=request.id, model=model_info(model or "mlp"))
        case wire.Health():
            header = health_report(request.id)
    return [wire.encode(msgspec.structs.replace(header, **changes)), *tensors]


def model_info(name: str) -> wire.ModelInfo:
    return wire.ModelInfo(name=name, version="1", status="ready", inputs=(wire.TensorSpec("input", "FP32", (-1, 256)),))


def health_report(call_id: int) -> wire.HealthReport:
    return wire.HealthReport(
        v=1,
        id=call_id,
        status="ready",
        cuda_available=False,
        current_device="cpu",
        gpu_memory_free_mb=0.0,
        version="0.1.0",
        uptime_s=1.0,
        devices=(wire.DeviceInfo(name="cpu", status="ready"),),
        models=(model_info("mlp"),),
        queued=0,
        running=0,
        requests=1,
        replies=1,
        errors={},
    )


def held_port() -> socket.socket:
    """A socket that does not listen. Until it is closed, nobody gets its port by chance, and a listener may use it."""
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind(("127.0.0.1", 0))
    return place


def endpoint_of(port: socket.socket) -> str:
    """The endpoint of whoever is to listen on a port that is held."""
    return f"tcp://127.0.0.1:{port.getsockname()[1]}"


def free_endpoint() -> str:
    """An endpoint where nobody listens; its port is held until this process ends."""
    port = held_port()
    endpoint = endpoint_of(port)
    port.detach()
    return endpoint


def equal(result: Result, expected: Any) -> bool:
    """True if the only output of a result has these elements."""
    return bool(np.array_equal(result.output, expected))


class BlindLoop(asyncio.SelectorEventLoop):
    """A loop like the default one of Windows: it watches no file descriptor for others."""

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:
        raise NotImplementedError

    def remove_reader(self, fd: Any) -> bool:
        raise NotImplementedError
