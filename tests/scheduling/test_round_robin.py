"""Deadline-ordered round robin."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from tnxd.scheduling.round_robin import ClientRoundRobin, DeadlineRoundRobin


def order(turns: DeadlineRoundRobin[str], again: dict[str, int], steps: int) -> str:
    """The members served in so many steps, each coming back as often as `again` says."""
    serials = itertools.count(1000)
    served = ""
    for _ in range(steps):
        member = turns.first()
        if member is None:
            break
        served += member
        turns.served(member)
        if again.get(member, 0) > 0:
            again[member] -= 1
            turns.offer(member, 0, next(serials))
    return served


def test_earliest_due_goes_first() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    for serial, (member, due) in enumerate({"a": 30, "b": 10, "c": 20}.items()):
        turns.offer(member, due, serial)
    assert order(turns, {}, 9) == "bca"


def test_round_serves_nobody_twice_however_urgent() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    turns.offer("a", 50, 1)
    turns.offer("b", 60, 2)
    turns.offer("c", 70, 3)
    assert order(turns, {"a": 2}, 9) == "abcaa"


def test_newcomer_joins_the_round() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    turns.offer("a", 0, 1)
    turns.served("a")
    turns.offer("a", 0, 2)
    turns.offer("new", 99, 3)
    assert turns.first() == "new"


def test_stream_of_newcomers_does_not_keep_those_waiting_that_had_a_turn() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    turns.offer("patient", 0, 0)
    had = 0
    for serial in range(1, 3000):
        turns.offer(f"new {serial}", 0, serial)
        member = turns.first()
        assert member is not None
        turns.served(member)
        if member == "patient":
            had += 1
            turns.offer(member, 0, 10_000 + serial)
    assert had > 20


def test_round_holds_however_many_wait() -> None:
    """However many they are: an urgent one that comes meanwhile still goes before those that have had a turn."""
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    for serial in range(1000):
        turns.offer(f"member {serial}", 100, serial)
    for serial in range(400):
        member = turns.first()
        assert member is not None
        turns.served(member)
        turns.offer(member, 0, 2000 + serial)
    turns.offer("urgent", 1, 9000)
    assert turns.first() == "urgent"


def test_member_offered_again_moves_forward_and_never_back() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    turns.offer("a", 20, 1)
    turns.offer("b", 10, 2)
    turns.offer("a", 5, 3)
    turns.offer("b", 50, 4)
    assert len(turns.members) == 2
    assert order(turns, {}, 9) == "ab"


def test_withdrawn_member_takes_no_turns() -> None:
    turns: DeadlineRoundRobin[str] = DeadlineRoundRobin()
    turns.offer("a", 1, 1)
    turns.offer("b", 2, 2)
    turns.withdraw("a")
    turns.withdraw("a")
    assert "a" not in turns.members
    assert order(turns, {}, 9) == "b"
    assert turns.first() is None


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 2**32))
def test_others_have_at_most_two_turns_each_between_two_of_one_member(amounts: list[int], seed: int) -> None:
    """However much work some have and however urgent they say it is."""
    chance = random.Random(seed)
    turns: DeadlineRoundRobin[int] = DeadlineRoundRobin()
    serial = itertools.count()
    left = dict(enumerate(amounts))
    for member in left:
        turns.offer(member, chance.randrange(100), next(serial))
    served: list[int] = []
    while (member := turns.first()) is not None:
        served.append(member)
        turns.served(member)
        left[member] -= 1
        if left[member]:
            turns.offer(member, chance.randrange(100), next(serial))
    assert sorted(served) == sorted(member for member, amount in enumerate(amounts) for _ in range(amount))
    for member in range(len(amounts)):
        positions = [index for index, other in enumerate(served) if other == member]
        for start, stop in itertools.pairwise(positions):
            between = served[start + 1 : stop]
            assert all(between.count(other) <= 2 for other in set(between))


def turns_of(shares: dict[str, float], steps: int) -> dict[str, int]:
    """Number of turns of clients who always have more to do."""
    turns = ClientRoundRobin()
    serials = itertools.count()
    for client, share in shares.items():
        turns.set_share(client, share)
        turns.offer(client, b"its connection", 0, next(serials))
    served = dict.fromkeys(shares, 0)
    for _ in range(steps):
        client, connection = turns.first() or ("", b"")
        served[client] += 1
        turns.served(client, connection, 1)
        turns.offer(client, connection, 0, next(serials))
    return served


def test_turns_go_by_shares() -> None:
    assert turns_of({"one": 1.0, "other": 1.0}, 400) == {"one": 200, "other": 200}
    assert turns_of({"three": 3.0, "one": 1.0}, 400) == {"three": 300, "one": 100}
    served = turns_of({"half": 0.5, "one": 1.0, "two and a half": 2.5}, 800)
    assert {client: round(count, -1) for client, count in served.items()} == {
        "half": 100,
        "one": 200,
        "two and a half": 500,
    }


def test_a_large_share_leaves_nobody_out() -> None:
    assert turns_of({"huge": 100.0, "one": 1.0}, 700)["one"] >= 7


def test_larger_shares_of_others_are_turns_to_wait_for() -> None:
    turns = ClientRoundRobin()
    turns.offer("me", b"", 0, 0)
    turns.offer("other", b"", 0, 1)
    before = turns.before("me", b"")
    turns.set_share("other", 5.0)
    assert turns.before("me", b"") > before
