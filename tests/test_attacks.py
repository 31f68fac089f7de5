"""Messages of broken or hostile clients to a running daemon. Each time the daemon says what was wrong, exactly once,
and serves the next request, on the same connection wherever ZeroMQ keeps it open.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from conftest import Daemon
from daemons import ODD, ONE_LANE
from dealer import Dealer, rows
from headers import pack, predict_header
from model_repositories import rss_mb
from tnxctl.protocol import wire
from tnxctl.protocol.wire import Limits
from zmtp import GREETING, Peer, frame, message

ROW = rows(1).tobytes()
PATIENCE_S = 60.0


@pytest.fixture
def dealer(daemon: Daemon) -> Iterator[Dealer]:
    with Dealer(daemon.endpoint) as connection:
        yield connection


def check_good_request(dealer: Dealer) -> None:
    """A predict request is answered, and nothing but that answer and the next one comes: no earlier request had two."""
    request_id = dealer.predict(rows(2), model="mlp", id=wire.MAX_ID - 1)
    result, (output,) = dealer.result()
    assert result.id == request_id
    assert output.shape == (2, 128)
    assert np.isfinite(output).all()
    assert dealer.health().status == "ready"


def check_new_connection(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        check_good_request(dealer)


def check_refused(dealer: Dealer, frames: list[bytes], code: str, request_id: int | None, *named: str) -> None:
    """One error comes back, with that code and id, naming those values; then a good request works."""
    dealer.socket.send_multipart(frames)
    error = dealer.error()
    assert error.code == code, error.message
    assert error.id == request_id
    for value in named:
        assert value in error.message
    assert len(error.message) < 1000
    assert error.message.isprintable()
    check_good_request(dealer)


def wait_for_health(daemon: Daemon, condition: Callable[[wire.HealthReport], bool]) -> None:
    """Ask for health until the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    with Dealer(daemon.endpoint) as dealer:
        while not condition(report := dealer.health()):
            assert time.monotonic() < deadline, report


def is_idle(report: wire.HealthReport) -> bool:
    return report.queued == 0 and report.running == 0


def specs(*entries: list[Any]) -> bytes:
    """A good header but for its inputs."""
    return pack(predict_header(inputs=list(entries)))


# --- messages that are no requests -----------------------------------------------------------------------------

COLLIDING_KEYS = [b"\x9d" + bytes(key) for key in itertools.islice(itertools.product((0xFF, 0xFE), repeat=13), 4096)]


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        ([b""], "empty"),
        ([b"", b""], "empty"),
        ([b"", b"", pack(predict_header()), ROW], "b''"),
        ([b"\0"], "0"),
        ([b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"], "b'GET / "),
        ([b"\x93\x01\x02\x03"], "[1, 2, 3]"),
        ([b"\xdf\xff\xff\xff\xff"], r"b'\xdf"),
        ([pack(predict_header())[:-1], ROW], "truncated"),
        ([pack(predict_header()) + b"\0", ROW], "trailing"),
        ([ROW, pack(predict_header())], "0"),
        ([b"\x81" + pack("unknown") + b"\x91" * 60_000 + b"\xc0"], "nested too deep"),
        ([b"\x91" * 200_000], "200000 bytes"),
        ([bytes(65_537)], "65537 bytes"),
        ([b"\x80" * 65_537] + [b""] * 1000, "65537 bytes"),
        ([b"\xde\x10\x00" + b"\xc0".join(COLLIDING_KEYS) + b"\xc0"], "`array`"),
    ],
)
def test_messages_that_are_no_requests(dealer: Dealer, frames: list[bytes], named: str) -> None:
    dealer.socket.send_multipart(frames)
    received = dealer.socket.recv_multipart() if dealer.socket.poll(PATIENCE_S * 1000) else []
    delimiter, header = received[:-1], received[-1]
    assert delimiter == ([b""] if len(frames) > 1 and not frames[0] else [])
    error = wire.decode_reply(header, Limits())
    assert isinstance(error, wire.ErrorReply)
    assert error.code == "INVALID_ARGUMENT"
    assert error.id is None
    assert named in error.message
    check_good_request(dealer)


def test_random_messages_get_one_error_each(dealer: Dealer) -> None:
    chance = random.Random(20)
    count = 300
    for _ in range(count):
        frames = [chance.randbytes(chance.randrange(100)) for _ in range(chance.choice([1, 1, 2, 3, 10]))]
        dealer.socket.send_multipart(frames)
    for _ in range(count):
        assert dealer.socket.poll(PATIENCE_S * 1000)
        *_, header = dealer.socket.recv_multipart()
        error = wire.decode_reply(header, Limits())
        assert isinstance(error, wire.ErrorReply)
        assert error.id is None
    check_good_request(dealer)


def test_damaged_requests_get_one_answer_each(dealer: Dealer) -> None:
    """A byte or two overwritten somewhere in the header: an error, or an answer where the request still has a sense."""
    chance = random.Random(21)
    count = 300
    for _ in range(count):
        header = bytearray(pack(predict_header(min_gpu_memory_mb=1.5, prefer_gpu=True)))
        for _ in range(chance.randint(1, 2)):
            header[chance.randrange(len(header))] = chance.randrange(256)
        dealer.socket.send_multipart([bytes(header), ROW])
    for _ in range(count):
        reply, _ = dealer.receive()
        assert isinstance(reply, wire.Result | wire.ErrorReply)
    check_good_request(dealer)


# --- requests that can never work ------------------------------------------------------------------------------

INVALID = "INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("changes", "code", "request_id", "named"),
    [
        ({"v": 2}, "UNIMPLEMENTED", 7, ["version 2"]),
        ({"v": "1"}, INVALID, 7, ["'1'"]),
        ({"v": ...}, INVALID, 7, ["`v`"]),
        ({"type": "divine"}, "UNIMPLEMENTED", 7, ["'divine'"]),
        ({"type": "result"}, "UNIMPLEMENTED", 7, ["'result'"]),
        ({"type": ...}, INVALID, 7, ["`type`"]),
        ({"id": -1}, INVALID, None, ["-1"]),
        ({"id": 2**63}, INVALID, None, ["9223372036854775808"]),
        ({"id": "seven"}, INVALID, None, ["'seven'"]),
        ({"id": ...}, INVALID, None, ["`id`"]),
        ({"model": "palm"}, "NOT_FOUND", 7, ["'palm'"]),
        ({"model": "mlp\n\x1b[31m"}, INVALID, 7, [r"'mlp\n\x1b[31m'"]),
        ({"model": "x" * 60_000}, INVALID, 7, ["length <= 256", "$.model"]),
        ({"model": "x" * 200}, INVALID, 7, ["'xxxxxxxx"]),
        ({"model": 3}, INVALID, 7, ["3"]),
        ({"prefer_gpu": "yes"}, INVALID, 7, ["'yes'"]),
        ({"min_gpu_memory_mb": -1.0}, INVALID, 7, ["-1.0"]),
        ({"min_gpu_memory_mb": math.nan}, INVALID, 7, ["nan"]),
        ({"min_gpu_memory_mb": "lots"}, INVALID, 7, ["'lots'"]),
        ({"inputs": ...}, INVALID, 7, ["`inputs`"]),
        ({"inputs": None}, INVALID, 7, ["None"]),
        ({"inputs": [[]]}, INVALID, 7, ["[]"]),
    ],
)
def test_bad_fields(
    dealer: Dealer, changes: dict[str, Any], code: str, request_id: int | None, named: list[str]
) -> None:
    check_refused(dealer, [pack(predict_header(**changes)), ROW], code, request_id, *named)


@pytest.mark.parametrize(
    ("frames", "named"),
    [
        # counts
        ([specs(["input", "FP32", [1, 256]])], ["1 tensors", "0 tensor frames"]),
        ([specs(["input", "FP32", [1, 256]]), ROW, ROW], ["1 tensors", "2 tensor frames"]),
        ([specs(["input", "FP32", [1, 256]])] + [b""] * 1000, ["1000"]),
        ([specs(*[["input", "FP32", [1, 256]]] * 65)] + [ROW] * 65, ["65"]),
        ([specs(), ROW], ["0 tensors", "1 tensor frames"]),
        # names
        ([specs()], ["'input'"]),
        ([specs(["imput", "FP32", [1, 256]]), ROW], ["'imput'"]),
        ([specs(["x" * 60_000, "FP32", [1, 256]]), ROW], ["length <= 1024", "$.inputs[0][0]"]),
        ([specs(["x" * 900, "FP32", [1, 256]]), ROW], ["'xxxxxxxx"]),
        ([specs(["\0" * 900, "FP32", [1, 256]]), ROW], [r"'\x00"]),
        ([specs(["input", "FP32", [1, 256]], ["more", "FP32", [1, 256]]), ROW, ROW], ["'more'"]),
        ([specs(["input", "FP32", [1, 256]], ["input", "FP32", [1, 256]]), ROW, ROW], ["'input'"]),
        ([specs(["x" * 900, "FP32", [1, 256]], ["x" * 900, "FP32", [1, 256]]), ROW, ROW], ["'xxxxxxxx"]),
        # datatypes
        ([specs(["input", "FP8", [1, 256]]), ROW], ["'FP8'"]),
        ([specs(["input", "fp32", [1, 256]]), ROW], ["'fp32'"]),
        ([specs(["input", ">f4", [1, 256]]), ROW], ["'>f4'"]),
        ([specs(["input", "object", [1, 256]]), ROW], ["'object'"]),
        ([specs(["input", "x" * 60_000, [1, 256]]), ROW], ["length <= 64"]),
        ([specs(["input", "x" * 60, [1, 256]]), ROW], ["'xxxxxxxx"]),
        ([specs(["input", "INT32", [1, 256]]), ROW], ["INT32"]),
        ([specs(["input", "FP64", [1, 128]]), ROW], ["FP64"]),
        ([specs(["input", "BOOL", [1, 256]]), bytes([0, 1, 2, 3] * 64)], ["byte 3"]),
        # shapes
        ([specs(["input", "FP32", [-1, 256]]), ROW], ["-1"]),
        ([specs(["input", "FP32", [-1, -256]]), ROW], ["-1"]),
        ([specs(["input", "FP32", [2**63, 256]]), ROW], ["9223372036854775808"]),
        ([specs(["input", "FP32", [2**63]]), b""], ["9223372036854775808"]),
        ([specs(["input", "FP32", [2**62, 256]]), ROW], ["4611686018427387904"]),
        ([specs(["input", "FP32", [0, 2**63]]), b""], ["9223372036854775808"]),
        ([specs(["input", "FP32", [0, 2**62, 2**62]]), b""], ["4611686018427387904"]),
        ([specs(["input", "FP32", [2**32, 2**32]]), b""], ["4294967296"]),
        ([specs(["input", "FP32", [1] * 17]), bytes(4)], ["17"]),
        ([specs(["input", "FP32", [2**63 - 1] * 7000]), b""], ["length <= 64"]),
        ([specs(*[["", "FP32", [1]]] * 4000, ["", "FP32", "x"]), b""], ["length <= 1024"]),
        ([specs(["input", "FP32", [256]]), ROW], ["[256]"]),
        ([specs(["input", "FP32", []]), bytes(4)], ["rank 0"]),
        ([specs(["input", "FP32", [1, 1, 256]]), ROW], ["[1, 1, 256]"]),
        ([specs(["input", "FP32", [1, 255]]), ROW[:-4]], ["[1, 255]"]),
        ([specs(["input", "FP32", [0, 255]]), b""], ["[0, 255]"]),
        ([specs(["input", "FP32", [256, 0]]), b""], ["[256, 0]"]),
        # frames
        ([specs(["input", "FP32", [1, 256]]), ROW[:-1]], ["1024", "1023"]),
        ([specs(["input", "FP32", [1, 256]]), ROW + b"\0"], ["1024", "1025"]),
        ([specs(["input", "FP32", [1, 256]]), b""], ["1024", "0"]),
        ([specs(["input", "FP32", [0, 256]]), ROW], ["[0, 256]", "1024"]),
    ],
)
def test_bad_tensors(dealer: Dealer, frames: list[bytes], named: list[str]) -> None:
    check_refused(dealer, frames, INVALID, 7, *named)


@pytest.mark.parametrize("kind", ["health", "metadata"])
def test_tensor_frames_behind_a_message_that_takes_none(dealer: Dealer, kind: str) -> None:
    check_refused(dealer, [pack({"type": kind, "v": 1, "id": 5}), ROW], INVALID, 5, "1 tensor frames")


def test_metadata_of_an_unknown_model(dealer: Dealer) -> None:
    check_refused(dealer, [pack({"type": "metadata", "v": 1, "id": 5, "model": "palm"})], "NOT_FOUND", 5, "'palm'")


def test_an_id_in_flight_cannot_be_used_again(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """The first of the two runs until it is let go."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    config = tmp_path / "tnxd.toml"
    config.write_text(ONE_LANE)
    environment = {**os.environ, "RUN_FIFO": str(fifo)}
    daemon = run_daemon("--model", "wait", "--config", str(config), program=ODD, environment=environment)
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(10, 4, 1.0), id=3)
        with fifo.open("wb"):  # it runs
            dealer.predict(rows(1, 4), id=3)
            error = dealer.error()
        assert (error.code, error.id) == ("ALREADY_EXISTS", 3)
        assert "3" in error.message
        result, _ = dealer.result()
        assert (result.id, result.outputs[0].shape) == (3, (10, 4))
        dealer.predict(rows(1, 4), id=3)  # which is free again
        again, _ = dealer.result()
        assert (again.id, again.outputs[0].shape) == (3, (1, 4))


def test_ids_in_flight_belong_to_their_connection(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as first, Dealer(daemon.endpoint) as second:
        for dealer in (first, second):
            dealer.predict(rows(2000), model="mlp", id=1)
        for dealer in (first, second):
            assert dealer.result()[0].id == 1


# --- unusual requests that are served --------------------------------------------------------------------------


@pytest.mark.parametrize("request_id", [0, 1, 2**31, 2**32, wire.MAX_ID])
def test_every_id_comes_back(dealer: Dealer, request_id: int) -> None:
    dealer.predict(rows(1), id=request_id)
    assert dealer.result()[0].id == request_id


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_served(dealer: Dealer, value: float) -> None:
    inputs = rows(3)
    inputs[1, 7] = value
    dealer.predict(inputs, model="mlp")
    _, (output,) = dealer.result()
    assert output.shape == (3, 128)
    assert np.isfinite(output[[0, 2]]).all()
    assert not np.isfinite(output[1]).all()
    check_good_request(dealer)


def test_zero_rows_are_served(dealer: Dealer) -> None:
    dealer.predict(rows(0), model="mlp")
    result, (output,) = dealer.result()
    assert result.outputs[0].shape == (0, 128)
    assert output.shape == (0, 128)
    check_good_request(dealer)


def test_unaligned_tensors_are_served(daemon: Daemon) -> None:
    """Small frames lie at any offset in libzmq's receive buffer: shift it byte by byte."""
    with Dealer(daemon.endpoint) as dealer:
        dealer.predict(rows(1), model="mlp")
        _, (expected,) = dealer.result()
        for padding in range(16):
            header = pack(predict_header(padding="x" * padding))
            dealer.socket.send_multipart([header, ROW])
            _, (output,) = dealer.result()
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_unknown_keys_and_items_are_ignored(dealer: Dealer) -> None:
    header = predict_header(inputs=[["input", "FP32", [1, 256], {"layout": "dense"}]], colour={"of": ["the", 7, "th"]})
    dealer.socket.send_multipart([pack(header), ROW])
    assert dealer.result()[0].id == 7
    check_good_request(dealer)


def test_a_minimum_of_infinite_memory_runs_on_the_cpu(dealer: Dealer) -> None:
    dealer.predict(rows(1), min_gpu_memory_mb=math.inf)
    assert dealer.result()[0].device == "cpu"


# --- sockets other than DEALER ---------------------------------------------------------------------------------


def test_req_sockets_work(daemon: Daemon) -> None:
    """Their empty delimiter comes back, with errors, too: without it a REQ socket waits for ever."""
    with Dealer(daemon.endpoint, zmq.REQ) as requester:
        check_good_request(requester)
        check_refused(requester, [b""], INVALID, None, "empty")
        check_refused(requester, [b"nonsense"], INVALID, None, "b'nonsense'")
        check_refused(requester, [pack(predict_header(model="palm")), ROW], "NOT_FOUND", 7, "'palm'")


def test_a_probing_router_gets_one_error(daemon: Daemon) -> None:
    """ZMQ_PROBE_ROUTER sends an empty message at every connection."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 0
        socket.probe_router = 1
        socket.connect(daemon.endpoint)
        assert socket.poll(PATIENCE_S * 1000)
        identity, header = socket.recv_multipart()
        error = wire.decode_reply(header, Limits())
        assert isinstance(error, wire.ErrorReply)
        assert (error.id, error.code) == (None, INVALID)
        socket.send_multipart([identity, pack(predict_header()), ROW])
        assert socket.poll(PATIENCE_S * 1000)
        _, header, output = socket.recv_multipart()
        assert isinstance(wire.decode_reply(header, Limits()), wire.Result)
        assert len(output) == 128 * 4


def test_a_stolen_identity_harms_nobody_else(daemon: Daemon) -> None:
    """Two peers that give themselves the same routing id: one of them is ignored, others are served."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as first, context.socket(zmq.DEALER) as second:
        for socket in (first, second):
            socket.linger = 0
            socket.routing_id = b"the same"
            socket.connect(daemon.endpoint)
        first.send_multipart([pack(predict_header()), ROW])
        second.send_multipart([pack(predict_header()), ROW])
        poller = zmq.Poller()
        poller.register(first, zmq.POLLIN)
        poller.register(second, zmq.POLLIN)
        assert poller.poll(PATIENCE_S * 1000)
        check_new_connection(daemon)


# --- peers that break ZMTP itself ------------------------------------------------------------------------------


@pytest.fixture
def peer(daemon: Daemon) -> Iterator[Peer]:
    with Peer(daemon.endpoint, timeout=PATIENCE_S) as connection:
        yield connection


def test_a_raw_peer_is_served(daemon: Daemon, peer: Peer) -> None:
    """The tool of the tests below is sound."""
    peer.greet().write(message(pack(predict_header()), ROW))
    header, output = peer.read_message()
    assert isinstance(wire.decode_reply(header, Limits()), wire.Result)
    assert len(output) == 128 * 4


@pytest.mark.parametrize(
    "opening",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(64),
        b"\xff" * 200,
        bytes(200),
        GREETING[:12] + b"WRONG".ljust(20, b"\0") + bytes(32),
        GREETING + frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB", command=True),
        GREETING + frame(b"\x05READY\x0bSocket-Type\xff\xff\xff\xffDEALER", command=True),
        GREETING + frame(b"\xffNOISE", command=True),
        GREETING + message(pack(predict_header()), ROW),
    ],
    ids=["HTTP", "ones", "zeros", "mechanism", "socket type", "length of a property", "command", "no READY"],
)
def test_nonsense_before_or_in_the_handshake_ends_the_connection(daemon: Daemon, peer: Peer, opening: bytes) -> None:
    peer.write(opening)
    peer.read_end()
    check_new_connection(daemon)


def test_a_handshake_that_stops_half_way_holds_nobody_up(daemon: Daemon, peer: Peer) -> None:
    peer.write(GREETING[:20])
    check_new_connection(daemon)


@pytest.mark.parametrize("size", [wire.Limits().message_bytes + 1, 2**40, 2**63, 2**64 - 1])
def test_a_frame_beyond_the_limit_ends_the_connection(daemon: Daemon, peer: Peer, size: int) -> None:
    peer.greet().write(frame(pack(predict_header()), more=True) + frame(b"begin", announce=size))
    peer.read_end()
    check_new_connection(daemon)


@pytest.mark.parametrize("vanish", [Peer.reset, Peer.close])
@pytest.mark.parametrize(
    "torn",
    [
        frame(pack(predict_header()), more=True),
        frame(pack(predict_header())[:5], announce=300),
        frame(pack(predict_header()), more=True) + frame(ROW[:100], announce=1024),
        frame(pack(predict_header()), more=True) + frame(ROW, more=True) * 100,
        frame(pack(predict_header()), more=True) + b"\x02\x00\x00",
    ],
    ids=["between frames", "in the header", "in a tensor", "after 100 frames", "in a length"],
)
def test_a_message_torn_off_is_dropped(daemon: Daemon, peer: Peer, torn: bytes, vanish: Callable[[Peer], None]) -> None:
    """The peer sends part of a message after a whole one, gets the whole one's answer, and vanishes."""
    peer.greet().write(message(pack(predict_header()), ROW) + torn)
    peer.read_message()
    check_new_connection(daemon)
    vanish(peer)
    check_new_connection(daemon)


def test_an_unfinished_message_holds_nobody_up(daemon: Daemon, peer: Peer) -> None:
    peer.greet().write(frame(pack(predict_header()), more=True) + frame(ROW, more=True) * 1000)
    check_new_connection(daemon)
    peer.write(frame(b""))
    error = wire.decode_reply(peer.read_message()[-1], Limits())
    assert isinstance(error, wire.ErrorReply)
    assert (error.code, error.id) == (INVALID, 7)


def test_broken_connections_leave_nothing_behind(daemon: Daemon) -> None:
    """Half of them vanish inside a message, half inside the handshake; the daemon's file descriptors all come back."""
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc, to count the daemon's file descriptors")
    check_new_connection(daemon)
    before = len(list(descriptors.iterdir()))
    for number in range(100):
        with Peer(daemon.endpoint, timeout=PATIENCE_S) as peer:
            if number % 2:
                peer.greet().write(frame(pack(predict_header()), more=True) + frame(ROW[:100], announce=1024))
            else:
                peer.write(GREETING[: number % 64])
            peer.reset()
    deadline = time.monotonic() + PATIENCE_S
    while (after := len(list(descriptors.iterdir()))) > before:
        assert time.monotonic() < deadline, f"{after} descriptors are open, {before} were"
        check_new_connection(daemon)


# --- peers that go away or do not listen -----------------------------------------------------------------------

ASK_AND_WAIT = """
import sys, zmq, numpy as np
from tnxctl.protocol import wire
socket = zmq.Context().socket(zmq.DEALER)
socket.connect(sys.argv[1])
x = np.zeros((2000, 256), np.float32)
for request_id in range(20):
    header = wire.encode(wire.Predict(v=1, id=request_id, inputs=(wire.TensorSpec("", "FP32", x.shape),)))
    socket.send_multipart([header, x])
socket.recv_multipart()
print("answered", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_memory_of_connections_that_have_gone_comes_back(run_daemon: Callable[..., Daemon]) -> None:
    """Each takes 23 KiB while it is there, which the C library would keep, and ever more of it as they come anew."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    count = min(2000, most - 200)
    daemon = run_daemon("--model", "mlp")
    check_new_connection(daemon)
    before = rss_mb(daemon.process.pid)
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(Peer(daemon.endpoint)).greet()
            assert rss_mb(daemon.process.pid) - before > count * 0.015
    end = time.monotonic() + PATIENCE_S
    while rss_mb(daemon.process.pid) - before > count * 0.005:
        assert time.monotonic() < end, rss_mb(daemon.process.pid) - before
        check_new_connection(daemon)


def test_a_client_killed_in_the_middle(daemon: Daemon) -> None:
    """Its first answer has come, the others are under way."""
    with subprocess.Popen(
        [sys.executable, "-c", ASK_AND_WAIT, daemon.endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as client:
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == "answered\n"
        finally:
            client.kill()
    check_new_connection(daemon)
    wait_for_health(daemon, is_idle)


def send_many(peer: Peer, count: int) -> None:
    """Ask for `count` answers of 32 KiB each: far more than the kernel's buffers and libzmq's queue hold."""
    inputs = rows(64).tobytes()
    for request_id in range(count):
        header = pack(predict_header(id=request_id, inputs=[["input", "FP32", [64, 256]]]))
        peer.write(message(header, inputs))


def test_a_client_that_reads_late_gets_every_answer(daemon: Daemon) -> None:
    with Peer(daemon.endpoint, receive_buffer=4096, timeout=PATIENCE_S) as peer:
        send_many(peer.greet(), 800)
        check_new_connection(daemon)
        seen = []
        for _ in range(800):
            header, output = peer.read_message()
            result = wire.decode_reply(header, Limits())
            assert isinstance(result, wire.Result), result
            assert len(output) == 64 * 128 * 4
            seen.append(result.id)
        assert sorted(seen) == list(range(800))


def test_a_client_that_never_reads_harms_nobody_else(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as other, Peer(daemon.endpoint, receive_buffer=4096, timeout=PATIENCE_S) as peer:
        send_many(peer.greet(), 800)
        for _ in range(10):
            check_good_request(other)
        wait_for_health(daemon, is_idle)
        before = other.health().undeliverable
        peer.reset()
        wait_for_health(daemon, lambda report: report.undeliverable > before)
        check_good_request(other)


# --- limits of one's own ---------------------------------------------------------------------------------------


def test_configured_limits_hold(run_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Also: 200,000 levels of nesting reach the decoder where the header limit lets them."""
    config = tmp_path / "tnxd.toml"
    config.write_text("[limits]\nheader_bytes = 1_000_000\ntensors = 2\nrank = 3\nmessage_bytes = 4096\n")
    with Dealer(run_daemon("--config", str(config)).endpoint) as dealer:
        deep = b"\x91" * 200_000 + b"\xc0"
        check_refused(dealer, [deep], INVALID, None, "200001 bytes")
        check_refused(dealer, [b"\x81" + pack("key") + deep], INVALID, None, "nested too deep")
        check_refused(dealer, [specs(["input", "FP32", [1] * 4]), bytes(4)], INVALID, 7, "rank 4", "limit of 3")
        check_refused(dealer, [specs(["input", "FP32", [5, 256]]), ROW * 5], INVALID, 7, "5120", "limit of 4096")
        three = [["input", "FP32", [1, 256]]] * 3
        check_refused(dealer, [specs(*three), ROW, ROW, ROW], INVALID, 7, "limit of 2")
