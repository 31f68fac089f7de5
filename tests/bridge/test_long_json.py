"""Long JSON: a process beside the worker reads and writes it, so that others are answered meanwhile."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from bridges import SECONDS, Bridge, Peer, Response, running_bridge, until
from conftest import Daemon
from tnxctl import Client

INFER = "/v2/models/mlp/infer"

SLOW = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1], "data": [%s]}]}' % b",".join(
    [b"[1]"] * 1_000_000
)
"""4 MiB that keep an interpreter for seconds."""

WRONG = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1], "data": [%s]}]}' % b",".join(
    [b"true"] * 50_000
)


def helper_of(bridge: Bridge) -> int | None:
    """Process id of a bridge's helper, once it runs its program: the bridge waits for that."""
    for child in Path(f"/proc/{bridge.process.pid}/task/{bridge.process.pid}/children").read_text().split():
        with suppress(FileNotFoundError):
            if b"tnxctl.bridge.helper" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    return None


def await_helper(bridge: Bridge) -> int:
    """Wait until a bridge has a helper. Returns its process id."""
    found = until(lambda: helper_of(bridge), lambda found: found is not None)
    assert found is not None
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Have a process do nothing within the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def is_answered(peer: Peer) -> bool:
    return bool(select.select([peer.socket], [], [], 0)[0])


def test_others_are_answered_meanwhile(bridge: Bridge) -> None:
    with bridge.connect() as busy, bridge.connect() as other:
        assert busy.ask("POST", INFER, WRONG).status == 400
        helper = await_helper(bridge)
        for path in (INFER, "/predict"):
            body = SLOW if path == INFER else b'{"input_data": [%s]}' % b",".join([b"[1]"] * 1_000_000)
            with stopped(helper):  # so that it is not done before the others
                busy.request("POST", path, body)
                for _ in range(50):  # some would come in between even if it were the loop that reads the document
                    assert other.ask("GET", "/v2/health/live").status == 200
                    assert not is_answered(busy)
            assert busy.response().status == 400


def test_values_come_through(bridge: Bridge, daemon: Daemon) -> None:
    rows = np.random.default_rng(0).standard_normal((500, 256), np.float32)
    with Client(daemon.endpoint, timeout=SECONDS) as client:
        wanted = client.predict(rows, model="mlp").output
    tensor = {"name": "input", "datatype": "FP32", "shape": rows.shape, "data": rows.tolist()}
    answer = bridge.ask("POST", INFER, json.dumps({"id": "7", "inputs": [tensor]}).encode())
    (output,) = answer.document["outputs"]
    assert answer.document["id"] == "7"
    assert output["shape"] == [*wanted.shape]
    assert np.array_equal(np.array(output["data"], np.float32), wanted.ravel())
    answer = bridge.ask("POST", "/predict", json.dumps({"model": "mlp", "input_data": rows.tolist()}).encode())
    assert np.array_equal(np.array(answer.document["output"], np.float32), wanted)


def test_errors_come_through(bridge: Bridge) -> None:
    with bridge.connect() as peer:
        answer = peer.ask("POST", INFER, WRONG)
        assert (answer.status, "'input': its data is no FP32: Expected `float`, got `bool`" in answer.error) == (
            400,
            True,
        )
        answer = peer.ask("POST", "/predict", b'{"input_data": [%s[1, 2]]}' % (b"[1]," * 30_000))
        assert (answer.status, answer.error) == (400, "input_data[30000] has 2 values, and input_data[0] has 1")
        answer = peer.ask(
            "POST", INFER, b'{"inputs": [], "parameters": {"priority": [%s]}}' % b",".join([b"1"] * 50_000)
        )
        assert (answer.status, answer.error) == (
            400,
            "parameter 'priority' is None: expected a whole number, 0 or more",
        )


def test_a_helper_that_dies_is_replaced(daemon: Daemon, tmp_path: Path) -> None:
    with running_bridge(tmp_path, daemon.endpoint) as bridge:
        assert helper_of(bridge) is None
        with bridge.connect() as peer:

            def ask() -> Response:
                peer.request("POST", INFER, SLOW)
                os.kill(await_helper(bridge), signal.SIGKILL)
                return peer.response()

            answer = until(ask, lambda answer: answer.status != 400)  # else it was through before
            assert (answer.status, answer.headers.get("retry-after")) == (503, "1"), answer
            assert peer.ask("POST", INFER, WRONG).status == 400
        helper = await_helper(bridge)
        assert bridge.stop() == 0
        assert not Path(f"/proc/{helper}").exists()


def test_who_goes_away_takes_the_work_along(daemon: Daemon, tmp_path: Path) -> None:
    with running_bridge(tmp_path, daemon.endpoint) as bridge:
        with bridge.connect() as peer:
            peer.request("POST", INFER, SLOW)
            helper = await_helper(bridge)
            os.kill(helper, signal.SIGSTOP)  # it is not through before, and then ended for being idle
        until(lambda: helper_of(bridge), lambda found: found is None)
        assert bridge.ask("POST", INFER, WRONG).status == 400
        assert helper_of(bridge) != helper
