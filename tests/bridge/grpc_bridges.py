"""Bridges with gRPC for tests, and plain stubs that ask them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc

import prepared
from tnxctl.bridge.grpc.messages import INFERENCE

READY = re.compile(r"ready on (\S+), gRPC on (\S+); ")

COMMAND = ("-m", "tnxctl.cli", "bridge")


@dataclass
class Bridge:
    """A running bridge. Attributes: http: its URL. grpc: its address. log: where its stderr goes."""

    http: str
    grpc: str
    process: subprocess.Popen[str]
    log: Path


@contextmanager
def serving(endpoint: str, log: Path, *arguments: str) -> Iterator[Bridge]:
    """Serve HTTP and gRPC in front of a daemon, and end in good order."""
    command = [sys.executable, *COMMAND, "--listen", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--host", endpoint]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "TNX_HOST": endpoint},
            preexec_fn=prepared.end_with_parent,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = READY.search(line)
            assert found is not None, f"the bridge said {line!r} and logged:\n{log.read_text()}"
            yield Bridge(found[1], found[2], process, log)
            assert process.poll() is None, f"the bridge died:\n{log.read_text()}"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()


class Stub:
    """Plain client of a bridge: each RPC of the service by its name, with messages of ours."""

    def __init__(self, address: str, credentials: Any = None) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        if credentials is None:
            self.channel = grpc.insecure_channel(address, options)
        else:
            self.channel = grpc.secure_channel(address, credentials, options)
        (self._service,) = INFERENCE.services

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(self, name: str, request: Any, **options: Any) -> Any:
        """Call an RPC. Args: request: a message, or the bytes of one. options: of the call."""
        return self._rpc(name)(request, **options)

    def future(self, name: str, request: Any, **options: Any) -> Any:
        """Call an RPC without waiting."""
        return self._rpc(name).future(request, **options)

    def _rpc(self, name: str) -> Any:
        method = self._service.methods_by_name[name]
        return self.channel.unary_unary(
            f"/{self._service.full_name}/{name}",
            request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            response_deserializer=INFERENCE.message(method.output_type.name).FromString,
        )
