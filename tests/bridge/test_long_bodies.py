"""Long bodies, which the kernel writes to where they stay: whole, in order, within limits, and followed by others."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bridges import SECONDS, Bridge, Peer, Response, running_bridge, until
from conftest import Daemon
from tnxctl import Client
from tnxctl.bridge.receiving import LongBody

MIB = 1 << 20
LENGTH_HEADER = "Inference-Header-Content-Length"
MOST = np.zeros((600, 256), np.float32)
"""Rows that 1 MiB does for, of which their answer takes half as much as they do."""

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def message(rows: np.ndarray) -> bytes:
    """A request for `mlp` as it goes over the wire."""
    tensor = {
        "name": "input",
        "datatype": "FP32",
        "shape": rows.shape,
        "parameters": {"binary_data_size": rows.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    lines = [
        "POST /v2/models/mlp/infer HTTP/1.1",
        "Host: localhost",
        f"{LENGTH_HEADER}: {len(head)}",
        f"Content-Length: {len(head) + rows.nbytes}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + head + rows.tobytes()


def outputs(peer: Peer) -> np.ndarray:
    """The output in the next response."""
    return output_of(peer.response())


def output_of(answer: Response) -> np.ndarray:
    assert answer.status == 200, answer
    binary = answer.body[int(answer.headers[LENGTH_HEADER.lower()]) :]
    return np.frombuffer(binary, np.float32)


def claiming(nbytes: int) -> str:
    """Head of a request whose body has so many bytes."""
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {nbytes}\r\n\r\n"


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def either(
    request: pytest.FixtureRequest, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bridge]:
    """Bridge on either event loop."""
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "asyncio":
            (folder / "uvloop.py").write_text("raise ImportError")
            patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        else:
            pytest.importorskip("uvloop")
        with running_bridge(folder, daemon.endpoint) as running:
            yield running


@pytest.mark.parametrize("piece", [7_919, 65_536, 300_001, 4 * MIB])
def test_they_come_whole_however_they_are_cut(either: Bridge, daemon: Daemon, piece: int) -> None:
    rows = np.random.default_rng(piece).standard_normal((1500, 256), np.float32)
    with Client(daemon.endpoint, timeout=SECONDS) as client:
        wanted = client.predict(rows, model="mlp").output.ravel()
    sent = message(rows)
    with either.connect() as peer:
        for at in range(0, len(sent), piece):
            peer.send(sent[at : at + piece])
        assert np.array_equal(outputs(peer), wanted)
        assert peer.ask("GET", "/health").status == 200


def test_others_follow_them_on_the_connection(either: Bridge, daemon: Daemon) -> None:
    rows = [np.full((count, 256), count, np.float32) for count in (1, 400, 64, 1000)]
    with Client(daemon.endpoint, timeout=SECONDS) as client:
        wanted = [client.predict(each, model="mlp").output.ravel() for each in rows]
    with either.connect() as peer:
        for each in rows:
            peer.send(message(each) + HEALTH)
        for each in wanted:
            assert np.array_equal(outputs(peer), each)
            assert peer.response().status == 200


@pytest.fixture(scope="module")
def tight(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """Bridge with 1 MiB for all bodies together."""
    options = ("--limit", f"bodies_bytes={MIB}")
    with running_bridge(tmp_path_factory.mktemp("tight"), daemon.endpoint, *options) as running:
        yield running


def answer_once_there_is_room(bridge: Bridge, rows: np.ndarray) -> np.ndarray:
    """The output for these rows, as soon as the bridge has noticed that others have gone."""

    def ask() -> Response:
        with bridge.connect() as peer:
            return peer.send(message(rows)).response()

    return output_of(until(ask, lambda answer: answer.status != 503))


def test_a_length_that_is_only_claimed_takes_nothing_from_others(tight: Bridge) -> None:
    with tight.connect() as first, tight.connect() as second, tight.connect() as honest:
        for liar in (first, second):
            liar.send(claiming(200 * MIB), b"[" * 100_000)
        assert honest.ask("GET", "/health").status == 200  # by then the others were seen
        honest.send(message(MOST[:400]))
        assert len(outputs(honest))


def test_long_body_that_does_not_come_is_given_up(daemon: Daemon, tmp_path: Path) -> None:
    limits = [f"bodies_bytes={MIB}", "body_timeout_s=0.5", f"body_rate={100 * MIB}"]
    options = [word for limit in limits for word in ("--limit", limit)]
    with running_bridge(tmp_path, daemon.endpoint, *options) as hasty:
        with hasty.connect() as peer:
            assert peer.send(claiming(2 * MIB), b"[" * 700_000).response().status == 408
        assert len(answer_once_there_is_room(hasty, MOST))


def test_what_has_come_counts(tight: Bridge) -> None:
    with tight.connect() as first, tight.connect() as second:
        first.send(claiming(2 * MIB), b"[" * (MIB - 200_000))
        answer = second.send(message(MOST)).response()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert second.ask("GET", "/health").status == 200  # the rest of the refused body was read away
    assert len(answer_once_there_is_room(tight, MOST))


def test_who_goes_away_in_the_middle_leaves_nothing_behind(tight: Bridge) -> None:
    for _ in range(5):
        with tight.connect() as peer:
            peer.send(claiming(2 * MIB), b"[" * 700_000)
    assert len(answer_once_there_is_room(tight, MOST))


def test_a_bridge_that_ends_answers_one_that_has_not_come_whole(daemon: Daemon, tmp_path: Path) -> None:
    with running_bridge(tmp_path, daemon.endpoint) as bridge, bridge.connect() as peer:
        peer.send(claiming(2 * MIB), b"[" * 700_000)
        with bridge.connect() as idle:
            assert idle.ask("GET", "/health").status == 200
            bridge.process.send_signal(signal.SIGTERM)
            assert idle.is_ended()
        assert bridge.stop() == 0
        answer = peer.response()
        assert (answer.status, answer.error) == (503, "the bridge ends")


def test_the_rest_of_a_body_that_nobody_waits_for_any_more_is_read_away() -> None:
    async def come() -> None:
        held: list[int] = []
        filled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body = LongBody(memoryview(bytearray(10)), held.append, filled)
        body.add(4)
        filled.cancel()  # the task that waits has had no turn since
        body.add(6)
        assert (held, body.left) == ([4], 0)

    asyncio.run(come())
