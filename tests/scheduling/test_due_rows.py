"""Rows by due time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduling_helpers import request
from tnxd.scheduling.costs import BatchCosts
from tnxd.scheduling.due_rows import DueRows
from tnxd.scheduling.placement import ModelLoad, Placement
from tnxd.scheduling.request_queue import RequestQueue


@given(st.lists(st.tuples(st.integers(0, 900_000_000), st.integers(0, 9)), max_size=40), st.integers(0, 1_000_000_000))
def test_rows_due_of_a_queue_are_counted_up_to_a_bucket(entries: list[tuple[int, int]], asked_ns: int) -> None:
    for alike in (False, True):
        queue = RequestQueue(("mlp", (), False), BatchCosts(), Placement(ModelLoad()))
        for serial, (due_ns, rows) in enumerate(sorted(entries) if alike else entries):
            one = request() if alike else request(rows=rows, client=b"%d" % (serial % 2))
            one.due_ns, one.serial, one.waiting = due_ns, serial, True
            queue.add(one)
        sizes = [(due_ns, 1 if alike else rows) for due_ns, rows in entries]
        exact = sum(rows for due_ns, rows in sizes if due_ns <= asked_ns)
        bucket = sum(rows for due_ns, rows in sizes if due_ns >> 17 == asked_ns >> 17)
        assert exact <= queue.rows_due(1, asked_ns) <= exact + bucket


@given(
    st.lists(st.tuples(st.integers(0, 1_500_000_000), st.integers(1, 9), st.booleans()), max_size=40),
    st.integers(0, 2_000_000_000),
)
def test_rows_that_have_left_are_not_due(entries: list[tuple[int, int, bool]], asked_ns: int) -> None:
    due_rows = DueRows()
    for due_ns, rows, _ in entries:
        due_rows.change(due_ns, rows)
    for due_ns, rows, stays in entries:
        if not stays:
            due_rows.change(due_ns, -rows)
    left = [(due_ns, rows) for due_ns, rows, stays in entries if stays]
    bucket_ends_ns = (asked_ns >> 17) + 1 << 17
    assert due_rows.until(asked_ns) >= sum(rows for due_ns, rows in left if due_ns <= asked_ns)
    assert due_rows.until(asked_ns) <= sum(rows for due_ns, rows in left if due_ns < bucket_ends_ns)
