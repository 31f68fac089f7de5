"""The client's side of shared memory: what is free in a segment, and daemons that tell it lies."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from conftest import Daemon
from sessions import new_session, predict
from tnxctl import Client
from tnxctl.call import Call
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import Limits, Span
from tnxctl.results import Result
from tnxctl.sharing import LEAST_BYTES, Sharing

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files in memory")

SEGMENT_BYTES = 1 << 20
X = np.zeros((1, LEAST_BYTES // 4), np.float32)


def memory(nbytes: int = SEGMENT_BYTES, *, sealed: bool = True) -> int:
    """The descriptor of a file in memory."""
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, nbytes)
    if sealed:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return descriptor


def send(address: str, token: str, *descriptors: int) -> socket.socket:
    """Message of a daemon to whoever asks for a segment."""
    lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline.connect("\0" + address[1:])
    socket.send_fds(lifeline, [token.encode()], [*descriptors])
    return lifeline


def ask(sharing: Sharing) -> wire.Share:
    """The question of a client."""
    message = sharing.ask(1)
    assert message is not None
    request = wire.decode_request(message, Limits())
    assert isinstance(request, wire.Share)
    return request


@pytest.fixture
def sharing() -> Iterator[Sharing]:
    """That of a client which has a segment."""
    sharing = Sharing("ipc:///run/tnx", 65536)
    request = ask(sharing)
    descriptor = memory()
    with send(request.address, request.token, descriptor):
        assert sharing.incoming(wire.Shared(v=1, id=1, nbytes=SEGMENT_BYTES), [b""]) is None
        os.close(descriptor)
        assert sharing.is_active
        yield sharing
        sharing.lost()


def call(x: Any = X) -> Call[Result]:
    """A call with the id of `result`."""
    session = new_session()
    session.encoder.ids = itertools.count(7)
    return predict(session, x, model="m")


def result(shared: Any, number: int = 7) -> wire.Result:
    return wire.Result(
        v=1,
        id=number,
        model="m",
        version="1",
        outputs=(wire.TensorSpec("y", "FP32", (4,)),),
        device="cpu",
        reason="",
        batch_size=1,
        latency_ms=1.0,
        gpu_memory_mb=0.0,
        timing=wire.Timing(*[0.0] * 8),
        shared=shared,
    )


def test_places_never_overlap_and_are_all_free_in_the_end(sharing: Sharing) -> None:
    segment: Any = sharing._segment
    chance = random.Random(5)
    taken: list[Span] = []
    for _ in range(5000):
        if taken and chance.random() < 0.5:
            segment.freed.append(taken.pop(chance.randrange(len(taken))))
            continue
        nbytes = chance.choice([1, 64, 100, 5000, 70_000, 300_000])
        span = segment.allocate(nbytes)
        if span is None:
            continue
        assert span.nbytes >= nbytes
        assert span.offset % 64 == 0
        assert span.offset + span.nbytes <= SEGMENT_BYTES
        assert all(
            span.offset + span.nbytes <= other.offset or other.offset + other.nbytes <= span.offset for other in taken
        )
        taken.append(span)
    segment.freed.extend(taken)
    assert segment.allocate(SEGMENT_BYTES) == Span(0, SEGMENT_BYTES)


@pytest.mark.parametrize(
    "spans",
    [
        (Span(SEGMENT_BYTES, 16),),
        (Span(2**62, 16),),
        (Span(0, 2**62),),
        (Span(LEAST_BYTES, LEAST_BYTES),),
    ],
)
def test_outputs_that_are_not_where_they_may_be(sharing: Sharing, spans: Any) -> None:
    sharing._most["m"] = LEAST_BYTES
    (header,) = sharing.outgoing(call())
    request = wire.decode_request(header, Limits())
    assert isinstance(request, wire.PredictShared)
    assert request.space == Span(0, LEAST_BYTES)
    with pytest.raises(InvalidArgument, match="not within the space"):
        sharing.incoming(result(spans), [header])
    segment: Any = sharing._segment
    assert segment.allocate(SEGMENT_BYTES) == Span(0, SEGMENT_BYTES)


def test_outputs_that_were_not_asked_for(sharing: Sharing) -> None:
    with pytest.raises(InvalidArgument, match="not asked for"):
        sharing.incoming(result((Span(0, 16),)), [b""])
    sharing._most["m"] = 0
    sharing.outgoing(call())
    with pytest.raises(InvalidArgument, match="not within the space"):
        sharing.incoming(result((Span(0, 16),)), [b""])
    segment: Any = sharing._segment
    assert segment.allocate(SEGMENT_BYTES) == Span(0, SEGMENT_BYTES)


def test_small_tensors_go_as_they_are(sharing: Sharing) -> None:
    sharing._most["m"] = 16
    small = call(x=X[:, :-1])
    assert sharing.outgoing(small) is small.frames
    assert sharing.incoming(result(msgspec.UNSET), [b"", bytes(16)]) == [b"", bytes(16)]


def test_large_outputs_of_small_inputs_are_noticed(sharing: Sharing) -> None:
    sharing._most["m"] = 16
    small = call(x=X[:, :-1])
    sharing.outgoing(small)
    sharing.incoming(result(msgspec.UNSET), [b"", bytes(LEAST_BYTES)])
    header, frame = sharing.outgoing(small)
    request = wire.decode_request(header, Limits())
    assert isinstance(request, wire.PredictShared)
    assert (request.shared, request.space) == (None, Span(0, LEAST_BYTES))
    assert frame is small.frames[1]


def test_a_stranger_who_comes_first_is_not_the_daemon() -> None:
    sharing = Sharing("ipc:///run/tnx", 65536)
    request = ask(sharing)
    one, other = memory(), memory()
    with (
        send(request.address, "f" * 32, one),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
        send(request.address, request.token, other),
    ):
        silent.connect("\0" + request.address[1:])
        sharing.incoming(wire.Shared(v=1, id=1, nbytes=SEGMENT_BYTES), [b""])
        assert sharing.is_active
        sharing.lost()
    os.close(one)
    os.close(other)


@pytest.mark.parametrize(
    ("nbytes", "sealed", "says"),
    [
        (SEGMENT_BYTES, False, "memory that is not sealed, or too short"),
        (4096, True, "memory that is not sealed, or too short"),
        (None, True, "none"),
    ],
)
def test_memory_that_cannot_be_trusted(nbytes: int | None, sealed: bool, says: str, caplog: Any) -> None:
    sharing = Sharing("ipc:///run/tnx", 65536)
    request = ask(sharing)
    descriptors = [] if nbytes is None else [memory(nbytes, sealed=sealed)]
    with caplog.at_level(logging.WARNING, "tnxctl"), send(request.address, request.token, *descriptors):
        sharing.incoming(wire.Shared(v=1, id=1, nbytes=SEGMENT_BYTES), [b""])
    assert not sharing.is_active
    assert f"through shared memory: the daemon has sent {says}" in caplog.text
    for descriptor in descriptors:
        os.close(descriptor)
    small = call()
    assert sharing.outgoing(small) is small.frames


def test_several_daemons(tmp_path: Path, run_daemon: Callable[..., Daemon]) -> None:
    (tmp_path / "tnxd.toml").write_text("[clients]\nshared_memory_mb = 64\n")
    endpoints = [f"ipc://{tmp_path}/{name}" for name in ("one", "two")]
    daemons = [run_daemon("--config", str(tmp_path / "tnxd.toml"), "--bind", endpoint) for endpoint in endpoints]
    x = np.ones((256, 256), np.float32)
    with Client(endpoints, shared_memory=True, timeout=60) as tnx, Client(endpoints[0], timeout=60) as plain:
        expected = plain.predict(x).output
        for _ in range(20):
            assert np.array_equal(tnx.predict(x).output, expected)
        assert tnx.shares_memory
        daemons[0].process.kill()
        for _ in range(20):
            assert np.array_equal(tnx.predict(x).output, expected)
