"""Runner: batches for which memory has no room, and the memory that it stages inputs in."""

from __future__ import annotations

import gc
import queue
import threading
import weakref

import numpy as np
import torch

from lane_pools import Small, drain, execution, pool, served
from tnxctl.protocol.errors import TensorNextError
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution
from tnxd.models.model import Model


class Thrifty(CpuRunner):
    """Counts how often memory is freed, and looks whether what failed still holds some."""

    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = small
        self.freed = 0

    def free_memory(self, *, emptied: bool) -> None:
        assert emptied  # torch's own class of error says so
        assert self.small.workspaces.get_nowait()() is None
        self.freed += 1


def run_small(
    memory: int, *items: list[float], max_batch_size: int = 16, max_rows: int = 0, crowded: bool = False
) -> tuple[Execution, Small, Thrifty]:
    """Run one batch of such items, each value a row of two."""
    small = Small(16)
    made: list[Thrifty] = []

    def runner() -> Thrifty:
        made.append(Thrifty(small))
        return made[-1]

    lanes, done = pool(1, runner)
    spec = (TensorSpec("x", "FP32", (-1, 2) if max_batch_size else (-1,)),)
    model = Model("m", "1", spec, spec, max_batch_size, lambda: small)
    lanes.load(model)
    drain(small.seen)
    small.rows = memory
    values = [np.array(item, np.float32) for item in items]
    arrays = [np.repeat(each[:, None], 2, axis=1) if max_batch_size else each for each in values]
    counts = [len(array) if max_batch_size else 1 for array in arrays]
    lanes.submit(Execution(0, max_rows, model, [(array,) for array in arrays], counts, (), crowded=crowded))
    finished = done.get(timeout=60)
    for outcome, array in zip(finished.outcomes, arrays, strict=True):
        if not isinstance(outcome, TensorNextError):
            np.testing.assert_array_equal(outcome[0], array * 2)
    return finished, small, made[0]


def codes(finished: Execution) -> list[str]:
    return [outcome.code if isinstance(outcome, TensorNextError) else "ok" for outcome in finished.outcomes]


def test_a_batch_that_memory_has_no_room_for_runs_in_halves() -> None:
    finished, small, runner = run_small(3, [1, 2], [3], [4], [5], [6, 7])
    assert codes(finished) == ["ok"] * 5
    assert small.calls == [7, 3, 4, 1, 3]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (True, 3, 2)


def test_a_request_that_memory_has_no_room_for_runs_in_pieces() -> None:
    finished, small, runner = run_small(3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert codes(finished) == ["ok"]
    assert small.calls == [10, 5, 2, 2, 2, 2, 2]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (True, 2, 2)


def test_pieces_keep_to_the_limit_of_the_model_and_to_the_ceiling() -> None:
    finished, small, _ = run_small(8, [1] * 30)
    assert codes(finished) == ["ok"]
    assert small.calls == [16, 8, 8, 8, 6]
    finished, small, _ = run_small(8, [1] * 30, max_rows=4)
    assert codes(finished) == ["ok"]
    assert small.calls == [4] * 7 + [2]
    assert (finished.exhausted, finished.safe_rows) == (False, 0)


def test_a_single_row_too_large_for_memory_fails_its_request_alone() -> None:
    finished, small, _ = run_small(16, [1], [2, 100, 3], [4, 5], [6])
    assert codes(finished) == ["ok", "RESOURCE_EXHAUSTED", "ok", "ok"]
    assert small.calls == [7, 4, 1, 3, 1, 1, 3]
    assert (finished.exhausted, finished.safe_rows) == (True, 3)
    assert "cpu has no memory left" in str(finished.outcomes[1])
    finished, small, _ = run_small(16, [1, 2], [3, 4], [5], [100])
    assert small.calls == [6, 4, 2, 1, 1]
    assert (finished.exhausted, finished.safe_rows) == (True, 4)


def test_a_batch_that_finds_no_memory_beside_others_is_not_tried_in_parts() -> None:
    for items in ([[1], [2], [3], [4.0]], [[1, 2, 3, 4.0]]):
        finished, small, runner = run_small(3, *items, crowded=True)
        assert codes(finished) == ["RESOURCE_EXHAUSTED"] * len(items)
        assert small.calls == [4]
        assert (finished.exhausted, finished.safe_rows, runner.freed) == (True, 0, 0)
    finished, small, _ = run_small(16, [1], [-2], [3, 100], crowded=True)
    assert codes(finished) == ["RESOURCE_EXHAUSTED"] * 3
    finished, small, _ = run_small(16, [1], [-2], [3, 4], crowded=True)
    assert codes(finished) == ["ok", "INTERNAL", "ok"]


def test_an_indivisible_request_too_large_for_memory_fails() -> None:
    finished, small, _ = run_small(16, [100.0, 1.0], max_batch_size=0)
    assert codes(finished) == ["RESOURCE_EXHAUSTED"]
    assert small.calls == [2]
    assert (finished.exhausted, finished.safe_rows) == (True, 0)


def test_an_error_of_another_kind_does_not_count_as_out_of_memory() -> None:
    finished, small, runner = run_small(16, [1, -2, 3], [4])
    assert codes(finished) == ["INTERNAL", "ok"]
    assert small.calls == [4, 3, 1]
    assert (finished.exhausted, finished.safe_rows, runner.freed) == (False, 0, 0)


def test_a_forgotten_model_holds_no_staging_memory() -> None:
    finished, _, runner = run_small(16, [1], [2])
    items = [(np.zeros((1, 2), np.float32),)] * 2
    (gathered,) = runner.staging.gather("m@1", finished.model.inputs, finished.group, items, 2)
    assert gathered is not None
    buffer = weakref.ref(gathered.base)
    del gathered
    assert buffer() is not None
    runner.forget("m@1")
    assert buffer() is None


def test_an_input_alone_reaches_the_model_without_a_copy_if_it_is_aligned() -> None:
    addresses: queue.SimpleQueue[int] = queue.SimpleQueue()

    class Address(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            addresses.put(x.data_ptr())
            return x.sum(dim=1)

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    model = Model("m", "1", spec, (TensorSpec("y", "FP32", (-1,)),), 4, Address)
    lanes, done = pool(1, CpuRunner)
    lanes.load(model)
    raw = np.zeros(4 * 10 + 1, np.uint8)
    for x, same in ((np.ones((1, 100_000), np.float32), True), (raw[1:].view(np.float32).reshape(1, 10), False)):
        width = x.shape[1]
        lanes.submit(Execution(0, 0, model, [(x,)], [1], (width,)))
        done.get(timeout=60)
        assert (drain(addresses)[-1] == x.ctypes.data) is same


def test_no_rows_need_no_forward() -> None:
    def fails() -> torch.nn.Module:
        raise AssertionError("not called")

    model = served(fails)
    lanes, done = pool(1, CpuRunner)
    none = execution(model, 0, 0.0)
    none.items, none.rows = [(np.zeros((0, 2), np.float32),)] * 2, [0, 0]
    lanes.submit(none)
    outcomes = done.get(timeout=60).outcomes
    assert [outcome[0].shape for outcome in outcomes] == [(0, 2), (0, 2)]


def test_a_runner_that_is_freed_on_another_thread_leaves_its_inference_mode_alone() -> None:
    runners = [CpuRunner()]
    thread = threading.Thread(target=runners[0].enter_thread)
    thread.start()
    thread.join()
    with torch.inference_mode():
        runners.clear()
        gc.collect()
        assert torch.is_inference_mode_enabled()


def test_the_inference_mode_of_a_thread_outlives_the_runner_that_began_it() -> None:
    modes = []

    def work() -> None:
        for _ in range(2):
            CpuRunner().enter_thread()
            gc.collect()
            modes.append(torch.is_inference_mode_enabled())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert modes == [True, True]
    assert not torch.is_inference_mode_enabled()
