from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.batching import Staging, split

SPECS = (TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "INT64", (-1,)))


class Allocator:
    """np.empty, counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        self.calls += 1
        return np.empty(shape, dtype)


def item(rows: int, start: float) -> tuple[Array, ...]:
    a = (np.arange(rows * 3, dtype=np.float32) + start).reshape(rows, 3)
    return a, np.arange(rows, dtype=np.int64) + int(start)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_gather_then_split_gives_every_request_its_own_rows(rows: list[int]) -> None:
    items = [item(count, 100.0 * index) for index, count in enumerate(rows)]
    gathered = Staging(Allocator()).gather("m", SPECS, (), items, sum(rows))
    assert [array.shape[0] for array in gathered] == [sum(rows)] * 2
    for part, original in zip(split(gathered, rows), items, strict=True):
        for got, expected in zip(part, original, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_of_no_outputs_every_request_gets_none() -> None:
    assert split([], [2, 3]) == [(), ()]


def test_buffers_are_reused_and_grow() -> None:
    allocate = Allocator()
    staging = Staging(allocate)
    first = staging.gather("m", SPECS, (), [item(2, 0)], 2)
    again = staging.gather("m", SPECS, (), [item(1, 5), item(1, 7)], 2)
    assert np.shares_memory(first[0], again[0])
    assert allocate.calls == 2
    staging.gather("m", SPECS, (), [item(9, 0)], 9)
    assert allocate.calls == 4
    staging.gather("m", SPECS, (), [item(16, 0)], 16)
    assert allocate.calls == 4  # capacities are powers of two


def test_the_least_recently_used_buffers_go_first() -> None:
    allocate = Allocator()
    staging = Staging(allocate, max_bytes=20)
    spec = (TensorSpec("a", "FP32", (-1, -1)),)

    def gather(width: int) -> None:
        staging.gather("m", spec, (width,), [(np.ones((1, width), np.float32),)], 1)

    gather(1)
    gather(2)
    gather(1)
    gather(3)  # 4 + 8 + 12 bytes: width 2 goes
    assert allocate.calls == 3
    gather(1)
    assert allocate.calls == 3
    gather(2)
    assert allocate.calls == 4


def test_a_model_that_is_forgotten_leaves_its_room_to_others() -> None:
    allocate = Allocator()
    staging = Staging(allocate, max_bytes=20)
    spec = (TensorSpec("a", "FP32", (-1, -1)),)
    for model, width in (("m", 1), ("m", 2), ("other", 2)):
        staging.gather(model, spec, (width,), [(np.ones((1, width), np.float32),)], 1)
    staging.forget("m")
    staging.gather("new", spec, (3,), [(np.ones((1, 3), np.float32),)], 1)
    assert allocate.calls == 4
    staging.gather("other", spec, (2,), [(np.ones((1, 2), np.float32),)], 1)
    assert allocate.calls == 4
    staging.gather("m", spec, (1,), [(np.ones((1, 1), np.float32),)], 1)
    assert allocate.calls == 5


def test_a_set_larger_than_the_room_is_not_kept() -> None:
    allocate = Allocator()
    staging = Staging(allocate, max_bytes=20)
    for _ in range(2):
        (gathered,) = staging.gather("m", SPECS[:1], (), [(np.ones((4, 3), np.float32),)], 4)
        assert gathered.sum() == 12
    assert allocate.calls == 2


def test_unaligned_inputs_are_gathered_right() -> None:
    raw = bytes(1) + np.arange(6, dtype=np.float32).tobytes()
    unaligned = np.ndarray((2, 3), np.float32, memoryview(raw)[1:])
    assert not unaligned.flags.aligned
    (gathered,) = Staging(Allocator()).gather("m", SPECS[:1], (), [(unaligned,)], 2)
    np.testing.assert_array_equal(gathered, np.arange(6).reshape(2, 3))
    assert gathered.flags.aligned


def test_strings_of_requests_that_are_over_are_not_kept() -> None:
    specs = (TensorSpec("text", "BYTES", (-1, 1)), TensorSpec("b", "INT64", (-1,)))
    staging = Staging(Allocator())
    items = [(np.array([[text]], object), np.array([1], np.int64)) for text in (b"one", b"another")]
    texts, numbers = staging.gather("m", specs, (), items, 2)
    assert texts is not None
    assert numbers is not None
    assert texts.tolist() == [[b"one"], [b"another"]]
    assert numbers.tolist() == [1, 1]
    (later, _) = staging.gather("m", specs, (), [(np.array([[b"third"]], object), items[0][1])], 1)
    assert later is not None
    assert later.base is not texts.base
    assert texts.tolist() == [[b"one"], [b"another"]]
