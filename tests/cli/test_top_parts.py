"""Parts of `tnxctl top`: what is held against what, and lines that fit any terminal."""

from __future__ import annotations

import json
import math
import re

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statistics_reports import Counts, report
from tnxctl.cli import intervals, top
from tnxctl.cli.top import view
from tnxctl.cli.top.history import History, Look
from tnxctl.cli.top.view import Choice, Surroundings
from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.statistics import ClientStats, DeviceStats, StatsReport, VersionStats

STAGES_US = [12.0, 200.0, 5.0, 0.0, 400.0, 0.0, 15.0]


def at(seconds: float, requests: int, started_s: float = 1000.0) -> StatsReport:
    return report(uptime_us=seconds * 1e6, requests=requests, started_s=started_s)


def looked(*reports: StatsReport, since_start: bool = True) -> Look:
    history = History()
    for each in reports:
        history.add(each)
    look = history.look(since_start)
    assert look is not None
    return look


def test_there_is_nothing_to_see_before_the_first_report() -> None:
    assert History().look(True) is None
    first = looked(at(100.0, 500))
    assert (first.now.seconds, first.now.requests, first.before) == (100.0, 500, None)


@pytest.mark.parametrize("step", [0.25, 1.0, 2.0])
def test_now_is_the_last_seconds_and_before_all_until_then(step: float) -> None:
    count = int(30 / step)
    look = looked(*(at(1000.0 + i * step, 10 * i) for i in range(count + 1)))
    assert look.before is not None
    assert 5.0 <= look.now.seconds <= 5.0 + max(step, 1.0)
    assert look.before.seconds + look.now.seconds == pytest.approx(1000.0 + count * step)
    assert look.now.per_second(look.now.requests) == pytest.approx(10 / step)
    assert look.against == "the start"


def test_before_may_be_the_last_minute_as_soon_as_that_was_watched() -> None:
    reports = [at(1000.0 + i, i) for i in range(200)]
    short = looked(*reports[:15], since_start=False)
    assert short.against == "the start"
    long = looked(*reports, since_start=False)
    assert long.before is not None
    assert long.against == "the last minute"
    assert long.before.seconds == pytest.approx(60.0, abs=2.0)


def test_a_restart_is_seen_and_what_came_before_forgotten() -> None:
    look = looked(at(100.0, 500), at(101.0, 510), at(0.5, 3, started_s=2000.0), at(1.5, 5, started_s=2000.0))
    assert look.restarted
    assert (look.now.seconds, look.now.requests) == (1.0, 2)
    assert look.before is not None
    assert look.before.requests == 3


def test_reports_of_a_minute_are_kept_and_no_more() -> None:
    history = History()
    for i in range(4000):
        history.add(at(i * 0.25, i))
    assert len(history._kept) < 90


# --- lines -----------------------------------------------------------------------------------------------------


def busy(models: int, devices: int, clients: int, steering: str = "") -> Look:
    """A look at a daemon with so many of each, of which the first model became slower."""
    counts = Counts()

    def now(busy_us: float) -> StatsReport:
        gpu = DeviceStats(name="", status="ready", lanes=2, busy_us=busy_us, memory_free_mb=1.0, memory_total_mb=2e5)
        gpus = tuple(msgspec.structs.replace(gpu, name=f"cuda:{i}{steering}") for i in range(devices))
        peers = (ClientStats(name=f"peer{i}{steering}" if i else "", requests=i, in_flight=i) for i in range(clients))
        return counts.report(devices=gpus, clients=tuple(peers))

    titles = [(f"model-with-a-long-name-{i}{steering}", "1") for i in range(models)]
    for title in titles:
        counts.replied(title, STAGES_US, 1000)
    counts.passed(1000e6)
    first = now(0.0)
    for title in titles:
        counts.replied(title, [12.0, 9000.0 if title == titles[0] else 200.0, *STAGES_US[2:]], 300)
        counts.ran(title, 8, 40)
    for _ in range(3 * bool(titles)):
        counts.failed(titles[0], f"INTERNAL{steering}")
    counts.passed(1e6)
    return looked(first, now(9e5))


@given(
    width=st.integers(20, 220),
    height=st.integers(1, 60),
    models=st.integers(0, 30),
    devices=st.integers(0, 9),
    clients=st.integers(0, 21),
    choice=st.builds(
        Choice, sort=st.sampled_from([*view.SORTS]), clients=st.booleans(), paused=st.booleans(), help=st.booleans()
    ),
    away=st.sampled_from(["", "not reachable since 12:00:00: nobody listens there"]),
)
def test_a_picture_fits_its_terminal(
    width: int, height: int, models: int, devices: int, clients: int, choice: Choice, away: str
) -> None:
    look = busy(models, devices, clients) if models + devices + clients else None
    around = Surroundings("tcp://127.0.0.1:5555", "12:00:00", away, width, height)
    lines = view.frame(look, choice, around)
    assert len(lines) == height
    if width >= 80:
        assert max(len(click.unstyle(line)) for line in lines) <= width


def test_one_connection_is_no_plural() -> None:
    for count, words in ((1, "1 connection "), (2, "2 connections ")):
        look = looked(report(uptime_us=1e6, connections=count), report(uptime_us=2e6, connections=count))
        assert any(words in line for line in view.frame(look, Choice(), Surroundings("host", "12:00:00", width=80)))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1.0, 1e300])
def test_numbers_that_are_none_end_nothing(number: float) -> None:
    empty = Histogram(3, (0, 0), number)
    model = VersionStats(
        name="m", version="1", stages={"total": empty, "queue": empty}, batch_rows=empty, predicted_wait_us=number
    )
    times = {"busy_us": number, "inline_us": number}
    device = DeviceStats(name="cpu", status="ready", lanes=1, memory_total_mb=number, **times)
    odd = report(uptime_us=number, models=(model,), devices=(device,), traffic_mb=number, traffic_owed_mb=number)
    for look in (looked(odd), looked(report(uptime_us=1.0), odd)):
        lines = view.frame(look, Choice(), Surroundings("tcp://127.0.0.1:5555", "12:00:00", width=80, height=24))
        assert len(lines) == 24
        json.dumps(intervals.document(look.now, look.before))


def test_the_usual_terminal_shows_all_that_matters() -> None:
    lines = view.frame(busy(6, 1, 0), Choice(), Surroundings("tcp://127.0.0.1:5555", "12:00:00", width=80, height=24))
    text = click.unstyle("\n".join(lines))
    assert "model-with-a-long-name-0@1: p99 10ms, 639µs before; queue +9.0ms: 303" in text
    assert re.search(r"^>model-…e-0@1 +303 +3\.0 +8\.0 +0 +- +9\.7ms +10ms +639µs queue \+9\.0ms$", text, re.MULTILINE)
    assert re.search(r"^p99 before +13µs +208µs", text, re.MULTILINE)
    assert re.search(r"^cuda:0 +ready +\|+ +45 %", text, re.MULTILINE)
    assert "3.0 errors/s (INTERNAL 3.0)" in text


def test_the_last_minute_is_announced_until_it_was_watched() -> None:
    def footer(count: int) -> str:
        look = looked(*(at(1000.0 + i, i) for i in range(count)), since_start=False)
        around = Surroundings("tcp://x", "12:00:00", width=80, height=24)
        return click.unstyle(view.frame(look, Choice(since_start=False), around)[-1])

    assert "against: the last minute, soon" in footer(10)
    assert "against: the last minute  " in footer(100)


def test_the_devices_with_something_to_see_come_first_where_there_is_no_room() -> None:
    devices = tuple(
        DeviceStats(name=f"cuda:{i}", status="failed" if i == 7 else "ready", lanes=1, busy_us=1e5 * i)
        for i in range(8)
    )
    look = looked(report(uptime_us=1e6), report(uptime_us=2e6, devices=devices))
    lines = view.frame(look, Choice(), Surroundings("tcp://x", "12:00:00", width=80, height=24))
    names = [line.split()[0] for line in lines if line.startswith("cuda")]
    assert names == ["cuda:7", "cuda:6", "cuda:5"]
    assert "and 5 more, less busy" in lines


@pytest.mark.parametrize(
    ("sort", "first"), [("rate", "b"), ("p99", "c"), ("queue", "d"), ("errors", "e"), ("grew", "f"), ("name", "a")]
)
def test_models_are_sorted_by(sort: str, first: str) -> None:
    counts = Counts()
    for name in "abcdef":
        counts.replied((name, "1"), STAGES_US, 1000)
    start = counts.report()
    counts.replied(("b", "1"), STAGES_US, 500)
    counts.replied(("c", "1"), [50e3] * 7, 1)
    counts.replied(("f", "1"), [1000.0] * 7, 300)
    counts.failed(("e", "1"), "INTERNAL")
    counts.passed(1e6)
    end = counts.report()
    queued = {"d": 7, "a": 3}
    models = tuple(msgspec.structs.replace(model, queued_rows=queued.get(model.name, 0)) for model in end.models)
    look = looked(start, report(uptime_us=end.uptime_us, models=models, requests=end.requests, replies=end.replies))
    assert view.rows(look, sort)[0].version.after.name == first


def test_what_a_daemon_says_cannot_steer_the_terminal() -> None:
    steering = "\x1b[2J\r\n\x07"
    look = busy(3, 2, 3, steering)
    for choice in (Choice(), Choice(clients=True)):
        away = f"not reachable since 12:00:00: {steering}"
        for around in (
            Surroundings("tcp://x", "12:00:00", width=200, height=60),
            Surroundings("tcp://x", "12:00:00", away, width=200),
        ):
            for line in view.frame(look, choice, around):
                assert click.unstyle(line).isprintable()


def test_the_command_knows_all_that_models_may_be_sorted_by() -> None:
    assert (*view.SORTS,) == top.SORTS
