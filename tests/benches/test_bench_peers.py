"""Throughput and the comparison with other servers: the load generators, the process trees, the arithmetic."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import msgspec
import numpy as np
import pytest
import zmq

from benchmarks import (
    BENCH,
    SECONDS,
    Array,
    Listen,
    answer_of,
    check_that_it_stops_what_it_started,
    first_half,
    http,
    listening,
    raw_answer,
    refusal,
    result_header,
    run,
    zmtp,
)
from patience import longer_each_time
from tnxctl.protocol import wire

# isort: split
# On the path since `benchmarks` was imported.
import calling
import formats

import compare
import comparison
import contenders
import httpload
import idle
import proctree
import throughput
from comparison import BRIDGE, FASTAPI_RAW, LEAN, NATURAL, TENSORNEXT, TRITON, C
from contenders import CONTENDERS, ENVIRONMENTS, Contender, PeerServer
from goals import goals_text
from measurement import evaluate
from processes import BenchError, cpu_ns
from workload import Workload, mlp
from zmtpload import ZmtpConnection
from zmtpsocket import frame

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these benchmarks work by way of /proc and epoll")


@pytest.fixture(scope="module")
def workload() -> Workload:
    return mlp(1, False, first_half)


@pytest.fixture
def listen() -> Iterator[Listen]:
    with listening() as start:
        yield start


# --- the lean HTTP client ----------------------------------------------------------------------------------------


def raw_requests(port: int, workload: Workload) -> tuple[str, list[bytes]]:
    url = f"http://127.0.0.1:{port}/predict"
    encoded = [formats.encode("raw", workload.input(number)) for number in range(4)]
    return url, [httpload.request_bytes(url, headers, body) for headers, body in encoded]


@pytest.mark.parametrize("outstanding", [1, 8])
def test_http_answers_are_counted_and_belong_to_their_requests(
    listen: Listen, workload: Workload, outstanding: int
) -> None:
    seen: Counter[str] = Counter()

    def answer(body: bytes) -> list[bytes]:
        seen["requests"] += 1
        whole = raw_answer(body)
        return [whole[:20], whole[20:70], whole[70:]]  # broken within the head and at its end

    url, requests = raw_requests(listen(http(answer)), workload)
    answers = httpload.closed_loop(url, requests, outstanding, 0.05)
    assert len(answers.latency_us) == seen["requests"] >= outstanding
    assert not answers.errors
    assert min(answers.latency_us) > 0
    assert max(answers.latency_us) <= answers.seconds * 1e6
    assert answers.kept
    for number, headers, body in answers.kept:
        assert headers["x-last"] == "1"
        assert workload.is_right(number, (1, 128), body)
        assert not workload.is_right(number + 1, (1, 128), body)


def test_refusals_over_http_are_errors_and_not_fast_answers(listen: Listen, workload: Workload) -> None:
    def answer(body: bytes) -> list[bytes]:
        return [b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"]

    url, requests = raw_requests(listen(http(answer)), workload)
    answers = httpload.closed_loop(url, requests, 2, 0.02)
    assert not answers.latency_us
    assert answers.errors["503"] >= 2


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([], "closed a connection in place of an answer"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"], "sends no Content-Length"),
    ],
)
def test_an_http_server_that_breaks_off_ends_the_loop(
    listen: Listen, workload: Workload, pieces: list[bytes], sentence: str
) -> None:
    url, requests = raw_requests(listen(http(lambda body: pieces)), workload)
    with pytest.raises(BenchError, match=sentence):
        httpload.closed_loop(url, requests, 1, 1.0)


def test_an_http_server_that_says_nothing_is_given_up(
    listen: Listen, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("httpload.PATIENCE_SECONDS", 0.1)
    url, requests = raw_requests(listen(lambda connection: connection.recv(1) and None), workload)
    with pytest.raises(BenchError):
        httpload.closed_loop(url, requests, 1, 1.0)


@pytest.mark.skipif(httpload.wrk_version() is None, reason="wrk is not installed")
def test_wrk_sends_these_very_bytes_and_tells_what_came_back(listen: Listen) -> None:
    body = bytes(range(256)) * 4  # every byte, quotes and backslashes too
    seen: Counter[bool] = Counter()

    def answer(got: bytes) -> list[bytes]:
        seen[got == body] += 1
        status = b"200 OK" if seen[True] % 2 else b"500 Internal Server Error"
        return [b"HTTP/1.1 %s\r\nContent-Length: 2\r\n\r\nok" % status]

    url = f"http://127.0.0.1:{listen(http(answer))}/predict"
    for seconds in longer_each_time(0.1):
        report = httpload.wrk(url, {"Content-Type": "application/octet-stream"}, body, 1, seconds)
        if report.requests > 5:  # else this process has hardly answered meanwhile
            break
    assert seen[False] == 0
    assert 0 < report.requests <= seen[True]
    assert report.errors["STATUS"] >= report.requests // 2 - 1 > 0
    assert report.seconds >= 0.9
    assert 0 < report.latency_us["p50"] <= report.latency_us["p99"] <= report.latency_us["max"]


# --- formats -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", ["json", "raw", "triton"])
def test_every_format_carries_every_bit(format_: str) -> None:
    array = np.random.default_rng(0).standard_normal((3, 256), np.float32)
    headers, body = formats.encode(format_, array)
    if format_ == "json":
        assert np.array(json.loads(body)["input"], np.float32).tobytes() == array.tobytes()
        answer, said = json.dumps({"output": array[:, :128].tolist()}).encode(), {}
    else:
        start = int(headers.get("Inference-Header-Content-Length", 0))
        assert body[start:] == array.tobytes()
        answer, said = body[:start] + first_half(array).tobytes(), {"inference-header-content-length": str(start)}
    assert formats.decode(format_, said, answer).tobytes() == first_half(array).tobytes()


# --- the lean ZMTP client ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outstanding", [1, 16])
def test_the_zmtp_client_speaks_with_libzmq(workload: Workload, outstanding: int) -> None:
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
                    peer, header, tensor = router.recv_multipart()
                    request = wire.decode_request(header, wire.Limits())
                    output = first_half(np.frombuffer(tensor, np.float32).reshape(1, 256))
                    router.send_multipart([peer, result_header(request.id), output.tobytes()])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with ZmtpConnection(endpoint, workload) as connection:
                recording = connection.closed_loop(outstanding, 0.05)
                again = connection.closed_loop(outstanding, 0.02)
        finally:
            stop.send(b"")
            thread.join()
    for found in (recording, again):
        result = evaluate(found, workload, check=True)
        assert not result.errors
        assert len(result.latency_us) == len(found.sent_ns) >= outstanding
    assert again.first == len(recording.sent_ns)


def test_the_zmtp_client_puts_split_messages_together_and_answers_pings(listen: Listen, workload: Workload) -> None:
    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        whole = answer_of(header, tensor) + frame(b"\x04PING\x00\x0amark", 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(whole), 7):
            connection.sendall(whole[at : at + 7])

    endpoint = f"tcp://127.0.0.1:{listen(zmtp(reply))}"
    with ZmtpConnection(endpoint, workload) as connection:
        result = evaluate(connection.closed_loop(3, 0.02), workload, check=True)
    assert not result.errors
    assert len(result.latency_us) >= 3


def test_the_zmtp_client_sees_wrong_answers(listen: Listen, workload: Workload) -> None:
    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        connection.sendall(answer_of(header, bytes(len(tensor))))

    with ZmtpConnection(f"tcp://127.0.0.1:{listen(zmtp(reply))}", workload) as connection:
        result = evaluate(connection.closed_loop(1, 0.01), workload, check=True)
    assert result.errors["WRONG"] > 0


def test_the_zmtp_client_gives_up_those_who_do_not_answer(
    listen: Listen, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmtpsocket.PATIENCE_SECONDS", 0.1)
    endpoint = f"tcp://127.0.0.1:{listen(zmtp(lambda *_: None))}"
    with ZmtpConnection(endpoint, workload) as connection, pytest.raises(BenchError, match="has not answered"):
        connection.closed_loop(1, 1.0)
    endpoint = (
        f"tcp://127.0.0.1:{listen(lambda connection: connection.sendall(b'HTTP/1.1 400 Bad Request' + bytes(99)))}"
    )
    with pytest.raises(BenchError, match="does not speak ZMTP"):
        ZmtpConnection(endpoint, workload)


def test_idle_peers_are_peers_to_libzmq() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        with router.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            monitor.rcvtimeo = int(SECONDS * 1e3)
            endpoint = f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}"
            peers = idle.connect(endpoint, 5)
            for _ in range(5):
                monitor.recv_multipart()
            for peer in peers:
                peer.close()
            router.disable_monitor()
        assert len(peers) == 5


# --- processes ---------------------------------------------------------------------------------------------------

# A server as bad as they come: deaf to SIGTERM, with a child in a session of its own that works all the time.
BAD_SERVER = """
    import http.server, signal, subprocess, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *arguments):
            pass

    if sys.argv[1] == "dies":
        sys.exit("no such model")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    busy = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\nwhile True: pass"
    subprocess.Popen([sys.executable, "-c", busy], start_new_session=True)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


@pytest.fixture
def bad_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], PeerServer]:
    (tmp_path / "bad_server.py").write_text(textwrap.dedent(BAD_SERVER))
    monkeypatch.setattr(contenders, "PEERS", tmp_path)
    monkeypatch.setattr(contenders, "STOP_SECONDS", 0.5)

    def start(configuration: str) -> PeerServer:
        contender = Contender("bad", "bad", configuration, "raw", "/predict", ())
        return PeerServer(contender, Path(sys.executable), {"Content-Type": "application/octet-stream"}, b"1234")

    return start


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"


def test_a_tree_is_measured_held_and_ended_as_one(bad_server: Callable[[str], PeerServer]) -> None:
    with bad_server("lives") as server:
        pids = proctree.members(server.pid)
        assert len(pids) == 2
        meter = proctree.CpuMeter(server.pid)
        (child,) = set(pids) - {server.pid}
        before = cpu_ns(child)
        assert before is not None
        while (cpu_ns(child) or 0) < before + 20_000_000:  # it works all the time
            pass
        assert meter.used_ns() >= 20_000_000
        proctree.send(server.pid, signal.SIGSTOP)
        while not all(is_stopped(pid) for pid in pids):
            pass
    while any(is_alive(pid, started) for pid, started in pids.items()):
        pass


def is_alive(pid: int, started: int) -> bool:
    """True if this very process runs: it is there, under its number, and not dead and waiting for its parent."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return False
    return fields[0] != b"Z" and int(fields[19]) == started


def test_a_peer_that_does_not_start_is_reported_with_what_it_said(bad_server: Callable[[str], PeerServer]) -> None:
    with pytest.raises(BenchError, match="bad ended before it was ready; it said:\nno such model"):
        bad_server("dies")


# --- natural clients ---------------------------------------------------------------------------------------------


def samples() -> dict[str, Array]:
    inputs = np.random.default_rng(0).standard_normal((4, 1, 256), np.float32)
    return {"inputs": inputs, "outputs": np.stack([first_half(array) for array in inputs])}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the calls that goes on by a millisecond with each look at it."""
    looks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(looks) / 1e3, process_time=time.process_time)
    monkeypatch.setattr(calling, "time", clock)


@pytest.mark.usefixtures("ticking")
def test_calls_one_by_one_are_counted_with_their_failures() -> None:
    number = 0

    def predict(array: Array) -> Array:
        nonlocal number
        number += 1
        if number == 2:
            raise ConnectionError("gone")
        return first_half(array) if number < 5 else first_half(array) + 1

    report = calling.call_one_by_one(calling.Round(samples(), 0.05), predict)
    assert len(report.latency_us) == number - 1
    assert report.errors == {"ConnectionError gone": 1, "WRONG": min(8, number - 4)}
    assert report.seconds >= 0.05


@pytest.mark.usefixtures("ticking")
def test_calls_at_once_are_as_many_as_wanted() -> None:
    under_way = 0
    seen = set()

    @contextlib.asynccontextmanager
    async def connect() -> AsyncIterator[calling.PredictLater]:
        async def predict(array: Array) -> Array:
            nonlocal under_way
            under_way += 1
            seen.add(under_way)
            await asyncio.sleep(0)
            under_way -= 1
            return first_half(array)

        yield predict

    report = asyncio.run(calling.call_at_once(lambda: calling.Round(samples(), 0.05), connect, 5))
    assert max(seen) == 5
    assert not report.errors
    assert len(report.latency_us) >= 5


# --- the arithmetic ----------------------------------------------------------------------------------------------


def round_of(p50: float, rate: float = 1000.0, cpu: float = 10.0, **errors: int) -> comparison.Round:
    return comparison.Round(100, rate, p50, 2 * p50, cpu, 1.0, errors)


def test_ratios_are_tensornext_over_the_other_round_by_round() -> None:
    measured: comparison.Measured = {
        (TENSORNEXT, 1, NATURAL): [round_of(100), round_of(300), round_of(900, LOST=1)],
        ("mosec", 1, NATURAL): [round_of(400), round_of(600, WRONG=2), round_of(900, WRONG=1)],
    }
    (table,) = comparison.tables(measured, [TENSORNEXT, "mosec"])
    mine, other = table.rows
    assert (mine.server, other.server) == (TENSORNEXT, "mosec")
    assert mine.medians["p50_us"] == 300
    ratio = other.ratios["p50_us"]
    assert (ratio.median, ratio.min, ratio.max) == (0.5, 0.25, 1.0)
    assert mine.errors == {"LOST": 1}
    assert other.errors == {"WRONG": 3}
    assert "3 WRONG" in comparison.table_text(table)


def test_goals_are_held_against_the_best_of_the_others() -> None:
    measured: comparison.Measured = {
        (TENSORNEXT, 1, NATURAL): [round_of(100)],
        ("slow", 1, NATURAL): [round_of(1000)],
        ("fast", 1, NATURAL): [round_of(400)],
        (TENSORNEXT, 1, C): [round_of(100)],
        ("fast", 1, C): [round_of(80)],
        (TENSORNEXT, 64, C): [round_of(9, rate=50_000, cpu=20)],
        ("mosec", 64, C): [round_of(9, rate=3_000, cpu=5)],  # does so little that its CPU time does not count
        ("mosec, batching", 64, C): [round_of(9, rate=25_000, cpu=40)],
        ("rocket", 64, C): [round_of(9, rate=100_000, cpu=1)],
    }
    natural, by_c, rate, cpu, best = comparison.goals(measured)
    assert (natural.ratio and natural.ratio.median, natural.is_met) == (0.25, True)
    assert (by_c.ratio and by_c.ratio.median, by_c.is_met) == (1.25, False)
    assert (rate.ratio and rate.ratio.median, rate.is_met, rate.over) == (2.0, True, "mosec, batching, by wrk")
    assert (cpu.ratio and cpu.ratio.median, cpu.is_met) == (0.5, True)
    assert (best.ratio and best.ratio.median, best.is_met) == (0.5, False)
    del measured["mosec", 64, C], measured["mosec, batching", 64, C]
    assert [goal.is_met for goal in comparison.goals(measured)] == [True, False, None, None, False]
    assert "not measured" in goals_text(comparison.goals(measured))


def test_goals_of_the_bridge_are_held_against_fastapi_and_triton_and_it_is_no_rival_of_the_daemon() -> None:
    measured: comparison.Measured = {
        (TENSORNEXT, 1, NATURAL): [round_of(100)],
        (BRIDGE, 1, NATURAL): [round_of(200)],
        (TRITON, 1, NATURAL): [round_of(400)],
        (TENSORNEXT, 1, C): [round_of(100)],
        (BRIDGE, 1, C): [round_of(60)],
        (FASTAPI_RAW, 1, C): [round_of(50)],
        (TENSORNEXT, 64, C): [round_of(9, rate=9000)],
        (BRIDGE, 64, C): [round_of(9, rate=3000)],
        (FASTAPI_RAW, 64, C): [round_of(9, rate=2000)],
    }
    *daemons, by_wrk, by_tritonclient, many = comparison.goals(measured)
    assert all(goal.over.startswith((FASTAPI_RAW, TRITON, "nobody")) for goal in daemons)
    assert (by_wrk.ratio and by_wrk.ratio.median, by_wrk.is_met) == (1.2, True)
    assert (by_tritonclient.ratio and by_tritonclient.ratio.median, by_tritonclient.is_met) == (0.5, True)
    assert (many.ratio and many.ratio.median, many.is_met) == (1.5, False)


# --- the commands ------------------------------------------------------------------------------------------------


def test_the_pinned_torch_of_every_peer_is_the_daemons() -> None:
    files = sorted((BENCH / "peers").glob("*.txt"))
    assert {path.stem for path in files} == {contender.peer for contender in CONTENDERS if not contender.own}
    wanted = next(line for line in (BENCH.parent / "constraints.txt").read_text().splitlines() if "torch==" in line)
    for path in files:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert wanted in lines, path
        assert all("==" in line for line in lines), path


@pytest.mark.slow
def test_compare_measures_tensornext_and_says_who_is_missing(tmp_path: Path) -> None:
    report_path, picture = tmp_path / "compare.json", tmp_path / "compare.png"
    arguments = (
        "--rounds",
        "2",
        "--seconds",
        "0.05",
        "--environments",
        str(tmp_path),
        "--outstanding",
        "1,4",
        "--no-wrk",
    )
    run("compare.py", *arguments, "--json", str(report_path), "--plot", str(picture))
    report = msgspec.json.decode(report_path.read_bytes(), type=comparison.Comparison)
    assert set(report.missing) == {contender.name for contender in CONTENDERS if not contender.own}
    assert all("make bench-peers" in reason for reason in report.missing.values())
    assert [(table.outstanding, table.client) for table in report.tables] == [
        (outstanding, client) for outstanding in (1, 4) for client in (NATURAL, LEAN, C)
    ]
    for table in report.tables:
        has_bridge = table.client != C or report.environment["wrk"] != "not used"
        assert [row.server for row in table.rows] == ([TENSORNEXT, BRIDGE] if has_bridge else [TENSORNEXT])
        for row in table.rows:
            assert not row.errors
            assert len(row.rounds) == 2
            assert min(row.medians.values()) > 0
    assert list(report.idle_cpu_percent) == [TENSORNEXT, BRIDGE]
    *others, mebibyte = report.goals
    assert {goal.is_met for goal in others} == {None}
    assert mebibyte.ratio is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("peer", sorted({contender.peer for contender in CONTENDERS if not contender.own}))
def test_compare_measures_a_peer(peer: str, tmp_path: Path) -> None:
    wanted = [contender for contender in CONTENDERS if contender.peer == peer]
    if wanted[0].python(ENVIRONMENTS) is None:
        pytest.skip(f"{ENVIRONMENTS / peer} is not built: make bench-peers")
    path = tmp_path / "compare.json"
    run(
        *("compare.py", "--peers", peer, "--rounds", "1", "--seconds", "0.05", "--no-wrk", "--json", str(path)),
        seconds=170,
    )
    report = msgspec.json.decode(path.read_bytes(), type=comparison.Comparison)
    assert not report.missing
    names = [TENSORNEXT, *(contender.name for contender in wanted)]
    for contender in wanted:
        assert report.versions[contender.name]["torch"].startswith("2.13.0")
        assert set(contender.packages) < set(report.versions[contender.name])
    for table in report.tables:
        shown = names if table.client != C else [TENSORNEXT]
        assert [row.server for row in table.rows] == shown
        for row in table.rows:
            assert not row.errors, row
            assert min(row.medians.values()) > 0


@pytest.mark.slow
def test_throughput_measures_curve_large_tensors_and_idle_peers(tmp_path: Path) -> None:
    path, picture = tmp_path / "throughput.json", tmp_path / "throughput.png"
    run(
        *("throughput.py", "--rounds", "1", "--seconds", "0.02", "--outstanding", "1,64", "--fractions", "0.1,0.5"),
        *("--idle", "30", "--json", str(path), "--plot", str(picture)),
    )
    report = json.loads(path.read_bytes())
    cases = [(case["case"]["outstanding"], case["case"]["rate"]) for case in report["curve"]]
    peak = report["peak_per_s"]
    assert cases == [(1, 0), (64, 0), (0, round(peak * 0.1, 1)), (0, round(peak * 0.5, 1))]
    assert [case["case"]["outstanding"] for case in report["mebibyte"]] == [1, 4, 16]
    assert {len(case["targets"]) for case in report["curve"]} == {4}
    for case in report["curve"] + report["mebibyte"]:
        for target in case["targets"].values():
            assert not target["errors"]
            assert target["requests"] > 0
    assert 30 <= report["idle"]["held"] <= 34  # open files: the daemon may need one more of its own meanwhile
    assert min(report["idle"]["rss_mib_before"], *report["idle"]["rss_mib_with"]) > 0
    promises = [goal["promise"] for goal in report["goals"]]
    assert promises[:3] == ["64 outstanding, requests/s"] * 2 + ["half the peak rate, p99"]
    assert len(promises) == 7
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        (compare.main, ("--peers", "torchserve"), "no peer 'torchserve'"),
        (compare.main, ("--outstanding", "0"), "0 is not between"),
        (throughput.main, ("--parts", "curve,width"), "no part 'width'"),
        (throughput.main, ("--parts", "idle", "--plot", "x.png"), "which --parts leaves out"),
        (throughput.main, ("--json", "/no/such/folder/x.json"), "/no/such/folder/x.json cannot be written"),
    ],
)
def test_the_commands_refuse_what_makes_no_sense(
    program: click.Command, arguments: tuple[str, ...], sentence: str
) -> None:
    code, said = refusal(program, *arguments)
    assert code == 2
    assert sentence in said


@pytest.mark.slow
def test_a_comparison_that_is_interrupted_stops_what_it_started(tmp_path: Path) -> None:
    # The daemon and its natural client.
    check_that_it_stops_what_it_started(
        *("compare.py", "--peers", "mosec", "--environments", str(tmp_path)), number=signal.SIGTERM, children=2
    )
