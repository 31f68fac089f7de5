"""Queueing delays of messages, by the clocks of their senders."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.wire import MAX_CLOCK_US
from tnxd.transport.sender_clock import SenderClock

MS = 1_000_000


def waits_ms(*messages: tuple[float, float]) -> list[float]:
    """Waits of messages; of each: when it was sent, and when it was received, in milliseconds."""
    clock = SenderClock()
    return [clock.waited_ns(sent * 1e3, int(received * MS)) / MS for sent, received in messages]


def test_wait_is_the_excess_over_the_base_delay() -> None:
    assert waits_ms((1000, 5000), (1010, 5010), (1020, 5050), (1030, 5031)) == [0, 0, 30, 1]


def test_base_delay_falls_with_a_faster_message() -> None:
    assert waits_ms((1000, 5040), (1010, 5010), (1020, 5060)) == [0, 0, 40]


def test_base_delay_of_long_ago_is_forgotten() -> None:
    """A clock that runs slower falls behind: what it says must not look like a wait for good."""
    messages = [(at * 0.999, float(at)) for at in range(0, 60_000, 100)]
    found = waits_ms(*messages)
    assert max(found) <= 10.1
    assert max(found[-100:]) <= 10.1


def test_base_delay_is_forgotten_after_a_silence() -> None:
    """A suspended laptop: its clock has not gone on, though hours have passed."""
    hour = 3_600_000.0
    assert waits_ms((1000, 1000), (1010, 1010), (1020, hour), (1030, hour + 30), (1040, hour + 20)) == [0, 0, 0, 20, 0]


@given(st.lists(st.tuples(st.floats(0, MAX_CLOCK_US), st.integers(0, 2**62)), min_size=1, max_size=50))
def test_wait_is_never_negative_whatever_the_timestamps(messages: list[tuple[float, int]]) -> None:
    clock = SenderClock()
    for sent_us, now_ns in messages:
        assert clock.waited_ns(sent_us, now_ns) >= 0
