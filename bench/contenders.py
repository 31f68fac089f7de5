"""The servers that `compare.py` measures: what they are, where their environments lie, how they start and end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import Request, urlopen

import proctree
from comparison import BRIDGE, FASTAPI_RAW
from processes import START_SECONDS, STOP_SECONDS, BenchError, ChildProcess, complaint

PEERS = Path(__file__).with_name("peers")

ENVIRONMENTS = Path(__file__).parent.parent / "build" / "peers"
"""Where `make bench-peers` builds one virtual environment per peer."""

_RETRY_SECONDS = 0.2

# torch.set_num_threads is not enough where a server calls the model from a thread of its own: nvidia-pytriton uses
# twice the CPU time without this, waiting for OpenMP threads that have nothing to do.
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Contender:
    """A server in one configuration.

    Attributes:
        name: in tables.
        peer: names its files in `peers/` and its environment.
        configuration: an argument of its server.
        format: how arrays travel over HTTP, see `peers/formats.py`.
        path: of its URL.
        packages: whose versions count.
        client: the program of its natural Python client.
        program: in the name of its server's file, `peers/PEER_PROGRAM.py`.
        own: whether it is ours, and runs in the environment of this program.
    """

    name: str
    peer: str
    configuration: str
    format: str
    path: str
    packages: tuple[str, ...]
    client: str = "http_client.py"
    program: str = "server"
    own: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """Variables that its programs need beside those of this process."""
        if not self.own:
            return {}
        paths = [str(PEERS.parent.parent), str(PEERS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(paths)}

    def python(self, environments: Path) -> Path | None:
        """The interpreter of its environment; None if `make bench-peers` has not built it."""
        if self.own:
            return Path(sys.executable)
        python = environments / self.peer / "bin" / "python"
        return python if (environments / self.peer / "built").exists() else None


CONTENDERS = (
    Contender(
        BRIDGE,
        "bridge",
        "mlp",
        "triton",
        "/v2/models/mlp/infer",
        ("uvicorn", "httptools", "grpcio", "tritonclient"),
        client="triton_client.py",
        own=True,
    ),
    Contender("FastAPI, JSON", "fastapi", "json", "json", "/predict", ("fastapi", "uvicorn", "requests", "aiohttp")),
    Contender(FASTAPI_RAW, "fastapi", "raw", "raw", "/predict", ("fastapi", "uvicorn", "requests", "aiohttp")),
    Contender("LitServe", "litserve", "plain", "raw", "/predict", ("litserve", "requests", "aiohttp")),
    Contender("LitServe, batching", "litserve", "batched", "raw", "/predict", ("litserve", "requests", "aiohttp")),
    Contender("mosec", "mosec", "plain", "raw", "/inference", ("mosec", "requests", "aiohttp")),
    Contender("mosec, batching", "mosec", "batched", "raw", "/inference", ("mosec", "requests", "aiohttp")),
    Contender(
        "Triton, batching",
        "triton",
        "batched",
        "triton",
        "/v2/models/mlp/infer",
        ("nvidia-pytriton", "tritonclient"),
        client="triton_client.py",
    ),
)


def versions(contender: Contender, python: Path) -> dict[str, str]:
    """Versions in a contender's environment: Python, torch, numpy and its own packages."""
    names = (*contender.packages, "torch", "numpy")
    program = (
        "import json, platform, sys; from importlib.metadata import version;"
        "print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in sys.argv[1:]}}))"
    )
    command = [str(python), "-c", program, *names]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=START_SECONDS)
    found: dict[str, str] = json.loads(said.stdout)
    return found


class PeerServer:
    """A contender's server. As a context manager it ends it and all its processes, whatever happens.

    Args:
        python: the interpreter. headers, body: of a request that it must answer to count as ready.
        environment: variables beside those of this process.

    Attributes:
        pid: of the process at the root of its tree; it leads a session of its own.
        url: where it answers POST requests. grpc: HOST:PORT of gRPC, where it has that.

    Raises:
        BenchError: it ended before it gave its first answer, or took too long; the message holds what it said.
    """

    def __init__(
        self,
        contender: Contender,
        python: Path,
        headers: dict[str, str],
        body: bytes,
        environment: Mapping[str, str] = types.MappingProxyType({}),
    ) -> None:
        self._name = contender.name
        port, second_port = _free_ports(2)
        self.url = f"http://127.0.0.1:{port}{contender.path}"
        self.grpc = f"127.0.0.1:{second_port}"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `stop`
        server = PEERS / f"{contender.peer}_{contender.program}.py"
        self._process = subprocess.Popen(
            [str(python), str(server), contender.configuration, str(port), str(second_port)],
            stdin=subprocess.PIPE,  # its end is the server's end, even if this program is killed
            stdout=self._said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=tempfile.gettempdir(),
            env={**os.environ, **_ONE_THREAD, **contender.environment, **environment},
        )
        self.pid = self._process.pid
        try:
            self._wait_for_answer(Request(self.url, body, headers))
        except BaseException:
            self.stop()
            raise

    def _wait_for_answer(self, request: Request) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(URLError, OSError), urlopen(request, timeout=STOP_SECONDS) as answer:
                answer.read()
                return
            if self._process.poll() is not None:
                raise BenchError(f"{self._name} ended before it was ready{complaint(self._said)}")
            time.sleep(_RETRY_SECONDS)
        raise BenchError(f"{self._name} gave no answer within {START_SECONDS:g} s{complaint(self._said)}")

    def stop(self) -> None:
        """End it: ask by SIGTERM, insist after a while. Does nothing the second time."""
        process = self._process
        if process.stdin is None or process.stdin.closed:
            return
        remembered = proctree.members(self.pid)
        proctree.send(self.pid, signal.SIGCONT)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        proctree.kill(remembered | proctree.members(self.pid))
        process.wait()
        process.stdin.close()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class NaturalClient(ChildProcess):
    """A Python client in a process of its own, in the environment of its server; see `peers/calling.py`.

    Args:
        program: in `peers/`. arguments: for it.
    """

    def __init__(self, python: Path, program: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__(program, [str(PEERS / program), *arguments], python, environment)

    def call(self, outstanding: int, seconds: float) -> dict[str, Any]:
        """One round: a `calling.Report` as a dict.

        Raises:
            BenchError: the client died or went silent.
        """
        command = json.dumps({"outstanding": outstanding, "seconds": seconds})
        report: dict[str, Any] = json.loads(self.ask(command.encode() + b"\n", seconds + START_SECONDS))
        return report


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for found in sockets:
            found.bind(("127.0.0.1", 0))
        return [found.getsockname()[1] for found in sockets]
