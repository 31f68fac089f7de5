"""`tnxctl stats` and `tnxctl explain`."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from conftest import Daemon
from fake_daemon import DIGITS, FakeDaemon
from statistics_reports import Counts
from tnxctl import Client
from tnxctl.cli import explain, intervals, text
from tnxctl.cli.exits import Exit
from tnxctl.protocol import wire
from tnxctl.protocol.statistics import STAGES, DeviceStats, StatsReport
from tnxctl.statistics import Interval
from tool import ask, fields, run

STAGES_US = [12.0, 200.0, 5.0, 0.0, 400.0, 0.0, 15.0]
Event = Callable[[Counts], None]
SLOW = wire.SlowRequest(
    id=4711,
    model="digits",
    version="3",
    device="cpu",
    reason="no GPU here",
    batch_size=8,
    predicted_us=2100.0,
    timing=wire.Timing(
        receive_us=12.0,
        queue_us=21_000.0,
        gather_us=5.0,
        h2d_us=0.0,
        compute_us=3_000.0,
        d2h_us=0.0,
        reply_us=15.0,
        total_us=24_032.0,
    ),
    rows=1,
    priority=1,
    deadline_us=20_000.0,
    attempt=2,
    age_s=12.0,
    client="alice",
)
OTHER = msgspec.structs.replace(
    SLOW, id=9, model="iris", client="", predicted_us=0.0, deadline_us=None, attempt=1, rows=8, age_s=0.5
)


def slowing(**changes: object) -> Callable[[int], StatsReport]:
    """Counts of two seconds in which requests waited longer than before."""
    counts = Counts()
    counts.passed(3600e6)
    counts.replied(("digits", "3"), STAGES_US, 10_000)
    counts.replied(("mlp", "1"), STAGES_US, 10)
    cpu = DeviceStats(name="cpu", status="ready", lanes=2, busy_us=1e6, memory_free_mb=1024.0, memory_total_mb=4096.0)
    first = counts.report(devices=(cpu,))
    counts.passed(2e6)
    counts.replied(("digits", "3"), [12.0, 9000.0, *STAGES_US[2:]], 600)
    counts.ran(("digits", "3"), 8, 75)
    counts.failed(("digits", "3"), "INTERNAL")
    second = counts.report(devices=(msgspec.structs.replace(cpu, busy_us=4.8e6),))
    return lambda nth: first if nth == 1 else msgspec.structs.replace(second, **changes)


def test_stats_for_people() -> None:
    with FakeDaemon(stats=slowing()) as fake:
        result = ask(fake, "stats", "--seconds", "10ms")
    assert (result.exit_code, result.stderr) == (Exit.OK, "")
    assert "300 requests/s, 300 replies/s, 0.5 errors/s (INTERNAL 0.5)" in result.stdout
    assert re.search(r"^cpu +ready +95 % +0 %", result.stdout, re.MULTILINE)
    assert re.search(r"^digits@3 +300 +300 +0\.5 +300 +8\.0 ", result.stdout, re.MULTILINE)
    assert re.search(r"^queue +9\.0ms +95 % +8\.7ms +9\.1ms +9\.2ms +9\.2ms +20.µs$", result.stdout, re.MULTILINE)
    assert re.search(r"^total.* 639µs$", result.stdout, re.MULTILINE)
    assert "mlp@1" not in result.stdout  # nobody asked it
    assert "digits@3: p99 10ms, 639µs before; queue +9.0ms: 300 requests/s, 2.8 before, cpu 95 % busy" in result.stdout


def test_stats_of_one_model() -> None:
    for model, shown in (("digits", "digits@3"), ("digits@3", "digits@3"), ("mlp", "No request for it")):
        with FakeDaemon(stats=slowing()) as fake:
            result = ask(fake, "stats", "--seconds", "10ms", "--model", model)
            assert shown in result.stdout
            assert "requests/s, 300 replies/s" not in result.stdout
    with FakeDaemon(stats=slowing()) as fake:
        models = fields(ask(fake, "stats", "--seconds", "10ms", "--model", "digits", "--json"))["models"]
    assert [(model["name"], model["grew"]["stage"]) for model in models] == [("digits", "queue")]


def test_an_unknown_model_is_told_before_the_interval() -> None:
    with FakeDaemon(stats=slowing()) as fake:
        result = ask(fake, "stats", "--seconds", "1000s", "--model", "nope")
    assert result.exit_code == Exit.REFUSED
    assert "no counts of a model 'nope': digits@3, mlp@1" in result.stderr


def test_stats_since_the_start_wait_for_nothing() -> None:
    with FakeDaemon(stats=slowing()) as fake:
        result = ask(fake, "stats", "--since-start")
        assert fake.looks_at_stats == 1
    assert "since its start 1 h 0 min" in result.stdout
    assert "mlp@1" in result.stdout


def test_stats_across_a_restart() -> None:
    with FakeDaemon(stats=slowing(started_s=5000.0)) as fake:
        result = ask(fake, "stats", "--seconds", "10ms")
    assert "It was restarted meanwhile" in result.stdout


def test_stats_of_a_real_daemon(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as client:
        for _ in range(5):
            client.predict(np.zeros((1, 64), np.float32), model="digits")
    result = run("stats", "--since-start", "--model", "digits", "--host", daemon.endpoint)
    assert re.search(r"^total +\d", result.stdout, re.MULTILINE)


# --- why requests became slower --------------------------------------------------------------------------------


def why(before: Callable[[Counts], None], now: Callable[[Counts], None], device: DeviceStats | None = None) -> str:
    """The sentence about the digits, after a hundred seconds and one more."""
    counts = Counts()
    before(counts)
    counts.passed(100e6)
    first = counts.report(devices=(msgspec.structs.replace(device, busy_us=0.0),) if device else ())
    now(counts)
    counts.passed(1e6)
    second = counts.report(devices=(device,) if device else ())
    (found,) = [
        each.sentence
        for each in intervals.slower(Interval(first, second), Interval(None, first))
        if each.title == "digits@3"
    ]
    return found


def answered(count: int, *, rows: int = 8, batches: int = 0, name: str = "digits", **stages_us: float) -> Event:
    def happen(counts: Counts) -> None:
        times = dict(zip(STAGES, STAGES_US, strict=False)) | stages_us
        counts.replied((name, "3"), list(times.values()), count)
        counts.ran((name, "3"), rows, batches or count // rows)

    return happen


def both(*events: Event) -> Event:
    def happen(counts: Counts) -> None:
        for event in events:
            event(counts)

    return happen


def test_more_requests() -> None:
    cpu = DeviceStats(name="cpu", status="ready", lanes=1, busy_us=0.97e6)
    assert why(answered(10_000), answered(300, queue=9000.0), cpu) == (
        "digits@3: p99 10ms, 639µs before; queue +9.0ms: 300 requests/s, 100 before, cpu 97 % busy"
    )


def test_another_model() -> None:
    vgg = answered(80, name="vgg", compute=90e3, batches=15)
    sentence = why(answered(10_000), both(answered(100, queue=9000.0), vgg))
    assert sentence == "digits@3: p90 10ms, 634µs before; queue +8.9ms: vgg@3 takes 1.4 lanes, 0.0 before"


def test_larger_batches() -> None:
    sentence = why(answered(10_000), answered(100, compute=4000.0, rows=32))
    assert sentence == "digits@3: p90 4.6ms, 634µs before; compute +3.7ms: 32.0 rows per batch, 8.0 before"


def test_a_slower_device() -> None:
    sentence = why(answered(10_000), answered(100, compute=4000.0))
    assert sentence.endswith("compute +3.7ms: no larger batches: the device is slower, or shared")


def test_a_loop_that_is_behind() -> None:
    def turn(us: float) -> Event:
        return lambda counts: counts.turned(us)

    sentence = why(both(answered(10_000), turn(100.0)), both(answered(100, receive=8000.0), turn(50e3)))
    assert sentence.endswith("receive +8.1ms: turns of the loop take 53ms (p99), 104µs before")


# --- explain ---------------------------------------------------------------------------------------------------


def test_the_slowest_requests_for_people() -> None:
    with FakeDaemon(slowest=(SLOW, OTHER)) as fake:
        result = ask(fake, "explain")
    assert (result.exit_code, result.stderr) == (Exit.OK, "")
    lines = result.stdout.splitlines()
    assert " ".join(lines[1].split()) == "4711 digits@3 24ms queue 21ms 2.1ms 24ms 1 8 cpu 12 s alice"
    story = lines[lines.index("request 4711 of alice to digits@3: 24ms, 12 s ago") :]
    assert story[1] == (
        "  cpu (no GPU here), 1 row in a batch of 8, priority 1, deadline of 20ms missed by 4.0ms, sent for the 2. time"
    )
    assert story[2] == (
        "  waiting for a lane took 87 % of it; 24ms from queue to device and back, 22ms more than predicted (2.1ms)"
    )
    assert story[4].split() == ["queue", "21ms", "87", "%", "|" * 35]
    assert "8 rows in a batch of 8, priority 1\n" in result.stdout
    assert "nothing was predicted" in result.stdout


def test_one_request_is_asked_for_by_its_number_or_model() -> None:
    with FakeDaemon(models=(DIGITS,), slowest=(SLOW, OTHER)) as fake:
        assert ask(fake, "explain", 4711).stdout.startswith("request 4711 of alice")
        assert "request 9" not in ask(fake, "explain", "--model", "digits").stdout
        assert "No request 5 of the last minute is among the slowest" in ask(fake, "explain", 5).stdout
        assert ask(fake, "explain", "--model", "nope").exit_code == Exit.REFUSED
        assert ask(fake, "explain", -5).exit_code == Exit.USAGE


def test_of_many_a_few_are_told_in_full() -> None:
    with FakeDaemon(slowest=tuple(msgspec.structs.replace(SLOW, id=i) for i in range(27))) as fake:
        result = ask(fake, "explain")
    assert result.stdout.count("waiting for a lane took") == 3
    assert "and 7 more, less slow: --json has them all" in result.stdout
    assert "tnxctl explain ID tells another one." in result.stdout


def test_the_slowest_requests_for_machines() -> None:
    with FakeDaemon(slowest=(SLOW,)) as fake:
        (found,) = fields(ask(fake, "explain", "--json"))["requests"]
    assert found == msgspec.to_builtins(SLOW)


def test_nothing_is_kept() -> None:
    with FakeDaemon() as fake:
        assert ask(fake, "explain").stdout == (
            "No request of the last minute is among the slowest that the daemon keeps.\n"
        )


def test_a_request_of_a_real_daemon_is_explained(run_daemon: Callable[..., Daemon]) -> None:
    daemon = run_daemon()
    with Client(daemon.endpoint, timeout=60.0) as client:
        client.predict(np.zeros((1, 64), np.float32), model="digits")
    shown = run("explain", "--host", daemon.endpoint).stdout
    assert re.match(r"request \d+ of 127\.0\.0\.1 to digits@1: ", shown)
    (number,) = re.findall(r"request (\d+)", shown)
    assert run("explain", number, "--host", daemon.endpoint).stdout.startswith(f"request {number} of")


def test_what_a_daemon_says_of_requests_cannot_steer_the_terminal() -> None:
    bad = "\x1b[2J"
    slow = msgspec.structs.replace(SLOW, model=bad, version=bad, device=bad, reason=bad, client=bad)
    with FakeDaemon(slowest=(slow, slow)) as fake:
        assert "\x1b" not in ask(fake, "explain").stdout
    with FakeDaemon(stats=slowing(status=bad, version=bad, errors={bad: 1})) as fake:
        assert "\x1b" not in ask(fake, "stats", "--seconds", "10ms").stdout


def test_limits_are_those_of_the_protocol() -> None:
    assert explain.MAX_ID == wire.MAX_ID


@pytest.mark.parametrize(
    ("us", "shown"),
    [
        (float("nan"), "-"), (0.0, "0µs"), (0.99, "0µs"), (1.2, "1µs"), (999.4, "999µs"), (999.6, "1.0ms"),
        (9949.0, "9.9ms"), (9960.0, "10ms"), (999.4e3, "999ms"), (999.6e3, "1.0s"), (59e6, "59s"), (599.6e6, "10min"),
    ],
)  # fmt: skip
def test_times_are_short(us: float, shown: str) -> None:
    assert text.micros(us) == shown


@pytest.mark.parametrize(
    ("rate", "shown"),
    [
        (float("nan"), "-"), (0.0, "0"), (0.01, "<0.1"), (0.06, "0.1"), (9.94, "9.9"), (9.96, "10"), (1234.0, "1,234"),
        (99_999.0, "99,999"), (99_999.9, "100k"), (1_234_567.0, "1,235k"),
    ],
)  # fmt: skip
def test_rates_are_short(rate: float, shown: str) -> None:
    assert text.rate(rate) == shown
