"""How long messages have waited, by the clocks of those who sent them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.wire import MAX_CLOCK_US
from tnxd.transport.sender_clock import SenderClock

MS = 1_000_000


def ages_ms(*messages: tuple[float, float]) -> list[float]:
    """Of messages that were sent, and taken up, at so many milliseconds."""
    clock = SenderClock()
    return [clock.waited_ns(sent * 1e3, int(taken * MS)) / MS for sent, taken in messages]


def test_what_takes_longer_than_others_has_waited() -> None:
    assert ages_ms((1000, 5000), (1010, 5010), (1020, 5050), (1030, 5031)) == [0, 0, 30, 1]


def test_a_faster_message_shows_that_those_before_it_had_waited() -> None:
    assert ages_ms((1000, 5040), (1010, 5010), (1020, 5060)) == [0, 0, 40]


def test_the_smallest_difference_of_long_ago_counts_no_more() -> None:
    """A clock that runs slower falls behind: what it says must not look like a wait for good."""
    messages = [(at * 0.999, float(at)) for at in range(0, 60_000, 100)]
    found = ages_ms(*messages)
    assert max(found) <= 10.1
    assert max(found[-100:]) <= 10.1


def test_a_sender_whose_clock_stood_still_begins_anew() -> None:
    """A suspended laptop: its clock has not gone on, though hours have passed."""
    hour = 3_600_000.0
    assert ages_ms((1000, 1000), (1010, 1010), (1020, hour), (1030, hour + 30), (1040, hour + 20)) == [0, 0, 0, 20, 0]


@given(st.lists(st.tuples(st.floats(0, MAX_CLOCK_US), st.integers(0, 2**62)), min_size=1, max_size=50))
def test_whatever_a_sender_says_nothing_is_negative(messages: list[tuple[float, int]]) -> None:
    clock = SenderClock()
    for sent_us, now_ns in messages:
        assert clock.waited_ns(sent_us, now_ns) >= 0
