"""The choice of requests for the next batch."""

from __future__ import annotations

import itertools

import pytest

from scheduling_helpers import memory_kept
from tnxd.scheduling.costs import BatchCosts
from tnxd.scheduling.placement import ModelLoad, Placement
from tnxd.scheduling.request import NEVER, Request
from tnxd.scheduling.request_queue import RequestQueue

_serials = itertools.count()


def request(client: str = "a", priority: int = 1, due: int = 0, rows: int = 1, peer: bytes = b"") -> Request:
    one = Request("m", max_batch_size=64, client=client, peer=peer, priority=priority, rows=rows)
    one.serial = next(_serials)
    one.due_ns = due
    one.waiting = True
    return one


def queue(*requests: Request) -> RequestQueue:
    made = RequestQueue(("m", (), False), BatchCosts(), Placement(ModelLoad()))
    for one in requests:
        made.add(one)
    return made


def test_equal_requests_go_first_come_first_served() -> None:
    requests = [request() for _ in range(5)]
    assert queue(*requests).take(1, 64) == requests


def test_requests_of_one_client_go_earliest_due_first() -> None:
    later, sooner, soonest = request(due=30), request(due=20), request(due=10)
    assert queue(later, sooner, soonest).take(1, 64) == [soonest, sooner, later]


def test_clients_go_earliest_due_first() -> None:
    requests = [request(client=str(index), due=100 - index) for index in range(10)]
    assert queue(*requests).take(1, 64) == requests[::-1]


def test_client_with_many_requests_does_not_make_a_single_one_wait() -> None:
    flood = [request("flood") for _ in range(1000)]
    single = request("single")
    assert single in queue(*flood, single).take(1, 64)


def test_clients_share_a_batch() -> None:
    requests = [request(name) for name in "abcd" for _ in range(100)]
    batch = queue(*requests).take(1, 64)
    assert {name: sum(one.client == name for one in batch) for name in "abcd"} == dict.fromkeys("abcd", 16)


@pytest.mark.parametrize(
    ("sizes", "light"),
    [([1000], False), ([1000, 1], True), ([1] * 1000, False), ([300, 300, 300, 3], True), ([300, 300, 300, 90], False)],
)
def test_light_connection_has_far_less_than_others(sizes: list[int], light: bool) -> None:
    waiting = queue(*[request(str(client)) for client, size in enumerate(sizes) for _ in range(size)])
    assert waiting.has_light_connection(1) is light
    assert not waiting.has_light_connection(0)


def test_connections_of_one_client_share_its_part() -> None:
    many = [request("many", peer=b"%d" % number) for number in range(40) for _ in range(100)]
    few = [request("few", peer=b"few") for _ in range(100)]
    batch = queue(*many, *few).take(1, 64)
    assert sum(one.client == "few" for one in batch) == 32
    taken = {one.peer for one in batch if one.client == "many"}
    assert len(taken) == 2


def test_connections_of_one_client_take_turns() -> None:
    requests = [request("one", peer=name) for name in (b"a", b"b", b"c", b"d") for _ in range(100)]
    batch = queue(*requests).take(1, 64)
    assert [sum(one.peer == name for one in batch) for name in (b"a", b"b", b"c", b"d")] == [16] * 4


@pytest.mark.parametrize("siblings", [False, True], ids=["clients", "connections"])
def test_connection_with_many_rows_at_a_time_waits_for_as_many_more_turns(siblings: bool) -> None:
    """Four with 480 rows a request, and one with a single row, who comes back each time that it was served."""
    names = ["one"] * 5 if siblings else [f"client {number}" for number in range(5)]
    large = [request(names[at], rows=480, peer=b"%d" % at) for _ in range(100) for at in range(4)]
    waiting = queue(*large, request(names[4], due=1, peer=b"small"))
    order = []
    for _ in range(104):
        batch = waiting.take(1, 64)
        order.append(batch[0].rows if len(batch) == 1 else 1)
        if any(one.peer == b"small" for one in batch):
            waiting.add(request(names[4], due=1, peer=b"small"))
    assert order.count(1) >= 90, "it waited for all the others each time"


def test_level_that_is_asked_for_goes_first_and_others_fill_up() -> None:
    low, normal, high = request(priority=3), request(priority=1), request(priority=0)
    waiting = queue(low, normal, high)
    assert waiting.take(1, 2) == [normal, high]
    assert waiting.take(3, 2) == [low]


def test_batch_rows_are_bounded_but_a_single_request_may_have_more() -> None:
    large, small, other = request(rows=100), request(rows=3), request(rows=62)
    waiting = queue(large, small, other)
    assert waiting.take(1, 64) == [large]
    assert waiting.take(1, 64) == [small]
    assert (waiting.rows, waiting.count) == (62, 1)


def test_removed_requests_are_not_taken() -> None:
    requests = [request(client) for client in "aabb"]
    waiting = queue(*requests)
    for one in (requests[0], requests[2], requests[3]):
        waiting.remove(one)
    assert waiting.count == 1
    assert waiting.take(1, 64) == [requests[1]]
    assert waiting.head(1) is None


def test_removed_requests_do_not_pile_up_behind_one_that_stays() -> None:
    waiting = queue(request(due=-1), request("other"))

    def work() -> None:
        for _ in range(1000):
            one = request()
            waiting.add(one)
            waiting.remove(one)

    assert memory_kept(work) < 50_000  # of requests alone, it would be 300,000


def test_rows_ahead_are_bounded_by_turns() -> None:
    waiting = queue(*[request("flood") for _ in range(1000)], *[request("other") for _ in range(3)])
    assert waiting.rows_ahead(request("flood", due=NEVER)) == (1003, 1003)
    rows, ahead = waiting.rows_ahead(request("other", due=NEVER))
    assert (rows, ahead < 60) == (1003, True)
    assert waiting.rows_ahead(request("other", priority=0, due=NEVER)) == (0, 0)


def test_drain_empties_all_levels() -> None:
    requests = [request(client, priority) for client in "ab" for priority in range(4) for _ in range(3)]
    waiting = queue(*requests)
    assert sorted(one.serial for one in waiting.drain()) == sorted(one.serial for one in requests)
    assert (waiting.rows, waiting.count) == (0, 0)


def test_request_more_urgent_than_those_that_left_goes_first() -> None:
    waiting = queue(*[request(due=10 + number) for number in range(9)], request("other", due=90))
    assert [one.due_ns for one in waiting.take(1, 3)] == [10, 11, 12]
    waiting.add(request(due=5))
    assert [one.due_ns for one in waiting.take(1, 3)] == [90, 5, 13]  # after the turn of the other
