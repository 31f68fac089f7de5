"""Targets that are measured: the daemon, and the floors beside it."""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from floors import Answer
from loadgen import Connection, Context
from processes import BenchError, ChildProcess
from report import BATCHING, DAEMON, ECHO, FORWARD, PLAIN
from tnxctl.protocol import wire
from workload import MODEL, Workload

_FLOORS = Path(__file__).with_name("floors.py")
_KINDS = {FORWARD: "forward", BATCHING: "batching", ECHO: "echo", PLAIN: "plain"}


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


# Servers start in two steps, because most of the time that it takes is spent on importing torch: several can do so at
# once, and this program with them.


def start_daemon(
    stack: contextlib.ExitStack, device: str = "cpu", program: Sequence[str] = ("-m", "tnxd"), model: str = MODEL
) -> ChildProcess:
    """Start a tnxd with one model, which the stack stops, for `daemon_target` to wait for."""
    arguments = ["--bind", "tcp://127.0.0.1:*", "--model", model, "--devices", device, "--log-level", "warning"]
    return stack.enter_context(ChildProcess("tnxd", [*program, *arguments]))


def daemon_target(daemon: ChildProcess) -> Target:
    """A daemon that was started, when it is ready.

    Raises:
        BenchError: it does not become so.
    """
    return Target(DAEMON, daemon.ready().split("ready on ", 1)[1].split(";")[0], daemon.pid)


def start_floors(
    stack: contextlib.ExitStack, transport: str = "tcp", device: str = "cpu", names: Sequence[str] = (FORWARD, ECHO)
) -> list[ChildProcess]:
    """Start floors, which the stack stops, for `floor_targets` to wait for.

    Args:
        transport: "tcp" or "ipc", as the daemon's.
    """
    floors = []
    for name in names:
        endpoint = "tcp://127.0.0.1:*"
        if transport == "ipc":
            endpoint = f"ipc://{stack.enter_context(tempfile.TemporaryDirectory(prefix='tnx'))}/{_KINDS[name]}"
        floors.append(stack.enter_context(ChildProcess(name, [str(_FLOORS), _KINDS[name], endpoint, device])))
    return floors


def floor_targets(floors: Sequence[ChildProcess], answers: Sequence[Answer]) -> list[Target]:
    """Floors that were started, when they are ready.

    Args:
        answers: what they send back, one for each size of request.

    Raises:
        BenchError: they do not become so.
    """
    line = msgspec.json.encode(answers) + b"\n"
    return [Target(floor.name, floor.ready(line), floor.pid) for floor in floors]


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
