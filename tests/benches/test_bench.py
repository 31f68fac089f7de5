"""The benchmark: its numbers must be right, above all those that flatter when they are wrong."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zmq

from benchmarks import check_that_it_stops_what_it_started, first_half, refusal, result_header, run
from conftest import Daemon
from tnxctl.protocol import wire

# isort: split
# On the path since `benchmarks` was imported.
import floors
import latency
from loadgen import Connection, Context, Recording, closed_loop, open_loop
from measurement import evaluate
from processes import BenchError, ChildProcess, cpu_ns
from report import CLIENT, DAEMON, ECHO, FORWARD, PERCENTILES, STAGES, Case, compare, summarise
from targets import is_here, probe
from workload import FIRST_ID, Workload, mlp

STALL_SECONDS = 0.5


def error_header(id_: int | None) -> bytes:
    return wire.encode(wire.ErrorReply(v=1, id=id_, code="UNAVAILABLE", message="the daemon is draining"))


class FakeServer:
    """Answers with the first half of the input; `before` may pause it, `answer` may change what it says."""

    def __init__(self, context: Context) -> None:
        self.before: Callable[[int], None] = lambda number: None
        self.answer: Callable[[int], bytes] = result_header
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._stop = context.socket(zmq.PAIR)
        self._stopped = context.socket(zmq.PAIR)
        self._stop.bind(f"inproc://stop-{id(self)}")
        self._stopped.connect(f"inproc://stop-{id(self)}")
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while not any(socket is self._stopped for socket, _ in poller.poll()):
            peer, header, tensor = self._socket.recv_multipart()
            request = wire.decode_request(header, wire.Limits())
            self.before(request.id - FIRST_ID)
            output = first_half(np.frombuffer(tensor, np.float32).reshape(-1, 256))
            reply = self.answer(request.id)
            frames = [peer, reply]
            if isinstance(wire.decode_reply(reply, wire.Limits()), wire.Result):
                frames.append(output.tobytes())
            self._socket.send_multipart(frames)

    def close(self) -> None:
        self._stop.send(b"")
        self._thread.join()
        for socket in (self._socket, self._stop, self._stopped):
            socket.close()


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def server(context: Context) -> Iterator[FakeServer]:
    server = FakeServer(context)
    yield server
    server.close()


@pytest.fixture
def workload() -> Workload:
    return mlp(1, False, first_half)


def stall_once(number: int) -> None:
    if number == 20:
        time.sleep(STALL_SECONDS)  # the stall itself, whose cost is measured: no wait for something


def even_ms(count: int, gap: int) -> list[int]:
    return [number * gap * 1_000_000 for number in range(count)]


# --- load generators ---------------------------------------------------------------------------------------------


def test_a_stall_of_the_server_costs_every_request_that_was_due_in_it(
    context: Context, server: FakeServer, workload: Workload
) -> None:
    server.before = stall_once
    with Connection(context, server.endpoint, workload) as connection:
        result = evaluate(open_loop(connection, even_ms(150, gap=4)), workload, check=True)
    assert len(result.latency_us) == 150
    assert not result.errors
    # Of the 125 requests due while the server slept, those of the first half waited for at least the second half.
    waited = np.count_nonzero(result.latency_us >= STALL_SECONDS / 2 * 1e6)
    assert waited >= STALL_SECONDS / 2 / 0.004
    summary = summarise(Case(1, rate=250.0), [result], is_daemon=True)
    assert summary.latency_us["p90"] >= STALL_SECONDS / 2 * 1e6 * 0.99  # the histogram's three digits
    assert summary.latency_us["max"] >= STALL_SECONDS * 1e6 * 0.99


def test_a_closed_loop_sees_the_same_stall_once_per_outstanding_request(
    context: Context, server: FakeServer, workload: Workload
) -> None:
    sent: list[int] = []

    def stall(number: int) -> None:
        stall_once(number)
        if number == 20:
            sent.append(connection.sent)

    server.before = stall
    with Connection(context, server.endpoint, workload) as connection:
        while not sent:  # where this machine is slow, the loop may be over before it
            result = evaluate(closed_loop(connection, 4, STALL_SECONDS), workload, check=True)
    assert np.count_nonzero(result.latency_us >= STALL_SECONDS * 0.9 * 1e6) >= 1
    assert 20 < sent[0] <= 20 + 4, "no others were due while the server slept"


def test_a_pause_of_the_load_generator_counts_as_latency_too(
    context: Context, server: FakeServer, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Connection(context, server.endpoint, workload) as connection:
        send = connection.send

        def sleepy_send() -> None:
            if connection.sent == 10:
                time.sleep(0.2)  # the pause itself, likewise
            send()

        monkeypatch.setattr(connection, "send", sleepy_send)
        result = evaluate(open_loop(connection, even_ms(50, gap=2)), workload, check=True)
    # Requests 10 to 49 were due 20 to 98 ms from the begin, none was sent before 220 ms.
    assert np.count_nonzero(result.latency_us >= 0.12e6) >= 40
    assert result.late_us.max() >= 0.19e6


def test_an_open_loop_gives_up_what_is_never_answered(
    context: Context, server: FakeServer, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = lambda id_: result_header(id_ if id_ % 2 else FIRST_ID + 10**6)
    with Connection(context, server.endpoint, workload) as connection:
        # Every second answer belongs to no request, so the count of answers is complete and the loop ends.
        result = evaluate(open_loop(connection, even_ms(10, gap=1)), workload, check=False)
    assert result.errors == {"UNEXPECTED": 5, "LOST": 5}
    monkeypatch.setattr("loadgen.PATIENCE_SECONDS", 0.3)
    with context.socket(zmq.ROUTER) as silent:
        silent.linger = 0
        port = silent.bind_to_random_port("tcp://127.0.0.1")
        with Connection(context, f"tcp://127.0.0.1:{port}", workload) as connection:
            result = evaluate(open_loop(connection, even_ms(10, gap=1)), workload, check=False)
    assert result.errors == {"LOST": 10}


def test_a_closed_loop_gives_up_a_silent_server(
    context: Context, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadgen.PATIENCE_SECONDS", 0.1)
    with context.socket(zmq.ROUTER) as silent:
        silent.linger = 0
        endpoint = f"tcp://127.0.0.1:{silent.bind_to_random_port('tcp://127.0.0.1')}"
        with Connection(context, endpoint, workload) as connection, pytest.raises(BenchError, match=endpoint):
            closed_loop(connection, 2, 1.0)


def test_a_closed_loop_keeps_the_number_outstanding(context: Context, server: FakeServer, workload: Workload) -> None:
    with Connection(context, server.endpoint, workload) as connection:
        recording = closed_loop(connection, 8, 0.05)
    assert len(recording.answers) == len(recording.sent_ns) == connection.sent
    for number, sent_ns in enumerate(recording.sent_ns):
        before = sum(arrived_ns <= sent_ns for arrived_ns, _ in recording.answers)
        assert number - before < 8
    assert recording.due_ns == recording.sent_ns


# --- floors ------------------------------------------------------------------------------------------------------


class Script(Exception):
    """The scripted socket has nothing more to receive."""


class ScriptedSocket:
    """A socket for one thread: gives out frames one by one and keeps what is sent."""

    def __init__(self, *messages: tuple[bytes, ...]) -> None:
        self._frames = [frame for message in messages for frame in message]
        self.sent: list[list[bytes]] = [[]]

    def recv(self, flags: int = 0) -> bytes:
        if not self._frames:
            raise zmq.Again if flags & zmq.NOBLOCK else Script
        return self._frames.pop(0)

    def send(self, frame: Any, flags: int = 0) -> None:
        self.sent[-1].append(bytes(frame))
        if not flags & zmq.SNDMORE:
            self.sent.append([])

    def get_string(self, option: int) -> str:
        return "tcp://127.0.0.1:1"


def check_floor(socket: ScriptedSocket, workload: Workload, tensors: list[bytes]) -> None:
    assert socket.sent.pop() == []
    for number, (peer, header, tensor) in enumerate(socket.sent):
        assert peer == b"peer"
        assert header == result_header(FIRST_ID + number)
        assert tensor == tensors[number]


def test_the_echo_floor_answers_each_request_with_its_id_and_the_recorded_bytes(workload: Workload) -> None:
    answer = workload.answer(result_header(FIRST_ID), b"t" * 512)
    socket = ScriptedSocket(*[(b"peer", *workload.request(number)) for number in range(3)])
    with pytest.raises(Script):
        floors.echo(socket, {answer.request_bytes: answer})
    check_floor(socket, workload, [b"t" * 512] * 3)


def test_the_forward_floor_computes_without_a_handicap(workload: Workload) -> None:
    answer = workload.answer(result_header(FIRST_ID), b"t" * 512)
    socket = ScriptedSocket(*[(b"peer", *workload.request(number)) for number in range(3)])
    inference_modes = set()

    def compute(tensor: bytes) -> np.ndarray[Any, Any]:
        inference_modes.add(torch.is_inference_mode_enabled())
        return first_half(np.frombuffer(tensor, np.float32).reshape(-1, 256))

    with pytest.raises(Script):
        floors.forward(socket, {answer.request_bytes: answer}, compute)
    check_floor(socket, workload, [first_half(workload.input(number)).tobytes() for number in range(3)])
    assert inference_modes == {True}


def test_the_batching_floor_answers_all_that_wait_with_the_rows_of_one_forward(workload: Workload) -> None:
    answer = workload.answer(result_header(FIRST_ID), b"t" * 512)
    socket = ScriptedSocket(*[(b"peer", *workload.request(number)) for number in range(67)])
    rows = []

    def compute(tensor: bytes) -> np.ndarray[Any, Any]:
        assert torch.is_inference_mode_enabled()
        rows.append(len(tensor) // answer.request_bytes)
        return first_half(np.frombuffer(tensor, np.float32).reshape(-1, 256))

    with pytest.raises(Script):
        floors.batching(socket, {answer.request_bytes: answer}, compute)
    assert rows[-2:] == [64, 3]
    check_floor(socket, workload, [first_half(workload.input(number)).tobytes() for number in range(67)])


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluate_counts_what_went_wrong(workload: Workload) -> None:
    outputs = [first_half(workload.input(number)).tobytes() for number in range(100, 106)]
    outputs[1] = bytes(512)  # not what the model makes
    answers = [
        (1_100_000, result_header(FIRST_ID + 102)),
        (1_200_000, result_header(FIRST_ID + 101)),
        (1_300_000, error_header(FIRST_ID + 100)),
        (1_400_000, error_header(None)),
        (1_500_000, result_header(FIRST_ID + 102)),  # once more
        (1_600_000, result_header(FIRST_ID + 99)),  # of an earlier round
    ]
    due_ns = [1_000_000 + 10_000 * number for number in range(4)]
    recording = Recording(
        100, due_ns, list(due_ns), answers, deque([outputs[2], outputs[1], b"", b"", outputs[2], b""]), 1.0
    )
    result = evaluate(recording, workload, check=True)
    assert result.errors == Counter(UNAVAILABLE=1, UNEXPECTED=3, WRONG=1, LOST=1)
    assert result.latency_us.tolist() == [80.0, 190.0]
    assert result.devices == {"cpu": 2}
    assert [timing.total_us for timing in result.timings] == [110.0, 110.0]
    assert not evaluate(recording, workload, check=False).errors["WRONG"]


def test_every_request_carries_its_own_id_and_tensor(workload: Workload) -> None:
    limits = wire.Limits()
    for number in (0, 1, 7, 8, 255, 256, 10**9):
        header, tensor = workload.request(number)
        request = wire.decode_request(header, limits)
        assert isinstance(request, wire.Predict)
        assert request.id == FIRST_ID + number
        assert not request.prefer_gpu
        assert request.inputs == (wire.TensorSpec("input", "FP32", (1, 256)),)
        assert tensor == workload.input(number).tobytes()
        assert workload.is_right(number, (1, 128), tensor[:512])
        assert not workload.is_right(number, (1, 256), tensor)
        assert not workload.is_right(number, (128,), tensor[:512])
        assert not workload.is_right(number + 1, (1, 128), tensor[:512])


def test_ratios_are_taken_round_by_round() -> None:
    def summary(*p50s: float) -> Any:
        rounds = []
        for p50 in p50s:
            recording = Recording(0, [0], [0], [(int(p50 * 1e3), result_header(FIRST_ID))], deque([b""]), 1e-6 * p50)
            rounds.append(evaluate(recording, mlp(1, False, first_half), check=False))
        return summarise(Case(1, outstanding=1), rounds, is_daemon=True)

    # The machine is slower by the round. The medians of the rounds, 220 over 200, would not tell.
    ratios = compare({DAEMON: summary(100, 220, 900), FORWARD: summary(200, 400, 100)})
    assert list(ratios) == ["daemon / forward floor"]
    ratio = ratios["daemon / forward floor"]["p50"]
    assert (ratio.median, ratio.min, ratio.max) == (0.55, 0.5, 9.0)
    speed = ratios["daemon / forward floor"]["requests_per_s"]
    assert speed.median == pytest.approx(1 / 0.55, abs=1e-3)


# --- servers -----------------------------------------------------------------------------------------------------


def test_probe_says_why_a_daemon_cannot_be_measured(context: Context, server: FakeServer, workload: Workload) -> None:
    server.answer = error_header
    with pytest.raises(BenchError, match="UNAVAILABLE: the daemon is draining"):
        probe(context, server.endpoint, workload)
    server.answer = result_header
    with pytest.raises(BenchError, match="computes on cpu, not on a GPU: only device"):
        probe(context, server.endpoint, mlp(1, True, first_half))


@pytest.mark.parametrize(
    ("endpoint", "here"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.1.2.3:5555", True),
        ("tcp://localhost:5555", True),
        ("tcp://[::1]:5555", True),
        ("ipc:///run/tensornext.sock", True),
        ("tcp://192.168.1.100:5555", False),
        ("tcp://127.example.org:5555", False),
    ],
)
def test_floors_are_compared_only_with_a_daemon_on_this_machine(endpoint: str, here: bool) -> None:
    assert is_here(endpoint) is here


def test_a_server_that_does_not_start_is_reported_with_what_it_said() -> None:
    program = "import sys; sys.exit('no such device')"
    with (
        ChildProcess("tnxd", ["-c", program]) as started,
        pytest.raises(BenchError, match="tnxd ended before it was ready; it said:\nno such device"),
    ):
        started.ready()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_cpu_time_of_a_process_counts_all_its_threads() -> None:
    # The thread works until it has used 0.1 s, the main thread sleeps on it.
    program = """if True:
        import threading, time
        def work():
            while time.thread_time() < 0.1: pass
        thread = threading.Thread(target=work); thread.start(); thread.join()
        print("ready", flush=True)
        input()
    """
    with ChildProcess("worker", ["-c", program]) as worker:
        worker.ready()
        used = cpu_ns(worker.pid)
        assert used is not None
        assert used >= 0.1e9
    assert cpu_ns(worker.pid) is None
    assert cpu_ns(None) is None


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_a_running_daemon_beside_the_floors(daemon: Daemon, tmp_path: Path) -> None:
    paths = tmp_path / "latency.json", tmp_path / "latency.png"
    printed = run(
        *("latency.py", "--host", daemon.endpoint.removeprefix("tcp://"), "--pid", str(daemon.process.pid)),
        *("--batch-sizes", "1,8", "--outstanding", "1,4", "--rate", "500", "--arrivals", "constant"),
        *("--rounds", "2", "--seconds", "0.02", "--json", str(paths[0]), "--plot", str(paths[1])),
    )
    assert daemon.process.poll() is None
    report = json.loads(paths[0].read_bytes())
    assert report["settings"]["rounds"] == 2
    assert report["environment"]["cores"] >= 1
    cases = [(case["case"]["rows"], case["case"]["outstanding"], case["case"]["rate"]) for case in report["cases"]]
    assert cases == [(1, 1, 0), (1, 4, 0), (8, 1, 0), (8, 4, 0), (1, 0, 500)]
    for case in report["cases"]:
        names = [DAEMON, CLIENT, FORWARD, ECHO] if case["case"]["outstanding"] == 1 else [DAEMON, FORWARD, ECHO]
        assert list(case["targets"]) == names
        for name, target in case["targets"].items():
            assert target["errors"] == {}
            assert len(target["rounds"]) == 2
            assert target["requests"] == sum(round_["requests"] for round_ in target["rounds"]) > 0
            for latency_us in (target["latency_us"], *(round_["latency_us"] for round_ in target["rounds"])):
                assert list(latency_us) == list(PERCENTILES)
                assert sorted(latency_us.values()) == list(latency_us.values())
            assert bool(target["stages_us"]) == bool(target["devices"]) == (name in (DAEMON, CLIENT))
            assert (target["histogram"] is None) == (case["case"]["rate"] == 0)
            if sys.platform == "linux":
                assert target["server_cpu_us"] > 0
        stages = case["targets"][DAEMON]["stages_us"]
        assert list(stages) == list(STAGES)
        assert sum(stages[stage] for stage in STAGES[:-1]) == pytest.approx(stages["total"], rel=0.02)
        assert {"daemon / forward floor", "daemon / echo floor"} <= set(case["ratios"])
        for name in case["targets"]:
            assert name in printed
    opened = report["cases"][-1]["targets"][DAEMON]
    assert opened["requests"] == 2 * 10
    assert paths[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--batch-sizes", "1,x"), 2, "'1,x' is not a list of numbers"),
        (("--rate", "0"), 2, "0 is not between"),
        (("--rate", "10", "--no-rate"), 2, "exclude each other"),
        (("--pid", "1"), 2, "it needs --host"),
        (("--host", "127.0.0.1:x"), 1, "port 'x'"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    got, said = refusal(latency.main, *arguments)
    assert got == code
    assert sentence in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the servers through /proc")
def test_a_benchmark_that_is_interrupted_stops_what_it_started() -> None:
    check_that_it_stops_what_it_started("latency.py", "--no-rate", number=signal.SIGINT, children=3)
