"""Load generators for servers that speak HTTP: a lean one in Python, and wrk.

As `loadgen` they are lean so that the server is what is measured: one thread, bytes made beforehand, nothing decoded
while the clock runs. One request at a time per connection, connections kept alive.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from loadgen import CHECKED, PATIENCE_SECONDS
from processes import BenchError
from report import PERCENTILES

_SPARE_SECONDS = 10.0

# wrk prints for people; this prints for programs. Its latencies are in microseconds.
_WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers = {%s}
wrk.body = %s
done = function(summary, latency, requests)
   local e = summary.errors
   io.write(string.format(
      '{"requests": %%d, "us": %%d, "refused": %%d, "lost": %%d, ' ..
      '"p50": %%d, "p90": %%d, "p99": %%d, "p99.9": %%d, "max": %%d}\\n',
      summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout,
      latency:percentile(50), latency:percentile(90), latency:percentile(99), latency:percentile(99.9), latency.max))
end
"""


@dataclass
class Answers:
    """Answers that came back in one round.

    Attributes:
        latency_us: of every answer with status 200.
        seconds: from the first request to the last answer.
        errors: other statuses, counted.
        kept: the last answers: number of the request, headers with names in lower case, body.
    """

    latency_us: list[float]
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    kept: list[tuple[int, dict[str, str], bytes]] = field(default_factory=list)


def request_bytes(url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A POST as it goes over the wire."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Connection:
    """One connection of a closed loop."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port), timeout=PATIENCE_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = 0
        self.sent_ns = 0
        self.received = b""
        self.wanted = 0  # bytes of the answer, once its head is here


def closed_loop(
    url: str,
    requests: Sequence[bytes],
    outstanding: int,
    seconds: float,
    *,
    goes_on: Callable[[int], bool] | None = None,
    kept: int | None = CHECKED,
) -> Answers:
    """Keep so many requests in flight for so long, each on a connection of its own.

    Args:
        requests: as `request_bytes` makes them; they take turns, and the number of one is its position.
        goes_on: told when each answer came, in nanoseconds, says in place of `seconds` whether to send another request.
        kept: most answers that are kept; None for all.

    Raises:
        BenchError: the server hung up, stopped answering, or sends no Content-Length.
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    connections: dict[int, _Connection] = {}
    epoll = select.epoll()
    gc.disable()
    try:
        for _ in range(outstanding):
            connection = _Connection(parts.hostname, parts.port)
            connections[connection.socket.fileno()] = connection
            epoll.register(connection.socket, select.EPOLLIN)
        return _exchange(url, connections, epoll, requests, seconds, goes_on, kept)
    except OSError as error:
        raise BenchError(f"{url}: {error}") from None
    finally:
        gc.enable()
        epoll.close()
        for connection in connections.values():
            connection.socket.close()


def _exchange(
    url: str,
    connections: dict[int, _Connection],
    epoll: select.epoll,
    requests: Sequence[bytes],
    seconds: float,
    goes_on: Callable[[int], bool] | None,
    most_kept: int | None,
) -> Answers:
    clock, variants = time.perf_counter_ns, len(requests)
    result = Answers([])
    latency_us = result.latency_us
    kept: deque[tuple[int, bytes]] = deque(maxlen=most_kept)
    begin = now = clock()
    end = begin + int(seconds * 1e9)
    sent = 0
    for connection in connections.values():
        connection.number, connection.sent_ns = sent % variants, clock()
        connection.socket.sendall(requests[connection.number])
        sent += 1
    waiting = len(connections)
    while waiting:
        ready = epoll.poll(PATIENCE_SECONDS)
        if not ready:
            raise BenchError(f"{url} has not answered for {PATIENCE_SECONDS:g} s")
        for fd, _ in ready:
            connection = connections[fd]
            part = connection.socket.recv(65536)
            now = clock()
            if not part:
                raise BenchError(f"{url} closed a connection in place of an answer")
            received = connection.received = connection.received + part if connection.received else part
            if not connection.wanted:
                stop = received.find(b"\r\n\r\n")
                if stop < 0:
                    continue
                connection.wanted = stop + 4 + content_length(url, received[:stop])
            if len(received) < connection.wanted:
                continue
            kept.append((connection.number, received))
            if received.startswith(b"HTTP/1.1 200"):
                latency_us.append((now - connection.sent_ns) / 1e3)
            else:
                result.errors[received[9:12].decode("latin-1")] += 1
            connection.received, connection.wanted = b"", 0
            if now < end if goes_on is None else goes_on(now):
                connection.number, connection.sent_ns = sent % variants, clock()
                connection.socket.sendall(requests[connection.number])
                sent += 1
            else:
                waiting -= 1
                epoll.unregister(connection.socket)  # the server may end it before the others have their answers
    result.seconds = (now - begin) / 1e9
    result.kept = [(number, *_split(received)) for number, received in kept]
    return result


def content_length(url: str, head: bytes) -> int:
    """Bytes of the body that follows this head. Raises BenchError if it does not say."""
    lowered = head.lower()
    start = lowered.find(b"\r\ncontent-length:")
    if start < 0:
        raise BenchError(f"{url} sends no Content-Length")
    stop = lowered.find(b"\r\n", start + 2)
    return int(lowered[start + 17 : stop if stop >= 0 else None])


def _split(received: bytes) -> tuple[dict[str, str], bytes]:
    """Headers, with names in lower case, and body of a whole answer."""
    head, _, body = received.partition(b"\r\n\r\n")
    pairs = (line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, value in pairs}, body


@dataclass
class WrkReport:
    """One run of wrk.

    Attributes:
        requests: answers of any status. seconds: how long it sent.
        latency_us: p50, p90, p99, p99.9, max.
        errors: "STATUS" and "LOST", counted. wrk does not look into the answers.
        cpu_us: CPU time of wrk.
    """

    requests: int
    seconds: float
    latency_us: dict[str, float]
    errors: Counter[str]
    cpu_us: float


def wrk_version() -> str | None:
    """The version that wrk says it has; None if there is no wrk."""
    program = shutil.which("wrk")
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=10)
    return " ".join((said.stdout + said.stderr).split()[:2])


def wrk(url: str, headers: Mapping[str, str], body: bytes, outstanding: int, seconds: float) -> WrkReport:
    """One thread of wrk with so many connections. It counts in whole seconds: the next number is taken.

    Raises:
        BenchError: it failed.
    """
    quoted = ", ".join(f'["{name}"] = "{value}"' for name, value in headers.items())
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_WRK_SCRIPT % (quoted, _lua_string(body)))
        script.flush()
        whole_seconds = max(1, math.ceil(seconds))
        command = ["wrk", "--threads=1", f"--connections={outstanding}", f"--duration={whole_seconds}s"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        try:
            ended = subprocess.run(
                [*command, f"--timeout={PATIENCE_SECONDS:g}s", f"--script={script.name}", url],
                capture_output=True,
                text=True,
                check=True,
                timeout=whole_seconds + PATIENCE_SECONDS + _SPARE_SECONDS,
            )
        except subprocess.SubprocessError as error:
            raise BenchError(f"wrk failed on {url}: {error}") from None
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = json.loads(ended.stdout.splitlines()[-1])
    return WrkReport(
        requests=found["requests"],
        seconds=found["us"] / 1e6,
        latency_us={name: float(found[name]) for name in PERCENTILES},
        errors=+Counter({"STATUS": found["refused"], "LOST": found["lost"]}),
        cpu_us=(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e6,
    )


def _lua_string(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'
