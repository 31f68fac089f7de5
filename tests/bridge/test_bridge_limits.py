"""Limits of time, number and memory: who is slow, or many, is cut, and nobody else notices."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from bridges import SECONDS, Bridge, Peer, Response, running_bridge
from conftest import Daemon
from tool import run

LITTLE_PATIENCE = {"header_timeout_s": 0.3, "body_timeout_s": 0.3, "idle_timeout_s": 0.3, "body_rate": 1_000_000}
ROOM = 8
LITTLE_ROOM = {"connections": ROOM, "body_bytes": 100_000, "bodies_bytes": 150_000}

HEALTH = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"


@pytest.fixture(scope="module")
def strict(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """Bridge with little patience, and little room."""
    with running_bridge(tmp_path_factory.mktemp("strict"), daemon.endpoint, *options(LITTLE_PATIENCE)) as running:
        yield running


@pytest.fixture(scope="module")
def full(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """Bridge with little room, that waits for those who have it: this process may be slow."""
    with running_bridge(tmp_path_factory.mktemp("full"), daemon.endpoint, *options({})) as running:
        yield running


def options(limits: dict[str, float]) -> list[str]:
    """Arguments for these limits beside those of room."""
    return [word for name, number in (LITTLE_ROOM | limits).items() for word in ("--limit", f"{name}={number}")]


@contextmanager
def in_time(bridge: Bridge, *sent: str | bytes) -> Iterator[tuple[Peer, Response]]:
    """Connection on which this was sent, and its answer: one that is ended before that is made again."""
    ends = time.monotonic() + SECONDS
    while True:
        with bridge.connect() as peer:
            try:
                answer = peer.send(*sent).response()
            except ConnectionError:  # this process may be slower than the bridge bears
                assert time.monotonic() < ends
                continue
            yield peer, answer
            return


@pytest.mark.parametrize("text", ["G", "GET /health HTTP/1.1\r\n", "GET /health HTTP/1.1\r\nHost: localhost\r\nX: "])
def test_headers_that_do_not_come(strict: Bridge, text: str) -> None:
    with in_time(strict, text) as (peer, answer):
        assert (answer.status, answer.error) == (408, "the headers did not come in time")
        assert peer.is_ended()


def test_headers_that_come_byte_by_byte(strict: Bridge) -> None:
    """Each byte is news, and none of them a reason to wait longer."""
    with strict.connect() as peer:
        try:
            while True:
                peer.send("x")
        except ConnectionError:
            pass


def test_ends_of_lines_are_no_request(strict: Bridge) -> None:
    with in_time(strict, HEALTH) as (peer, answer):
        assert answer.status == 200
        try:
            while True:
                peer.send("\r\n")
        except ConnectionError:
            pass


def test_connections_without_a_request(strict: Bridge) -> None:
    with strict.connect() as new, in_time(strict, HEALTH) as (idle, answer):
        assert answer.status == 200
        assert new.is_ended()
        assert idle.is_ended()


@pytest.mark.parametrize("sent", [0, 1, 50_000])
def test_bodies_that_do_not_come(strict: Bridge, sent: int) -> None:
    with in_time(strict, HEAD.format(90_000), b"x" * sent) as (peer, answer):
        assert (answer.status, answer.error) == (408, "the body did not come in time")
        assert peer.is_ended()


def test_chunks_that_do_not_end(strict: Bridge, full: Bridge) -> None:
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with in_time(strict, head, "1\r\nx\r\n") as (_, answer):
        assert answer.status == 408
    with full.connect() as peer:
        chunks = (b"%x\r\n%s\r\n" % (count, b"x" * count) for count in (50_000, 50_001))
        answer = peer.send(head, *chunks).response()
        assert answer.status == 413
        peer.send("0\r\n\r\n")
        assert peer.ask("GET", "/health").status == 200


def test_a_body_that_nobody_wants_and_that_does_not_come(strict: Bridge) -> None:
    with in_time(strict, HEAD.format(100_001)) as (peer, answer):
        assert answer.status == 413
        with suppress(ConnectionError):  # it may be ended already
            peer.send("x")
        assert peer.is_ended()


def test_bodies_have_a_limit_together(full: Bridge) -> None:
    with full.connect() as first, full.connect() as second:
        first.send(HEAD.format(90_000), b"x" * 89_000)
        assert first.socket.fileno() >= 0
        with full.connect() as probe:  # the bridge has seen the first one once it has answered this
            assert probe.ask("GET", "/health").status == 200
        answer = second.send(HEAD.format(90_000), b" " * 90_000).response()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert first.send(b" " * 1000).response().status == 400
    assert full.ask("POST", "/predict", b" " * 90_000).status == 400  # what was held is free again


def test_one_connection_too_many(full: Bridge) -> None:
    with ExitStack() as open_ones:
        ends = time.monotonic() + SECONDS
        taken = 0
        while taken < ROOM:  # until the bridge has noticed that those of tests before have gone
            assert time.monotonic() < ends
            peer = open_ones.enter_context(full.connect())
            with suppress(ConnectionError):  # it is refused without a question, and then ended
                taken += peer.ask("GET", "/health").status == 200
        with full.connect() as peer:
            answer = peer.response()
            assert (answer.status, answer.error) == (503, "the bridge has 8 connections already")
            assert peer.is_ended()


def test_who_does_not_read_is_cut(strict: Bridge) -> None:
    body = json.dumps({"input_data": [[0] * 256] * 64}).encode()
    with strict.connect() as peer:
        with suppress(ConnectionError):  # this process may be slower than the bridge bears
            for _ in range(60):
                peer.request("POST", "/predict", body)
        ends = time.monotonic() + SECONDS
        while is_held(strict, peer):
            assert time.monotonic() < ends
            time.sleep(0.02)  # between two looks: whoever does not read learns nothing
        answered = 0
        with suppress(ConnectionError, AssertionError):
            while peer.response().status == 200:
                answered += 1
        assert answered < 60
    with in_time(strict, HEALTH) as (_, answer):
        assert answer.status == 200


def test_answers_that_nobody_reads_count_as_well(daemon: Daemon, tmp_path: Path) -> None:
    """16 MiB in and 8 MiB out, of which the kernel's buffers take half: another such request is too much with them."""
    rows = 16 * 1024
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": [rows, 256],
        "parameters": {"binary_data_size": rows * 1024},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body, options = head + bytes(rows * 1024), {"Inference_Header_Content_Length": str(len(head))}
    with (
        running_bridge(tmp_path, daemon.endpoint, "--limit", f"bodies_bytes={26 * 1024 * 1024}") as bridge,
        bridge.connect() as idle,
        bridge.connect() as peer,
    ):
        idle.request("POST", "/v2/models/mlp/infer", body, **options)
        assert select.select([idle.socket], [], [], SECONDS)[0]
        assert peer.ask("POST", "/v2/models/mlp/infer", body, **options).status == 503
        assert len(idle.response().body) > rows * 512
        ends = time.monotonic() + SECONDS
        while peer.ask("POST", "/v2/models/mlp/infer", body, **options).status == 503:
            assert time.monotonic() < ends


def is_held(bridge: Bridge, peer: Peer) -> bool:
    """Whether the bridge holds its end of a connection open, by the kernel's table: "01" is established."""
    ends = f":{bridge.port:04X} 0100007F:{peer.socket.getsockname()[1]:04X} "
    # The kernel may list a connection twice, or not at all, where others come and go while the table is read.
    states = [row.split()[3] for row in Path("/proc/net/tcp").read_text().splitlines() if ends in row]
    return not states or states[-1] == "01"


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ("speed=3", "limit 'speed': there are connections, header_bytes"),
        ("connections=0", "limit: Expected `int` >= 1"),
        ("connections", "limit: Expected `int`"),
        ("body_timeout_s=nan", "limit: "),
    ],
)
def test_limits_that_are_none(limit: str, sentence: str) -> None:
    done = run("bridge", "--limit", limit)
    assert done.exit_code == 5
    assert sentence in done.stderr
