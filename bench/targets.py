"""What is measured: the daemon, and the floors beside it."""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from floors import Answer
from loadgen import Connection
from processes import BenchError, ServerProcess
from report import ECHO, FORWARD
from tnxctl import wire
from workload import MODEL, Workload

_FLOORS = Path(__file__).with_name("floors.py")

Context = zmq.Context[zmq.Socket[bytes]]


@dataclass(frozen=True)
class Target:
    """A server under load.

    Attributes:
        name: of `report`. Client and daemon are two targets with one server: reached in two ways.
        pid: of its process, None if that is not known.
    """

    name: str
    endpoint: str
    pid: int | None


def start_daemon(stack: contextlib.ExitStack, device: str) -> tuple[str, int]:
    """Start a tnxd that the stack stops. Returns its endpoint and process id."""
    arguments = ["--bind", "tcp://127.0.0.1:*", "--model", MODEL, "--devices", device, "--log-level", "warning"]
    daemon = stack.enter_context(ServerProcess("tnxd", ["-m", "tnxd", *arguments]))
    return daemon.line.split("ready on ", 1)[1].split(";")[0], daemon.pid


def start_floors(stack: contextlib.ExitStack, transport: str, device: str, answers: Sequence[Answer]) -> list[Target]:
    """Start both floors, which the stack stops.

    Args:
        transport: "tcp" or "ipc", as the daemon's.
        answers: what they send back, one for each size of request.
    """
    floors = []
    for name, kind in ((FORWARD, "forward"), (ECHO, "echo")):
        endpoint = "tcp://127.0.0.1:*"
        if transport == "ipc":
            endpoint = f"ipc://{stack.enter_context(tempfile.TemporaryDirectory(prefix='tnx'))}/{kind}"
        arguments = [str(_FLOORS), kind, endpoint, device]
        floor = stack.enter_context(ServerProcess(name, arguments, msgspec.json.encode(answers) + b"\n"))
        floors.append(Target(name, floor.line, floor.pid))
    return floors


def is_here(endpoint: str) -> bool:
    """Whether an endpoint is on this machine, by an address that only this machine has."""
    host = urlsplit(endpoint).hostname or ""
    if endpoint.startswith("ipc://") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def probe(context: Context, endpoint: str, workload: Workload) -> Answer:
    """Ask the daemon once. Returns its answer, for the floors to give the same bytes.

    Raises:
        BenchError: it does not answer, or not with a result, or not from a GPU though one was asked for.
    """
    with Connection(context, endpoint, workload) as connection:
        connection.send()
        header, tensor = connection.receive()
    reply = wire.decode_reply(header, wire.Limits())
    if isinstance(reply, wire.ErrorReply):
        raise BenchError(f"{endpoint} answers {reply.code}: {reply.message}")
    if not isinstance(reply, wire.Result):
        raise BenchError(f"{endpoint} answers a predict request with {reply!r}")
    if workload.prefer_gpu and not reply.device.startswith("cuda"):
        raise BenchError(f"{endpoint} computes on {reply.device}, not on a GPU: {reply.reason}")
    return workload.answer(header, tensor)
