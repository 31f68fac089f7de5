"""Requests of one connection that wait: none is kept that has left, and the count of those to be swept out is right."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from tnxd.scheduling.connection_queue import ConnectionQueue
from tnxd.scheduling.request import Request

_steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 30)),
        st.tuples(st.just("remove"), st.integers(0, 50)),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("steal"), st.integers(1, 6)),
    ),
    max_size=60,
)


@example([("add", 0), *[("add", 5), ("remove", 1)] * 10])
@example(
    [
        *[("add", number) for number in (0, 0, 0, 1)],
        ("remove", 0),
        ("remove", 20),
        ("take", 0),
        ("add", 0),
        ("steal", 2),
    ]
)
@given(_steps)
def test_requests_leave_in_order_of_their_due_times_and_entries_are_not_kept(steps: list[tuple[str, int]]) -> None:
    queue = ConnectionQueue("a", b"")
    waiting: list[tuple[int, int, Request]] = []
    for serial, (step, number) in enumerate(steps):
        if step == "add":
            entry = (number, serial, Request("m", max_batch_size=8, rows=1))
            entry[2].waiting = True
            waiting.append(entry)
            waiting.sort(key=lambda one: one[:2])
            assert queue.add(entry) is (queue.entries[queue.start] is entry)
        elif not waiting:
            assert queue.head() is None
        elif step == "remove":
            waiting.pop(number % len(waiting))[2].waiting = False
            queue.remove()
        elif step == "take":
            assert queue.head() is waiting[0]
            queue.pop()
            waiting.pop(0)[2].waiting = False
        else:
            assert queue.head() is waiting[0]
            stolen = queue.steal(number, 0, 0, lambda request: True)
            assert stolen == [entry[2] for entry in waiting[:number]]
            del waiting[:number]
            for request in stolen:
                request.waiting = False
        left = queue.entries[queue.start :]
        assert [entry for entry in left if entry[2].waiting] == waiting
        assert queue.removed == sum(not entry[2].waiting for entry in left)
        assert len(queue.entries) <= 4 * len(waiting) + 2
