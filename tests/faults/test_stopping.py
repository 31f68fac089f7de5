"""Stop of the daemon: each peer that reads gets its answers, or UNAVAILABLE."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from daemons import ODD, ONE_LANE, running
from dealer import Dealer, rows
from model_repositories import Repository, scaled
from tnxctl.protocol import wire
from zmtp import Peer, message

MANY = 4000
"""Requests: more than the sending queue of a connection holds."""


def hold(dealer: Dealer) -> None:
    """Block the only lane at its gate."""
    dealer.await_health(status="ready")
    dealer.predict(rows(1, 4, 1.0))
    dealer.await_health(running=1)


@pytest.mark.parametrize("how", ["twice", "timeout"])
def test_stop_with_more_replies_than_the_sending_queue_holds(how: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    config = f"drain_timeout_s = {20.0 if how == 'twice' else 0.5}\n{ONE_LANE}"
    environment = {"RUN_FIFO": str(tmp_path / "fifo")}
    with running(tmp_path, "--model", "wait", program=ODD, config=config, environment=environment) as daemon:
        with Dealer(daemon.endpoint) as dealer:
            hold(dealer)
            for _ in range(MANY - 1):
                dealer.predict(rows(1, 4))
            dealer.await_health(queued=MANY - 1)
            daemon.process.send_signal(signal.SIGTERM)
            if how == "twice":
                dealer.await_health(status="draining")
                daemon.process.send_signal(signal.SIGTERM)
            answers = [dealer.error() for _ in range(MANY)]
            assert sorted(answer.id or 0 for answer in answers) == list(range(MANY))
            assert {answer.code for answer in answers} == {"UNAVAILABLE"}
            assert all(answer.retry_after_us for answer in answers), "the next daemon can do it"
        assert daemon.process.wait(60) == 0


@pytest.mark.slow
def test_stop_gives_a_peer_that_reads_late_all_its_answers(tmp_path: Path) -> None:
    """They fill its connection, the queue behind, and what the daemon keeps for it: results, not only errors."""
    count = 500
    array = rows(64, 256)
    with running(tmp_path, "--bind", "tcp://127.0.0.1:*", stdout=-1) as daemon:
        assert daemon.process.stdout is not None
        line = daemon.process.stdout.readline().decode()
        endpoint = next(part.strip(",;") for part in line.split() if part.startswith("tcp://"))
        with Dealer(daemon.endpoint) as dealer, Peer(endpoint, receive_buffer=4096) as peer:
            peer.greet()
            for index in range(count):
                specs = (wire.TensorSpec("", "FP32", array.shape),)
                peer.write(message(wire.encode(wire.Predict(v=wire.VERSION, id=index, inputs=specs)), array.tobytes()))
            dealer.await_health(replies=count)
            daemon.process.send_signal(signal.SIGTERM)
            dealer.await_health(status="draining")
            daemon.process.send_signal(signal.SIGTERM)
            ids = []
            for _ in range(count):
                header, output = peer.read_message()
                reply = wire.decode_reply(header, wire.Limits())
                assert isinstance(reply, wire.Result)
                assert len(output) == 64 * 128 * np.dtype(np.float32).itemsize
                ids.append(reply.id)
            assert sorted(ids) == list(range(count))
        assert daemon.process.wait(60) == 0


def test_stop_answers_orders(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    repository = Repository(tmp_path / "models")
    arguments = ("--model-repository", str(repository.root), "--model", "mlp")
    with running(tmp_path, *arguments) as daemon, Dealer(daemon.endpoint) as dealer:
        dealer.await_health(status="ready")
        repository.settings("gate")
        repository.publish("gate", 1, scaled(3.0, before=f"open({str(fifo)!r}).read()"))
        sent = [
            wire.Reload(v=wire.VERSION, id=1),
            wire.Load(v=wire.VERSION, id=2, model="mlp@1"),
            wire.Unload(v=wire.VERSION, id=3, model="mlp@1"),
        ]
        for order in sent:
            dealer.socket.send(wire.encode(order))
        with fifo.open("wb"):  # the first is under way
            daemon.process.send_signal(signal.SIGTERM)
            answers = [dealer.error() for _ in sent]
            assert daemon.process.wait(60) == 0
        assert all(answer.retry_after_us for answer in answers)
        assert sorted((answer.id, answer.code) for answer in answers) == [(order.id, "UNAVAILABLE") for order in sent]
