"""The benchmark of overload: every request ends somewhere, and what ends there is counted as what it is."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    SECONDS,
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
from conftest import Daemon
from patience import longer_each_time
from tnxctl.protocol import wire

# isort: split
# On the path since `benchmarks` was imported.
import overload
from contenders import ENVIRONMENTS
from crowd import FLOOD, LIGHT
from flood import Flood, Messenger
from httpflood import HttpFlood, HttpSetting, requests_of
from openload import Client, Load
from outcomes import Outcome, Outcomes, joined, kind_of
from overload_figures import figures, retry_ratios, waiting
from overload_models import MODELS
from overload_report import REST, URGENT
from overload_servers import PEERS
from throttle import Throttle
from workload import FIRST_ID, Workload, mlp
from zmtpsocket import Messages, frame

MS = 1_000_000
ROW = np.zeros((1, 256), np.float32)

ENDS = ("refused", "full", "unavailable", "held", "late", "expired", "failed", "wrong", "lost", "cut", "unsent")
"""Shares that, with what was in time, come to 1."""


@pytest.fixture(scope="module")
def workload() -> Workload:
    return mlp(1, False, first_half)


@pytest.fixture
def listen() -> Iterator[Listen]:
    with listening() as start:
        yield start


def error(code: str, message: str = "", retry_after_us: float | None = None) -> wire.ErrorReply:
    return wire.ErrorReply(v=1, id=FIRST_ID, code=code, message=message, retry_after_us=retry_after_us)


# --- what became of the requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "outcome"),
    [
        ("DEADLINE_EXCEEDED", "it cannot be done within its deadline, 20 ms from now: the wait is 30", Outcome.REFUSED),
        ("DEADLINE_EXCEEDED", "the deadline of 20 ms has passed", Outcome.EXPIRED),
        ("DEADLINE_EXCEEDED", "the model took longer to load", Outcome.FAILED),
        ("RESOURCE_EXHAUSTED", "5 requests are queued, which is the limit", Outcome.FULL),
        ("UNAVAILABLE", "the daemon is draining", Outcome.UNAVAILABLE),
        ("INTERNAL", "", Outcome.FAILED),
    ],
)
def test_errors_are_told_apart(code: str, message: str, outcome: Outcome) -> None:
    assert kind_of(error(code, message)) is outcome


def of_kinds(*kinds: Outcome, answered_ms: float = 0.0) -> Outcomes:
    """Requests that were due at 1, 2, ... ms, were sent 2 ms after, and all answered after so long, if at all."""
    count = len(kinds)
    due = np.arange(1, count + 1) * MS
    found = Outcomes.of(due.tolist(), (due + MS).tolist(), (due + 2 * MS).tolist(), np.zeros(count, np.bool_))
    found.outcome[:] = kinds
    has_answer = found.outcome <= Outcome.WRONG
    found.answered[has_answer] = due[has_answer] + int(answered_ms * MS)
    return found


def test_shares_are_of_all_that_was_offered_and_come_to_one() -> None:
    found = figures(of_kinds(*Outcome, Outcome.RESULT, answered_ms=4), seconds=2.0, deadline_ms=5.0)
    assert found.requests == 12
    assert found.offered_per_s == 6.0
    assert found.in_time_per_s == found.in_time_sent_per_s == 1.0
    assert found.in_time_admitted == 0.5  # of two results, a wrong one and one that expired
    shares = [getattr(found, end) for end in ENDS]
    assert sum(shares) + found.in_time_per_s / found.offered_per_s == pytest.approx(1, abs=1e-3)
    assert found.late == 0
    assert found.result_ms == {"p50": 4.0, "p99": 4.0}
    assert (found.refusal_ms, found.refusal_share) == (4.0, 0.8)
    assert (found.late_ms, found.blocked_ms) == (1.0, 1.0)


def test_what_was_sent_late_is_late_since_it_was_due_and_in_time_since_it_was_sent() -> None:
    found = figures(of_kinds(Outcome.RESULT, Outcome.RESULT, answered_ms=6), seconds=1.0, deadline_ms=5.0)
    assert (found.in_time_per_s, found.in_time_sent_per_s) == (0.0, 2.0)
    assert (found.in_time_admitted, found.in_time_sent_admitted, found.late) == (0.0, 1.0, 1.0)


def test_without_deadlines_results_count_that_were_here_before_the_load_was_over() -> None:
    kinds = [Outcome.RESULT] * 4  # here at 7, 8, 9 and 10 ms
    found = figures(of_kinds(*kinds, answered_ms=6), seconds=0.0075, deadline_ms=None)
    assert found.in_time_per_s == pytest.approx(2 / 0.0075, rel=1e-3)
    assert found.late == 0.5


def test_nothing_that_was_asked_for_has_figures_too() -> None:
    found = figures(of_kinds(), seconds=1.0, deadline_ms=5.0)
    assert found.requests == 0
    assert found.in_time_admitted is None
    assert found.result_ms["p50"] is None
    assert waiting([of_kinds()]).retries == 0


def test_when_to_come_back_is_held_against_when_there_was_room() -> None:
    full, result = Outcome.FULL, Outcome.RESULT
    found = of_kinds(full, full, full, full, result, full)  # sent at 3, 4, 5, 6, 7 and 8 ms, refused at once
    refused = found.outcome == full
    found.answered[refused] = found.sent[refused]
    found.retry_after_us[refused] = [4000.0, 1000.0, 2000.0, np.nan, 1000.0]
    assert retry_ratios(found).tolist() == pytest.approx([1.0, 1 / 3, 1.0])  # after the last one nothing was taken in
    found.queue_us[4] = 7000.0
    both = waiting([found, of_kinds()])
    assert (both.retries, both.retry_ms, both.queue_ms["max"]) == (3, 1.5, 7.0)


def test_outcomes_come_back_from_their_file(tmp_path: Path) -> None:
    found = of_kinds(*Outcome, answered_ms=3)
    found.save(tmp_path / "found.npz")
    again = joined([Outcomes.load(tmp_path / "found.npz"), found])
    assert again.outcome.tolist() == [*Outcome, *Outcome]
    assert again.where(again.outcome == Outcome.CUT).due.tolist() == [9 * MS, 9 * MS]


# --- the client --------------------------------------------------------------------------------------------------


def test_the_client_sends_the_very_requests_of_its_workloads(workload: Workload) -> None:
    urgent = Workload("mlp", "input", [workload.input(0)], [workload.input(0)], tolerance=0.0, priority=0)
    plain = Workload("mlp", "input", [workload.input(0)], [workload.input(0)], tolerance=0.0, priority=1)
    messenger = Messenger([plain, urgent])
    choice = [False, True, True, False]
    expected = b""
    for number in range(1, 4):
        header, tensor = (urgent if choice[number] else plain).request(number)
        expected += frame(header, 1) + frame(tensor)
    assert messenger.bytes_of(range(1, 4), choice, 0) == expected
    assert messenger.size * 3 == len(expected)
    several = Messenger([workload])
    requests = [workload.request(number) for number in range(20)]
    assert several.bytes_of(range(20), [False] * 20, 0) == b"".join(frame(one, 1) + frame(two) for one, two in requests)


def test_a_stamp_says_when_a_request_was_sent() -> None:
    stamped = Workload("mlp", "input", [ROW], [ROW], tolerance=0.0, deadline_us=5000.0, stamped=True)
    data = Messenger([stamped]).bytes_of([3], [False] * 4, 1_234_567)
    header, _ = Messages().take(data)[0]
    request = wire.decode_request(header, wire.Limits())
    assert isinstance(request, wire.Predict)
    assert (request.id, request.sent_us, request.deadline_us) == (FIRST_ID + 3, 1234.567, 5000.0)


def test_a_throttle_holds_back_what_would_be_refused() -> None:
    throttle = Throttle(0.05, [False] * 99 + [True])

    def answer(number: int, code: str) -> bytes:
        reply = wire.ErrorReply(v=1, id=FIRST_ID + number, code=code, message="late", retry_after_us=7.0)
        return frame(wire.encode(reply))

    assert throttle.admit(0, 50, 0.0) == list(range(50))
    throttle.receive(b"".join(answer(number, "UNAVAILABLE") for number in range(10)), 0.0)
    assert throttle.admit(50, 60, 0.0) == list(range(50, 60))
    throttle.receive(b"".join(answer(number, "DEADLINE_EXCEEDED") for number in range(10, 40)), 0.0)
    sent = throttle.admit(60, 100, 0.0)
    assert 99 in sent, "the urgent one is held back for others"
    assert throttle.held == [number for number in range(60, 100) if number not in sent]
    assert len(throttle.held) > 20
    throttle.reset()
    again = throttle.admit(0, 50, 0.0)
    assert len(sent) - 1 < len(again) < 50  # nothing is outstanding there; what was learned holds


def test_requests_are_due_at_random_times_of_the_asked_rate() -> None:
    due = Load(1000.0, 2.0, 3).offsets_ns()
    assert due == sorted(due)
    assert due == Load(1000.0, 2.0, 3).offsets_ns() != Load(1000.0, 2.0, 4).offsets_ns()
    assert due[-1] < 2e9
    assert 1700 < len(due) < 2300
    assert np.std(np.diff(due)) == pytest.approx(np.mean(np.diff(due)), rel=0.2)


def all_sent(found: Outcomes) -> bool:
    return bool(np.all(found.sent))


def flooded(
    port: int, workload: Workload, count: int, enough: Callable[[Outcomes], object] = all_sent
) -> tuple[Flood, Outcomes]:
    """So many requests to this port within a tenth of a second, and what became of them soon after.

    Args:
        enough: whether this process has sent what it was to send; else it gets more time for it, with another client.
    """
    for seconds in longer_each_time(0.2):
        flood = Flood(f"tcp://127.0.0.1:{port}", Messenger([workload]), workload, heeds=False, deadline_s=0.0)
        with contextlib.closing(flood):
            found = loaded(flood, count, seconds)
        if enough(found):
            break
    return flood, found


def loaded(client: Client, count: int, seconds: float) -> Outcomes:
    start = time.perf_counter_ns()
    due = [start + number * 100 * MS // count for number in range(count)]
    client.send(due, start + int(seconds * 1e9), [False] * count)
    found = Outcomes.of(due, client.record.tried, client.record.sent, np.zeros(count, np.bool_))
    client.finish(found)
    return found


def test_each_answer_finds_its_request(listen: Listen, workload: Workload) -> None:
    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        number = wire.decode_request(header, wire.Limits()).id - FIRST_ID
        if number % 2:
            connection.sendall(answer_of(header, tensor) * 2)  # the second one is nobody's
        else:
            refused = wire.ErrorReply(
                v=1, id=FIRST_ID + number, code="RESOURCE_EXHAUSTED", message="full", retry_after_us=7.0
            )
            connection.sendall(frame(wire.encode(refused)))

    flood, found = flooded(listen(zmtp(reply)), workload, 50)
    assert found.outcome.tolist() == [Outcome.FULL, Outcome.RESULT] * 25
    assert found.retry_after_us[::2].tolist() == [7.0] * 25
    assert found.queue_us[1::2].tolist() == [2.0] * 25
    assert np.all(found.due <= found.tried)
    assert np.all(found.tried <= found.sent)
    assert np.all(found.sent < found.answered)
    assert flood.record.cut == 0


def test_a_wrong_result_shows(listen: Listen, workload: Workload) -> None:
    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        connection.sendall(answer_of(header, bytes(len(tensor))))

    _, found = flooded(listen(zmtp(reply)), workload, 5)
    assert found.outcome[0] == Outcome.WRONG  # not all are looked at


def test_a_connection_that_is_cut_is_made_anew_and_what_it_carried_is_lost_with_it(
    listen: Listen, workload: Workload
) -> None:
    cut: list[int] = []

    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        number = wire.decode_request(header, wire.Limits()).id - FIRST_ID
        if number >= 20 and not cut:
            cut.append(number)
            connection.shutdown(socket.SHUT_RDWR)
        else:
            connection.sendall(answer_of(header, tensor))

    # None is cut twice, so the next client has to have it anew.
    flood, found = flooded(listen(zmtp(reply)), workload, 60, lambda found: all_sent(found) or cut.clear())
    assert flood.record.cut == 1
    assert found.outcome[20] == Outcome.CUT
    assert found.outcome[:20].tolist() == [Outcome.RESULT] * 20
    assert found.outcome[-1] == Outcome.RESULT
    assert set(found.outcome.tolist()) == {Outcome.RESULT, Outcome.CUT}


def test_what_is_never_answered_is_lost(listen: Listen, workload: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flood.PATIENCE_SECONDS", 0.05)
    _, found = flooded(listen(zmtp(lambda *_: None)), workload, 5)
    assert found.outcome.tolist() == [Outcome.LOST] * 5


def test_what_a_socket_has_no_room_for_is_sent_later_or_not_at_all(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flood.PATIENCE_SECONDS", 0.05)
    large = mlp(1024, False, first_half)  # a mebibyte
    over = threading.Event()
    answered: Counter[socket.socket] = Counter()

    def reply(connection: socket.socket, header: bytes, tensor: bytes) -> None:
        answered[connection] += 1
        if answered[connection] == 3:
            over.wait(SECONDS)  # reads no more, so that the kernel's buffers fill up
        connection.sendall(frame(result_header(wire.decode_request(header, wire.Limits()).id)))

    try:
        _, found = flooded(listen(zmtp(reply)), large, 100, lambda found: np.count_nonzero(found.sent) >= 3)
    finally:
        over.set()
    sent = np.count_nonzero(found.sent)
    assert 3 <= sent < 100
    assert found.outcome[sent:].tolist() == [Outcome.UNSENT] * (100 - sent)


# --- the client of servers that speak HTTP -----------------------------------------------------------------------


def http_flooded(
    port: int,
    workload: Workload,
    count: int,
    connections: int,
    enough: Callable[[Outcomes], object] = all_sent,
) -> tuple[HttpFlood, Outcomes]:
    """As `flooded`."""
    setting = HttpSetting(f"http://127.0.0.1:{port}/predict", "", 0.0, connections)
    for seconds in longer_each_time(0.2):
        flood = HttpFlood(setting, requests_of(setting.url, workload), workload)
        with contextlib.closing(flood):
            found = loaded(flood, count, seconds)
        if enough(found):
            break
    return flood, found


@pytest.mark.skipif(sys.platform != "linux", reason="works by way of epoll")
@pytest.mark.parametrize("connections", [1, 10])
def test_http_answers_are_told_apart_by_their_status(listen: Listen, workload: Workload, connections: int) -> None:
    numbers = {workload.input(number).tobytes(): number for number in range(workload.variants)}

    def answer(body: bytes) -> list[bytes]:
        status = {0: 429, 1: 408, 2: 503, 3: 500}.get(numbers[body])
        return [b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status] if status else [raw_answer(body)]

    flood, found = http_flooded(listen(http(answer)), workload, 16, connections)
    ends = [Outcome.FULL, Outcome.EXPIRED, Outcome.UNAVAILABLE, Outcome.FAILED, *[Outcome.RESULT] * 4]
    assert found.outcome.tolist() == ends * 2
    assert np.all(found.sent < found.answered)
    assert flood.record.cut == 0


@pytest.mark.skipif(sys.platform != "linux", reason="works by way of epoll")
def test_a_wrong_result_over_http_shows(listen: Listen, workload: Workload) -> None:
    _, found = http_flooded(listen(http(lambda body: [raw_answer(bytes(len(body)))])), workload, 5, 2)
    assert Outcome.WRONG in found.outcome  # not all are looked at


@pytest.mark.skipif(sys.platform != "linux", reason="works by way of epoll")
def test_an_http_connection_that_is_cut_is_made_anew(listen: Listen, workload: Workload) -> None:
    first = workload.input(0).tobytes()
    flood, found = http_flooded(listen(http(lambda body: [] if body == first else [raw_answer(body)])), workload, 16, 2)
    assert found.outcome.tolist() == [Outcome.CUT, *[Outcome.RESULT] * 7] * 2
    assert flood.record.cut == 2


@pytest.mark.skipif(sys.platform != "linux", reason="works by way of epoll")
def test_requests_wait_for_a_free_http_connection(
    listen: Listen, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("httpflood.PATIENCE_SECONDS", 0.05)
    over = threading.Event()

    def answer(body: bytes) -> list[bytes]:
        over.wait(SECONDS)
        return []

    try:
        _, found = http_flooded(
            *(listen(http(answer)), workload, 10, 3),
            lambda found: np.count_nonzero(found.sent) >= 3 and np.all(found.tried > 0),
        )
    finally:
        over.set()
    assert found.outcome.tolist() == [Outcome.LOST] * 3 + [Outcome.UNSENT] * 7
    assert np.all(found.tried > 0)


# --- models ------------------------------------------------------------------------------------------------------


def test_the_models_have_the_shapes_that_they_say() -> None:
    for name in ("mlp", "wide"):
        inputs, outputs = MODELS[name].samples(2)
        assert inputs.shape[1:] == (2, *MODELS[name].input_shape)
        assert outputs.shape[1:] == (2, *MODELS[name].output_shape)
        assert np.array_equal(outputs, MODELS[name].samples(2)[1])
    assert sum(parameter.numel() for parameter in MODELS["resnet50"].build().parameters()) == 25_557_032


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_loads_a_running_daemon(daemon: Daemon, tmp_path: Path) -> None:
    paths = tmp_path / "overload.json", tmp_path / "overload.png"
    printed = run(
        *("overload.py", "--endpoint", daemon.endpoint, "--pid", str(daemon.process.pid), "--model", "mlp"),
        *("--deadline", "20", "--multiples", "0.2,3", "--seconds", "0.2", "--clients", "2"),
        *("--light", "0.1", "--urgent", "0.3", "--json", str(paths[0]), "--plot", str(paths[1])),
    )
    assert daemon.process.poll() is None
    found = json.loads(paths[0].read_bytes())
    server = found["servers"]["daemon"]
    assert server["capacity"]["requests_per_s"] == max(server["capacity"]["by_outstanding"].values()) > 0
    assert [row["multiple"] for row in server["rows"]] == [0.2, 3.0]
    for row in server["rows"]:
        groups = row["groups"]
        assert list(groups) == [FLOOD, LIGHT, URGENT, REST]
        assert groups[FLOOD]["requests"] == groups[URGENT]["requests"] + groups[REST]["requests"]
        for group in groups.values():
            shares = [group[end] for end in ENDS]
            assert sum(shares) + group["in_time_per_s"] / group["offered_per_s"] == pytest.approx(1, abs=0.01)
            assert group["wrong"] == group["failed"] == 0
        assert row["calm_before"]["requests"] > 0
        if sys.platform == "linux":
            assert row["server_cpu_us"] > 0
            assert row["others_cores"] >= 0
    assert "not urgent" in printed
    assert paths[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_command_fills_the_queue_of_a_daemon_of_its_own(tmp_path: Path) -> None:
    path, settings = tmp_path / "overload.json", tmp_path / "tnxd.toml"
    settings.write_text("[queue]\nmax_requests = 300\n")
    run(
        *("overload.py", "--model", "wide", "--no-deadline", "--multiples", "4", "--seconds", "0.3"),
        *("--config", str(settings), "--json", str(path)),
    )
    (row,) = json.loads(path.read_bytes())["servers"]["daemon"]["rows"]
    assert row["groups"][FLOOD]["full"] > 0
    assert row["groups"][FLOOD]["refused"] == row["groups"][FLOOD]["expired"] == 0
    assert row["waiting"]["queue_ms"]["max"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts the CPU time of peers through /proc")
def test_the_command_says_which_peers_are_missing(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "overload.json"
    printed = run(
        *("overload.py", "--endpoint", daemon.endpoint, "--model", "mlp", "--multiples", "0.2", "--seconds", "0.05"),
        *("--peer", "mosec", "--environments", str(tmp_path), "--json", str(path)),
    )
    found = json.loads(path.read_bytes())
    assert list(found["servers"]) == ["daemon"]
    assert "make bench-peers" in found["missing"]["mosec"]
    assert "mosec: not measured" in printed


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("peer", list(PEERS))
def test_the_command_loads_a_peer(peer: str, daemon: Daemon, tmp_path: Path) -> None:
    if not (ENVIRONMENTS / peer / "built").exists():
        pytest.skip(f"{ENVIRONMENTS / peer} is not built: make bench-peers")
    path = tmp_path / "overload.json"
    run(
        *("overload.py", "--endpoint", daemon.endpoint, "--model", "mlp", "--multiples", "0.2", "--seconds", "0.1"),
        *("--peer", peer, "--connections", "64", "--light", "0.1", "--json", str(path)),
        seconds=170,
    )
    found = json.loads(path.read_bytes())
    assert not found["missing"]
    assert list(found["servers"]) == ["daemon", PEERS[peer]]
    (row,) = found["servers"][PEERS[peer]]["rows"]
    assert row["server_cpu_us"] > 0
    for group in row["groups"].values():
        assert group["failed"] == group["wrong"] == 0
        assert group["result_ms"]["p50"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--pid", "1"), "it needs --endpoint"),
        (("--endpoint", "ipc:///run/tensornext.sock"), "is not tcp://HOST:PORT"),
        (("--endpoint", "tcp://127.0.0.1:1", "--config", __file__), "for one that runs already"),
        (("--deadline", "5", "--no-deadline"), "exclude each other"),
        (("--multiples", "1,x"), "'1,x' is not a list of numbers"),
        (("--light", "1"), "1"),
        (("--peer", "mosec", "--rows", "2"), "with one row per request"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(arguments: tuple[str, ...], sentence: str) -> None:
    got, said = refusal(overload.main, *arguments)
    assert got == 2
    assert sentence in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes through /proc")
def test_an_overload_that_is_interrupted_stops_what_it_started() -> None:
    check_that_it_stops_what_it_started(
        "overload.py", "--clients", "2", number=signal.SIGTERM, children=3, lengths=("--seconds", "600")
    )
