"""Differences of two reports: what lies between them, and daemons that begin anew."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statistics_reports import Counts, report
from tnxctl.protocol import wire
from tnxctl.protocol.histograms import BUCKETS, Histogram, bucket_of, trimmed
from tnxctl.protocol.statistics import STAGES, ClientStats, DeviceStats, StatsReport, VersionStats
from tnxctl.statistics import Interval, VersionInterval, growth

VERSIONS = (("digits", "1"), ("digits", "2"), ("iris", "1"))
TIMES = st.floats(0.0, 1e7)

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("replied"), st.sampled_from(VERSIONS), st.lists(TIMES, min_size=7, max_size=7)),
        st.tuples(st.just("failed"), st.sampled_from(VERSIONS), st.sampled_from(("INTERNAL", "UNAVAILABLE"))),
        st.tuples(st.just("ran"), st.sampled_from(VERSIONS), st.integers(1, 64)),
        st.tuples(st.just("turned"), st.none(), TIMES),
        st.tuples(st.just("passed"), st.none(), st.floats(1e-3, 1e9)),
    ),
    max_size=30,
)


def happen(counts: Counts, events: list[tuple[str, Any, Any]]) -> StatsReport:
    """The report after these events."""
    for name, version, detail in events:
        getattr(counts, name)(*(() if version is None else (version,)), detail)
    return counts.report()


def numbers(interval: Interval) -> dict[str, Any]:
    """All counts of an interval, those of histograms by bucket, without the buckets and versions that have none."""
    found: dict[str, Any] = {"requests": interval.requests, "replies": interval.replies}
    found |= {("error", code): count for code, count in interval.errors.items()}
    found |= buckets("loop", interval.loop_turns)
    for version in interval.versions:
        for name in ("requests", "replies", "abandoned", "rows", "batches", "deadlines_met", "deadlines_missed"):
            found[version.title, name] = getattr(version, name)
        found |= {(version.title, code): count for code, count in version.errors.items()}
        for stage in STAGES:
            found |= buckets(f"{version.title} {stage}", version.stage(stage))
        found |= buckets(f"{version.title} rows", version.batch_rows)
    return {name: count for name, count in found.items() if count}


def buckets(name: str, histogram: Histogram) -> dict[Any, int]:
    return {(name, bucket): count for bucket, count in enumerate(histogram.counts, histogram.first)}


def added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in first | second}


@given(EVENTS, EVENTS, EVENTS)
def test_intervals_side_by_side_have_the_counts_of_the_whole(before: Any, first: Any, second: Any) -> None:
    counts = Counts()
    start, middle, end = (happen(counts, events) for events in (before, first, second))
    parts = Interval(start, middle), Interval(middle, end)
    whole = Interval(start, end)
    assert not whole.restarted
    assert added(*map(numbers, parts)) == numbers(whole)
    assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds, abs=1e-6)
    assert added(numbers(Interval(None, start)), numbers(whole)) == numbers(Interval(None, end))


@given(EVENTS, EVENTS, st.booleans())
def test_a_restart_begins_anew(before: Any, after: Any, is_told: bool) -> None:
    """The new daemon says when it started; or its clock does not tell, and its counts do."""
    old = Counts(started_s=1000.0)
    old.passed(2e9)
    new = Counts(started_s=2000.0 if is_told else 1000.0)
    first, second = happen(old, before), happen(new, after[:3])
    if not is_told and second.uptime_us >= first.uptime_us:
        return
    interval = Interval(first, second)
    assert interval.restarted
    assert interval.seconds == second.uptime_us / 1e6
    assert numbers(interval) == numbers(Interval(None, second))


@pytest.mark.parametrize(
    "changes",
    [
        {"started_s": 2000.0, "uptime_us": 9e9, "requests": 900},
        {"uptime_us": 1.0},
        {"requests": 4},
        {"replies": 4},
        {"errors": {"INTERNAL": 1}},
        {"errors": {}},
        {"undeliverable": 4},
        {"log_lines_dropped": 4},
    ],
)
def test_a_restart_is_told_by(changes: dict[str, Any]) -> None:
    """Another start, or any count that fell."""
    before = report(uptime_us=5e6, requests=5, replies=5, undeliverable=5, log_lines_dropped=5, errors={"INTERNAL": 2})
    later = msgspec.structs.replace(before, uptime_us=6e6, requests=6)
    assert not Interval(before, later).restarted
    assert Interval(before, msgspec.structs.replace(later, **changes)).restarted


@given(EVENTS, EVENTS)
def test_nothing_is_ever_negative(one: Any, other: Any) -> None:
    """Whatever two reports say that have nothing to do with each other."""
    first, second = happen(Counts(), one), happen(Counts(), other)
    interval = Interval(first, second)
    assert all(count > 0 for count in numbers(interval).values())
    assert interval.seconds >= 0
    assert interval.per_second(interval.requests) >= 0


def test_rates_are_by_the_clock_of_the_daemon() -> None:
    counts = Counts()
    counts.passed(5e6)
    before = counts.report()
    counts.passed(2e6)
    for _ in range(10):
        counts.replied(("digits", "1"), [1.0, 100.0, 0.0, 0.0, 300.0, 0.0, 1.0])
    counts.failed(("digits", "1"), "INTERNAL")
    counts.ran(("digits", "1"), 4)
    counts.ran(("digits", "1"), 6)
    interval = Interval(before, counts.report())
    (version,) = interval.versions
    assert (interval.seconds, version.title) == (2.0, "digits@1")
    assert version.per_second(version.replies) == 5.0
    assert interval.per_second(interval.error_count) == version.per_second(version.error_count) == 0.5
    assert version.rows_per_batch == 5.0
    assert version.mean_us("compute") == pytest.approx(300.0)
    assert version.stage("queue").quantile(0.5) == pytest.approx(100.0, rel=0.125)
    assert version.lanes == pytest.approx(2 * 300e-6 / 2)
    assert math.isnan(version.missed_share)
    assert interval.version("digits@1") is version
    assert interval.version("digits@2") is None


def test_no_time_has_no_rates() -> None:
    counts = Counts()
    counts.ran(("digits", "1"), 4)
    same = counts.report()
    interval = Interval(same, same)
    (version,) = interval.versions
    assert not interval.restarted
    assert (interval.per_second(interval.requests), version.per_second(version.rows), version.lanes) == (0.0, 0.0, 0.0)
    assert math.isnan(version.rows_per_batch)
    assert math.isnan(version.mean_us("total"))


def test_versions_come_and_go() -> None:
    counts = Counts()
    counts.replied(("digits", "1"), [1.0] * 7)
    before = counts.report()
    counts.replied(("digits", "2"), [1.0] * 7)
    counts.passed(1e6)
    after = counts.report()
    after = msgspec.structs.replace(after, models=tuple(model for model in after.models if model.version == "2"))
    interval = Interval(before, after)
    assert not interval.restarted
    assert interval.gone == ("digits@1",)
    assert [(version.title, version.replies) for version in interval.versions] == [("digits@2", 1)]


def test_a_version_whose_counts_fell_came_back() -> None:
    old = VersionStats(name="digits", version="1", requests=9, errors={"INTERNAL": 2}, deadlines_met=5)
    new = VersionStats(name="digits", version="1", requests=3, errors={"INTERNAL": 2}, deadlines_met=1)
    version = VersionInterval(old, new, 1.0)
    assert (version.requests, version.errors, version.deadlines_met) == (3, {"INTERNAL": 2}, 1)
    fewer = VersionInterval(new, msgspec.structs.replace(new, errors={"INTERNAL": 1}), 1.0)
    assert (fewer.requests, fewer.error_count) == (3, 1)


def test_a_histogram_that_fell_is_a_new_one() -> None:
    """Even if the counters beside it do not tell."""
    old = VersionStats(name="digits", version="1", stages={"queue": histogram(5.0, 5.0)})
    new = VersionStats(name="digits", version="1", stages={"queue": histogram(5.0, 90.0)})
    assert VersionInterval(old, new, 1.0).stage("queue") == new.stages["queue"]


def test_devices_are_busy_by_their_lanes() -> None:
    def busy(at_us: float, busy_us: float, inline_us: float, lanes: int = 2) -> StatsReport:
        cpu = DeviceStats(name="cpu", status="ready", lanes=lanes, busy_us=busy_us, inline_us=inline_us)
        return report(uptime_us=at_us, devices=(cpu,))

    (cpu,) = Interval(busy(1e6, 5e5, 0.0), busy(3e6, 2.5e6, 1e6)).devices
    assert (cpu.busy_share, cpu.inline_share) == (0.5, 0.5)
    (long,) = Interval(busy(1e6, 0.0, 0.0), busy(2e6, 9e6, 3e6)).devices  # batches that began before
    assert (long.busy_share, long.inline_share) == (1.0, 1.0)
    (given_up,) = Interval(busy(1e6, 9e5, 0.0), busy(2e6, 1e5, 0.0)).devices  # a batch that hung
    assert (given_up.busy_share, given_up.inline_share) == (0.0, 0.0)
    (none,) = Interval(busy(1e6, 0.0, 0.0, lanes=0), busy(2e6, 0.0, 0.0, lanes=0)).devices
    assert none.busy_share == 0.0


def test_a_client_may_come_out_of_the_rest() -> None:
    """Then nobody knows what it asked before."""

    def clients(at_us: float, **requests: int) -> StatsReport:
        names = {"rest": ""}
        found = tuple(ClientStats(name=names.get(name, name), requests=count) for name, count in requests.items())
        return report(uptime_us=at_us, clients=found)

    def asked(before: StatsReport, after: StatsReport) -> dict[str, int | None]:
        return {client.after.name: client.requests for client in Interval(before, after).clients}

    assert asked(clients(0.0, alice=5), clients(1e6, alice=8, bob=2)) == {"alice": 3, "bob": 2}
    assert asked(clients(0.0, alice=5, rest=70), clients(1e6, alice=8, bob=60, rest=11)) == {
        "alice": 3,
        "bob": None,
        "": None,
    }
    (bob,) = Interval(clients(0.0, rest=70), clients(1e6, bob=60)).clients
    assert math.isnan(bob.per_second(bob.requests))


def version_of(count: int, **stages_us: float) -> VersionInterval:
    counts = Counts()
    for _ in range(count):
        counts.replied(("digits", "1"), [stages_us.get(stage, 10.0) for stage in STAGES[:-1]])
    return Interval(None, counts.report()).versions[0]


def test_the_stage_that_grew() -> None:
    before = version_of(1000, queue=50.0, compute=1000.0)
    grown = growth(before, version_of(200, queue=5000.0, compute=1300.0))
    assert grown is not None
    assert (grown.stage, grown.share, grown.added_us) == ("queue", 0.99, pytest.approx(4950.0, rel=0.15))
    assert growth(before, version_of(200, queue=50.0, compute=1000.0)) is None
    assert growth(before, version_of(200, queue=100.0, compute=1000.0)) is None  # too little of the whole
    assert growth(None, version_of(200, queue=5000.0)) is None


@pytest.mark.parametrize(("count", "share"), [(3, None), (4, 0.5), (19, 0.5), (20, 0.9), (199, 0.9), (200, 0.99)])
def test_few_requests_tell_no_high_percentile(count: int, share: float | None) -> None:
    few, many = version_of(count, queue=5000.0), version_of(1000)
    for grown in (growth(many, few), growth(version_of(count), version_of(1000, queue=5000.0))):
        assert (grown and grown.share) == share


def test_slowness_that_lasts_is_told_by_a_lower_percentile() -> None:
    """A twentieth of the time before was as slow as now, so its p99 is the p99 of now."""
    counts = Counts()
    counts.replied(("digits", "1"), [1.0, 50.0, 1.0, 0.0, 100.0, 0.0, 1.0], count=950)
    counts.replied(("digits", "1"), [1.0, 5000.0, 1.0, 0.0, 100.0, 0.0, 1.0], count=50)
    grown = growth(Interval(None, counts.report()).versions[0], version_of(500, queue=5000.0))
    assert grown is not None
    assert (grown.stage, grown.share) == ("queue", 0.9)


# --- histograms that come over the wire -----------------------------------------------------------------------


def histogram(*values: float) -> Histogram:
    dense = [0] * BUCKETS
    for value in values:
        dense[bucket_of(value)] += 1
    return trimmed(dense, sum(values))


@given(st.lists(TIMES), st.lists(TIMES))
def test_the_difference_of_two_histograms_is_what_came_in_between(first: list[float], second: list[float]) -> None:
    found = histogram(*first, *second) - histogram(*first)
    expected = histogram(*second)
    assert (found.first, found.counts) == (expected.first, expected.counts)
    assert found.sum == pytest.approx(expected.sum, abs=1e-3)


def test_what_is_no_earlier_state_is_refused() -> None:
    for earlier in (histogram(5.0, 5.0), histogram(1.0), histogram(5.0, 900.0)):
        with pytest.raises(ValueError, match="histogram"):
            histogram(5.0, 90.0) - earlier


@pytest.mark.parametrize(
    "counts", [[-1, [1], 0.0], [BUCKETS, [1], 0.0], [0, [1] * (BUCKETS + 1), 0.0], [0, [3, -1], 0.0]]
)
def test_a_histogram_with_impossible_counts_is_no_message(counts: list[Any]) -> None:
    counting = msgspec.to_builtins(Counts().report())
    message = msgspec.msgpack.encode({**counting, "type": "stats", "loop_turns": counts})
    with pytest.raises(ValueError, match="loop_turns"):
        msgspec.msgpack.decode(message, type=wire.StatsReport)
