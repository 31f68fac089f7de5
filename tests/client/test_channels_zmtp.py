"""ZMTP as bytes: messages and handshakes, cut at any place. No socket, but for libzmq's side of a handshake."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq

import zmtp as peer
from fixed_pairs import fixed_pair
from tnxctl.channels.channel import MISMATCH
from tnxctl.channels.zmtp import BUFFER_BYTES, Handshake, Inbox, ProtocolError, parts_of

PATIENCE_S = 30.0
MAX_FRAME_BYTES = 8 << 20
MAX_FRAMES = 7
SIZES = (0, 1, 254, 255, 256, 257, 65_526, 65_527, 65_528, 65_535, 65_536, 65_537, 200_000, 3 << 20)

NOT_ZMTP = (int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL), int(zmq.PROTOCOL_ERROR_ZMTP_UNSPECIFIED))


def fed(inbox: Inbox, data: bytes, cuts: Iterator[int]) -> Iterator[list[bytes]]:
    """The messages in bytes that come in pieces of these sizes."""
    left = memoryview(data)
    while len(left):
        space = inbox.space()
        assert len(space)
        nbytes = min(next(cuts), len(left), len(space))
        space[:nbytes] = left[:nbytes]
        left = left[nbytes:]
        inbox.filled(nbytes)
        while (frames := inbox.take()) is not None:
            assert type(frames[0]) is bytes
            assert all(not memoryview(frame).readonly for frame in frames[1:])
            yield [bytes(frame) for frame in frames]


def cuts(chance: random.Random) -> Iterator[int]:
    while True:
        yield chance.choice((1, 2, 8, 9, 10, chance.randrange(1, 300), 1 << 14, 1 << 16, 1 << 20))


@pytest.mark.parametrize("seed", range(40))
def test_messages_come_out_as_they_went_in_wherever_they_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    inbox = Inbox(MAX_FRAME_BYTES, MAX_FRAMES)
    sent, data, pongs = [], b"", b""
    for _ in range(chance.randrange(1, 30)):
        frames = [chance.randbytes(chance.choice(SIZES[:-2])) for _ in range(chance.choice((1, 1, 2, 3, 20)))]
        if chance.random() < 0.1:
            frames.append(chance.randbytes(chance.choice(SIZES)))
        sent.append(frames[:MAX_FRAMES])
        for place, body in enumerate(frames):
            if chance.random() < 0.2:
                context = chance.randbytes(chance.randrange(17))
                data += peer.frame(b"\x04PING\x00\x64" + context, command=True)
                pongs += peer.frame(b"\x04PONG" + context, command=True)
            if chance.random() < 0.1:
                data += peer.frame(b"\x07WHATEVER" + bytes(chance.choice(SIZES)), command=True)
            data += peer.frame(body, more=place < len(frames) - 1)
    assert list(fed(inbox, data, cuts(chance))) == sent
    assert inbox.pongs == pongs


def test_short_messages_are_right_with_a_cut_at_each_byte() -> None:
    data = peer.message(b"header", b"", bytes(255), bytes(256)) + peer.message(b"") + peer.message(b"last", b"x")
    expected = [[b"header", b"", bytes(255), bytes(256)], [b""], [b"last", b"x"]]
    for cut in range(1, len(data)):
        assert list(fed(Inbox(MAX_FRAME_BYTES, 10), data, iter((cut, len(data))))) == expected, cut


@pytest.mark.parametrize("size", SIZES)
def test_parts_are_what_the_other_side_reads(size: int) -> None:
    frames = [b"header", bytearray(size), np.zeros((size, 1), "u1"), np.float64(1.5), bytes(size)]
    expected = [b"header", bytes(size), bytes(size), np.float64(1.5).tobytes(), bytes(size)]
    data = b"".join(parts_of(frames))
    assert data == peer.message(*expected)
    assert list(fed(Inbox(MAX_FRAME_BYTES, 10), data, iter((1 << 24,) * 1000))) == [expected]


@pytest.mark.parametrize("command", [False, True])
def test_a_frame_may_be_as_long_as_allowed_and_no_longer(command: bool) -> None:
    for limit in (10, 255, 256, 100_000):
        longest = peer.frame(bytes(limit), command=command)
        assert list(fed(Inbox(limit, 1), longest, iter((1 << 20,) * 10))) == ([] if command else [[bytes(limit)]])
        with pytest.raises(ProtocolError) as caught:
            list(fed(Inbox(limit, 1), peer.frame(bytes(limit + 1), command=command), iter((1 << 20,) * 10)))
        assert caught.value.event == (zmq.Event.DISCONNECTED, 0)


@pytest.mark.parametrize("flag", [8, 16, 32, 64, 128])
def test_a_reserved_flag_is_no_frame(flag: int) -> None:
    inbox = Inbox(MAX_FRAME_BYTES, 1)
    with pytest.raises(ProtocolError):
        list(fed(inbox, peer.message(b"one") + bytes([flag, 0]), iter((100,))))


def test_a_long_size_with_its_first_bit_set_is_too_long() -> None:
    with pytest.raises(ProtocolError):
        list(fed(Inbox(MAX_FRAME_BYTES, 1), b"\x02" + b"\xff" * 8, iter((1,) * 9)))


def test_a_pong_gives_back_no_more_than_a_context_may_have() -> None:
    inbox = Inbox(MAX_FRAME_BYTES, 1)
    list(fed(inbox, peer.frame(b"\x04PING\x00\x64" + bytes(range(100)), command=True), iter((1000,))))
    assert inbox.pongs == peer.frame(b"\x04PONG" + bytes(range(16)), command=True)


# --- handshakes ----------------------------------------------------------------------------------------------

READY = peer.frame(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER\x08Identity\x00\x00\x00\x00", command=True)
CURVE_GREETING = peer.GREETING.replace(b"NULL\0", b"CURVE")


def shaken(*parts: bytes) -> tuple[bytes, bytes]:
    """The answer of a handshake to these parts in all, and what is left."""
    handshake, said, rest = Handshake(), b"", b""
    for part in parts:
        answer, rest = handshake.take(part)
        said += answer
    assert handshake.is_done
    return said, rest


def failure(*parts: bytes) -> Any:
    with pytest.raises(ProtocolError) as caught:
        shaken(*parts)
    return caught.value.event


def test_a_handshake_may_be_cut_at_each_byte() -> None:
    data = peer.GREETING + READY
    said, _ = shaken(data)
    for cut in range(1, len(data)):
        assert shaken(data[:cut], data[cut:]) == (said, b""), cut
    assert shaken(*(bytes((byte,)) for byte in data)) == (said, b"")


def test_what_follows_a_handshake_is_left() -> None:
    assert shaken(peer.GREETING, READY + b"more")[1] == b"more"
    long = READY[2:] + b"\x01X" + (BUFFER_BYTES - len(READY) - 5).to_bytes(4, "big")
    body = long.ljust(BUFFER_BYTES, b"\0")
    rest = bytes(BUFFER_BYTES)
    frame = peer.frame(body, command=True)
    _, left = shaken(peer.GREETING, frame[:-1], frame[-1:] + rest[1:])
    assert left == rest[1:]
    Inbox(1, 1).put(left)


@pytest.mark.parametrize(
    ("parts", "event"),
    [
        pytest.param([b"H"], NOT_ZMTP, id="another protocol"),
        pytest.param([b"\xff" + bytes(9)], NOT_ZMTP, id="no signature"),
        pytest.param([b"\x01\x00"], NOT_ZMTP, id="ZMTP 1"),
        pytest.param([peer.GREETING[:10], b"\x01"], NOT_ZMTP, id="ZMTP 2"),
        pytest.param([peer.GREETING[:10] + b"\x01\x06\x00\x00"], NOT_ZMTP, id="ZMTP 2 at once"),
        pytest.param([CURVE_GREETING], (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH), id="keys"),
        pytest.param([peer.GREETING, peer.message(b"hello")], NOT_ZMTP, id="a message"),
        pytest.param([peer.GREETING, peer.frame(b"\x05HELLO", command=True)], NOT_ZMTP, id="another command"),
        pytest.param([peer.GREETING, peer.frame(b"\x05READY", command=True)], NOT_ZMTP, id="no socket type"),
        pytest.param([peer.GREETING, READY.replace(b"ROUTER", b"PUBLIC")], NOT_ZMTP, id="another socket type"),
        pytest.param([peer.GREETING, peer.frame(READY[2:26], command=True)], NOT_ZMTP, id="cut short"),
        pytest.param([peer.GREETING, b"\x06" + (BUFFER_BYTES + 1).to_bytes(8, "big")], NOT_ZMTP, id="too long"),
        *(
            pytest.param(
                [peer.GREETING, peer.frame(b"\x05ERROR\x03" + status, command=True)],
                (zmq.Event.HANDSHAKE_FAILED_AUTH, int(status)),
                id=f"refused with {status.decode()}",
            )
            for status in (b"400", b"500")
        ),
        pytest.param([peer.GREETING, peer.frame(b"\x05ERROR\x04oops", command=True)], NOT_ZMTP, id="another error"),
    ],
)
def test_a_handshake_that_lets_nobody_in_says_why(parts: list[bytes], event: tuple[int, int]) -> None:
    assert failure(*parts) == event
    assert failure(b"".join(parts)) == event


class Listener:
    """libzmq's side. `shake` does a handshake with it, by pieces of what it says."""

    def __init__(self, kind: int, status: str = "", *, keys: bool = False) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.zap = self.context.socket(zmq.REP)
        self.zap.bind("inproc://zeromq.zap.01")
        self.status = status
        self.socket = self.context.socket(kind)
        self.socket.linger = 0
        if status:
            self.socket.zap_domain = b"test"
        if keys:
            self.socket.curve_server = True
            self.socket.curve_secretkey = fixed_pair("listener").secret.encode()
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def shake(self, nbytes: int) -> bytes:
        handshake = Handshake()
        with socket.create_connection(("127.0.0.1", self.port), PATIENCE_S) as held:
            held.sendall(handshake.first)
            while True:
                part = held.recv(nbytes)
                assert part, "it has hung up"
                answer, rest = handshake.take(part)
                held.sendall(answer)
                if handshake.is_done:
                    held.sendall(b"".join(parts_of([b"here"])))
                    assert self.socket.recv_multipart()[-1] == b"here"
                    return rest
                if answer and self.status:
                    version, number, *_ = self.zap.recv_multipart()
                    self.zap.send_multipart([version, number, self.status.encode(), b"", b"", b""])


@pytest.mark.parametrize("nbytes", [1, 7, 64, 65_536])
@pytest.mark.parametrize("status", ["", "200"])
def test_libzmq_lets_a_client_in(nbytes: int, status: str) -> None:
    with Listener(zmq.ROUTER, status) as listener:
        assert listener.shake(nbytes) == b""


@pytest.mark.parametrize("status", ["400", "500"])
def test_libzmq_refuses_a_client_by_number(status: str) -> None:
    with Listener(zmq.ROUTER, status) as listener, pytest.raises(ProtocolError) as caught:
        listener.shake(64)
    assert caught.value.event == (zmq.Event.HANDSHAKE_FAILED_AUTH, int(status))


def test_libzmq_that_asks_for_keys_is_told_at_once() -> None:
    with Listener(zmq.ROUTER, keys=True) as listener, pytest.raises(ProtocolError) as caught:
        listener.shake(1)
    assert caught.value.event == (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, MISMATCH)


def test_libzmq_with_another_kind_of_socket_is_told_at_once() -> None:
    with Listener(zmq.PUB) as listener, pytest.raises((ProtocolError, ConnectionError, AssertionError)) as caught:
        listener.shake(64)
    if isinstance(caught.value, ProtocolError):  # else it was faster, and has hung up
        assert caught.value.event == NOT_ZMTP
