"""Graphs of lanes: what is captured, what batches become of them, and what has none.

On a real device where there is one, else on a pretended one, which does work late or in any order that its streams
allow. What is timed there means nothing, so graphs are kept whatever they gain.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tool  # noqa: E402
from conftest import Daemon  # noqa: E402
from pretended import POLICIES, pretended, program  # noqa: E402
from pretended.streams import active  # noqa: E402
from tnxctl import Client  # noqa: E402
from tnxctl.protocol.errors import TensorNextError  # noqa: E402
from tnxctl.protocol.wire import TensorSpec  # noqa: E402
from tnxd import config  # noqa: E402
from tnxd.executors import accelerator, arena, cuda, graphs  # noqa: E402
from tnxd.executors.accelerator_runner import AcceleratorRunner, Ticket  # noqa: E402
from tnxd.executors.devices import open_devices  # noqa: E402
from tnxd.executors.execution import Execution  # noqa: E402
from tnxd.executors.graphs import GraphApi, ModelGraphs  # noqa: E402
from tnxd.executors.pool import LanePool  # noqa: E402
from tnxd.executors.trial import graphing  # noqa: E402
from tnxd.models.model import Model  # noqa: E402
from tnxd.models.ragged import Ragged  # noqa: E402

REAL = torch.cuda.is_available()
only_pretended = pytest.mark.skipif(REAL, reason="a device is pretended only where there is none")

DEPTH = 2


class Log:
    """Events of graphs: names of threads, in order; of captures with the pool."""

    def __init__(self) -> None:
        self.captures: list[tuple[str, Any]] = []
        self.replays: list[str] = []
        self.freed: list[str] = []
        self.ended: list[Any] = []
        self.pools = 0

    def new_pool(self) -> Any:
        self.pools += 1
        return torch.cuda.graph_pool_handle()

    def api(self, device: cuda.Cuda) -> GraphApi:
        def end_allocation(pool: Any) -> None:
            self.ended.append(pool)
            device._end_allocation(pool)

        return GraphApi(lambda: Logged(self), self.new_pool, end_allocation)


class Logged:
    """A graph that tells what happens to it."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._graph = torch.cuda.CUDAGraph()

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self._log.captures.append((threading.current_thread().name, pool))
        self._graph.capture_begin(pool=pool, capture_error_mode=capture_error_mode)

    def capture_end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._log.replays.append(threading.current_thread().name)
        self._graph.replay()

    def reset(self) -> None:
        self._log.freed.append(threading.current_thread().name)
        self._graph.reset()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(graphing, "_AS_FAST", 1e9)
    monkeypatch.setattr(graphing, "_LONG_US", 1e9)
    monkeypatch.setattr(graphing, "_ROUNDS", 1)
    monkeypatch.setattr(graphing, "TURN_S", 60.0)
    monkeypatch.setattr(graphing, "_SECONDS", 60.0)
    monkeypatch.setattr(cuda.Cuda, "_graphs", lambda device: made.api(device))
    return made


class Pool:
    """A pretended device, and what comes back from it."""

    def __init__(self, executor: LanePool, done: queue.Queue[Execution]) -> None:
        self.executor = executor
        self.load = executor.load
        self._done = done

    def ask(self, served: Model, *items: Sequence[np.ndarray], lane: int = 0) -> list[tuple[np.ndarray, ...]]:
        """Outputs of one batch, for each request."""
        self.submit(served, *items, lane=lane)
        return self.answers(1)[0]

    def submit(self, served: Model, *items: Sequence[np.ndarray], lane: int = 0) -> None:
        rows = [len(item[0]) if served.max_batch_size else 1 for item in items]
        group = served.example_group
        self.executor.submit(Execution(lane, 0, served, [tuple(item) for item in items], rows, group))

    def ask_ahead(self, served: Model, asked: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Answers to batches of one request, each of which is issued before the one before it is waited for."""
        issued, finished = threading.Semaphore(0), 0
        issue, finish = AcceleratorRunner.issue, AcceleratorRunner.finish

        def issue_and_tell(runner: AcceleratorRunner, execution: Execution) -> Ticket:
            ticket = issue(runner, execution)
            issued.release()
            return ticket

        def finish_later(runner: AcceleratorRunner, ticket: Ticket) -> bool:
            nonlocal finished
            finished += 1
            for _ in range(min(DEPTH, len(asked)) if finished == 1 else finished + DEPTH <= len(asked) + 1):
                assert issued.acquire(timeout=60)
            return finish(runner, ticket)

        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(AcceleratorRunner, "issue", issue_and_tell)
            patching.setattr(AcceleratorRunner, "finish", finish_later)
            for x in asked:
                self.submit(served, [x])
            return [y for [(y,)] in self.answers(len(asked))]

    def answers(self, count: int) -> list[list[tuple[np.ndarray, ...]]]:
        """Outputs of so many batches, in the order in which they were submitted to a lane."""
        found = []
        for _ in range(count):
            outcomes = self._done.get(timeout=60).outcomes
            for outcome in outcomes:
                assert not isinstance(outcome, TensorNextError), outcome
            found.append(outcomes)
        return found  # type: ignore[return-value]


@contextmanager
def pool(lanes: int = 1, policy: str = "late", seed: int = 0, graphs: bool = True) -> Iterator[Pool]:
    done: queue.Queue[Execution] = queue.Queue()
    settings = config.Cuda(lanes=lanes, depth=DEPTH, graphs=graphs)
    with nullcontext() if REAL else pretended(policy=policy, seed=seed):
        devices = open_devices(config.Config(devices=("cuda:0",), cuda=settings), done.put)
        assert not devices.failures, devices.failures
        yield Pool(devices.executors["cuda:0"], done)


@pytest.fixture
def made(log: Log) -> Iterator[Pool]:
    with pool() as opened:
        yield opened


def model(factory: Callable[[], torch.nn.Module], width: int = 3, most: int = 8, **fields: Any) -> Model:
    spec = (TensorSpec("x", "FP32", (-1, width)),)
    return Model("m", "1", spec, spec, most, factory, **fields)


def note_of(notes: Sequence[str]) -> str:
    (note,) = [note for note in notes if note.startswith("graphs:")]
    return note


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)) + x


def expected(network: torch.nn.Module, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(*map(torch.from_numpy, inputs)).numpy()


def batches(count: int) -> list[np.ndarray]:
    """Batches of 1 to 8 rows with values of their own."""
    generator = np.random.default_rng(0)
    return [generator.normal(size=(1 + number * 3 % 8, 3)).astype(np.float32) for number in range(count)]


def wrong_answers(made: Pool, served: Model, asked: Sequence[np.ndarray]) -> int:
    """Number of wrong answers to batches that are all under way as early as the lane can."""
    network = Network()
    return sum(
        y.shape != x.shape or not np.allclose(y, expected(network, x), rtol=1e-4, atol=1e-5)
        for x, y in zip(asked, made.ask_ahead(served, asked), strict=True)
    )


@pytest.mark.parametrize("policy", ["real"] if REAL else POLICIES)
def test_batches_of_all_sizes_have_the_answers_of_the_model(log: Log, policy: str) -> None:
    with pool(policy=policy) as made:
        served = model(Network)
        report = made.load(served)
        assert note_of(report.notes).startswith("graphs: parts of the time by rows 1: ")
        before = len(log.replays)
        asked = batches(24)
        assert wrong_answers(made, served, asked) == 0
        assert len(log.replays) == before + len(asked)


def test_answers_survive_the_replays_that_come_later(made: Pool) -> None:
    served = model(Network)
    made.load(served)
    asked = batches(20)
    kept = [made.ask(served, [x])[0][0] for x in asked]
    for x, y in zip(asked, kept, strict=True):
        np.testing.assert_allclose(y, expected(Network(), x), rtol=1e-4, atol=1e-5)


def test_each_lane_captures_replays_and_frees_its_own_graphs(log: Log) -> None:
    with pool(lanes=2) as made:
        served = model(Network)
        made.load(served)
        count = 4 * DEPTH  # buckets, in each slot
        assert [name for name, _ in log.captures] == ["cuda:0/0"] * count + ["cuda:0/1"] * count
        # A graph may have its outputs where another one of its pool computes: so no two slots share one.
        assert len({pool for _, pool in log.captures}) == 2 * DEPTH
        assert log.captures[0][1] == log.captures[DEPTH][1]  # but the buckets of a slot do
        log.replays.clear()
        made.ask(served, [np.ones((2, 3), np.float32)], lane=1)
        assert log.replays == ["cuda:0/1"]
        made.executor.unload(served.key)
        for lane in made.executor._lanes:
            lane.call(lambda runner: None)
        assert sorted(log.freed) == ["cuda:0/0"] * count + ["cuda:0/1"] * count


def test_a_memory_that_no_graph_uses_any_more_is_not_used_again(log: Log, made: Pool) -> None:
    first, second = model(Network), model(Network, generation=1)
    made.load(first)
    made.load(second)
    assert log.pools == DEPTH
    made.executor.unload(first.key)
    made.executor.unload(second.key)
    made.load(first)
    assert log.pools == 2 * DEPTH


def test_a_pool_lives_as_long_as_a_graph_of_it_or_one_that_failed(
    log: Log, made: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = graphs._record

    def record(*arguments: Any) -> Any:
        outputs = recorded(*arguments)
        if len(log.captures) == 2:  # of the largest bucket, in the second slot
            raise torch.OutOfMemoryError("made up")
        return outputs

    monkeypatch.setattr(graphs, "_record", record)
    assert note_of(made.load(model(Network)).notes).endswith("; without: 8 no memory is left")
    (_, given_up), (_, failed), *others = log.captures
    used = {pool for _, pool in others}
    assert len(used) == DEPTH
    assert given_up not in used
    assert failed in used


def test_a_slot_that_has_grown_reads_its_new_memory(log: Log, made: Pool) -> None:
    served, large = model(Network), model(torch.nn.Identity, 2_000, 2, warm_up=(1,), graphs=False, generation=1)
    made.load(served)
    made.load(large)
    for _ in range(DEPTH):
        made.ask(large, [np.ones((2, 2_000), np.float32)])
    log.replays.clear()
    asked = batches(10)
    assert wrong_answers(made, served, asked) == 0
    assert len(log.replays) == 10


def test_a_batch_is_filled_up_with_what_it_has_itself(log: Log, made: Pool) -> None:
    class FromOne(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.arange(12, dtype=torch.float32).reshape(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.embedding(x - 1, self.table).sum(1)  # 0 would be out of range

    served = Model(
        "m",
        "1",
        (TensorSpec("x", "INT64", (-1, 2)),),
        (TensorSpec("y", "FP32", (-1, 3)),),
        8,
        FromOne,
        example_values={"x": np.array([[1, 2], [3, 4]])},
    )
    assert "parts of the time" in note_of(made.load(served).notes)
    made.ask(served, [np.full((8, 2), 4)])
    log.replays.clear()
    ((y,),) = made.ask(served, [np.full((5, 2), 2)])
    assert y.tolist() == [[6.0, 8.0, 10.0]] * 5
    assert len(log.replays) == 1


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = mask[..., None].to(torch.float32)
        x = torch.nn.functional.embedding(ids, self.table) * kept
        return x.sum(1) / kept.sum(1).clamp(min=1), 2 * x


def test_lengths_have_buckets_too(log: Log, made: Pool) -> None:
    served = Model(
        "texts",
        "1",
        (TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1))),
        (TensorSpec("mean", "FP32", (-1, 4)), TensorSpec("each", "FP32", (-1, -1, 4))),
        4,
        Masked,
        batching_asked=True,
        ragged=Ragged((1, 1), (0, 0), (0, 1), 8, 32, mask=1),
    )
    report = made.load(served)
    assert "by rows x length 1x1: " in note_of(report.notes)
    assert report.joins
    log.replays.clear()
    items = []
    for length in (3, 2, 5):
        ids = np.random.default_rng(length).integers(1, 8, (1, length))
        items.append((ids, np.ones_like(ids)))
    for item, outputs in zip(items, made.ask(served, *items), strict=True):
        for got, wanted in zip(outputs, Masked()(*map(torch.from_numpy, item)), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5)
    assert len(log.replays) == 1  # of 4 rows, of length 8


def test_other_lengths_of_an_axis_have_no_graph(log: Log, made: Pool) -> None:
    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    spec = (TensorSpec("x", "FP32", (-1, -1)),)
    served = Model("m", "1", spec, spec, 4, Doubling, examples=((1, 5),))
    made.load(served)
    log.replays.clear()
    for length, replays in ((5, 1), (6, 1), (5, 2)):
        x = np.random.default_rng(0).random((2, length), np.float32)
        ((y,),) = made.ask(served, [x])
        np.testing.assert_array_equal(y, 2 * x)
        assert len(log.replays) == replays


def test_a_model_without_a_batch_axis_has_one_graph(log: Log, made: Pool) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(0)

    spec = (TensorSpec("x", "FP32", (4,)),)
    served = Model("m", "1", spec, spec, 0, Sum)
    made.load(served)
    assert len(log.captures) == DEPTH
    log.replays.clear()
    ((y,),) = made.ask(served, [np.ones(4, np.float32)])
    assert y.tolist() == [1, 2, 3, 4]
    assert len(log.replays) == 1


def capturing() -> bool:
    return bool(torch.cuda.is_current_stream_capturing())


class Asking(Network):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 1e9 else super().forward(x)


class Choosing(Network):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + y[y > 1e9].sum()


class Refused(Network):
    """Asks, where nobody looks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if capturing():
            torch.cuda.current_stream().synchronize()
        return super().forward(x)


class Raising(Network):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if capturing():
            raise SystemExit("not for capturing")
        return super().forward(x)


class Baked(Network):
    """Has a number in its graph that was right once."""

    def __init__(self) -> None:
        super().__init__()
        self.last: queue.SimpleQueue[float] = queue.SimpleQueue()  # which no trial takes for its state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if capturing():
            return super().forward(x) + 1.0
        return super().forward(x)


class Noisy(Network):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.rand_like(x)


class Counting(Network):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("factory", "why", "captures"),
    [
        (Asking, "a forward waits for values (aten.", 0),
        (Choosing, "a forward waits for values (aten.index.Tensor)", 0),
        (Refused, "AcceleratorError: CUDA error: operation not permitted when stream is capturing", 1),
        (Raising, "SystemExit: not for capturing", 1),
        (Baked, "its graph answers otherwise: output 'x'[", DEPTH),
        (Noisy, "its answers are drawn at random", 0),
        (Counting, "a forward writes, or one lane at a time calls it", 0),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is(
    log: Log, factory: Callable[[], torch.nn.Module], why: str, captures: int
) -> None:
    with pool() as made:
        served = model(factory)
        note = note_of(made.load(served).notes)
        assert note.startswith(f"graphs: none: {why}"), note
        assert len(log.captures) == captures
        log.replays.clear()
        x = np.full((3, 3), 0.5, np.float32)
        ((y,),) = made.ask(served, [x])
        if factory is not Noisy:
            np.testing.assert_allclose(y, expected(Network(), x), rtol=1e-4)
        assert not log.replays


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"format": "python"}, "its Python is to run for every batch"),
        ({"warm_up": ()}, "no answer of it is known to hold graphs against"),
    ],
)
def test_what_is_not_to_be_captured_says_so(log: Log, made: Pool, fields: dict[str, Any], why: str) -> None:
    assert note_of(made.load(model(Network, **fields)).notes) == f"graphs: none: {why}"
    assert not log.captures


def test_a_batch_that_comes_in_pieces_is_filled_up_too(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "MOST_PINNED", 4096)
    with pool() as made:
        served = model(lambda: torch.nn.Softmax(1), 400)
        assert "parts of the time" in note_of(made.load(served).notes)
        log.replays.clear()
        for rows in (8, 5, 7):
            x = np.random.default_rng(rows).random((rows, 400), np.float32)
            ((y,),) = made.ask(served, [x])
            np.testing.assert_allclose(y, expected(torch.nn.Softmax(1), x), rtol=1e-5)
        assert len(log.replays) == 3


def test_a_load_that_was_given_up_leaves_no_graphs(log: Log, made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    served, measure = model(Network), graphing._LaneTrial.measure

    def unload(trial: Any) -> Any:
        gains = measure(trial)
        made.executor._calls.forget(served.key)
        return gains

    monkeypatch.setattr(graphing._LaneTrial, "measure", unload)
    assert note_of(made.load(served).notes) == "graphs: none: the load was given up meanwhile"
    assert len(log.freed) == 4 * DEPTH


def test_a_capture_that_fails_ends_what_it_began(log: Log, made: Pool) -> None:
    made.load(model(Refused))
    ((_, used),) = log.captures
    assert log.ended == [used]
    made.load(model(Network, generation=1))  # the lane goes on capturing
    assert len(log.captures) == 1 + 4 * DEPTH


def test_what_has_no_memory_is_left_out(log: Log, made: Pool) -> None:
    class Large(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if capturing() and len(x) > 2:
                torch.empty(2**50, dtype=torch.uint8, device=x.device)
            return super().forward(x)

    served = model(Large)
    note = note_of(made.load(served).notes)
    assert note.endswith("; without: 8, 4 no memory is left"), note
    log.replays.clear()
    for rows, replays in ((8, 0), (3, 0), (2, 1)):
        made.ask(served, [np.ones((rows, 3), np.float32)])
        assert len(log.replays) == replays


def test_a_graph_that_is_slower_is_not_kept(log: Log, made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphing, "_AS_FAST", 1e-9)
    note = note_of(made.load(model(Network)).notes)
    assert note == "graphs: none: they gain nothing: 1, 2, 4, 8 not as fast"
    assert len(log.freed) == 4 * DEPTH


@pytest.mark.parametrize(
    ("small_us", "full_us", "wanted"),
    [
        (200, 400, 5),  # always faster
        (48, 148, 6.5),  # from the middle on: as long as 100 / 1.02
        (50, 90, None),
    ],
)
def test_a_bucket_is_used_from_where_its_graph_is_as_fast(
    small_us: float, full_us: float, wanted: float | None
) -> None:
    found = graphing.least_units(100, small_us, full_us, 5, 8)
    assert found == (wanted if wanted is None else pytest.approx(wanted, abs=0.05))


def test_batches_below_that_run_as_they_are(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(trial: Any) -> dict[graphs.Bucket, graphing.Gain]:
        least = {1: 1.0, 2: 2.0, 4: 4.0, 8: 7.0}
        return {bucket: graphing.Gain(12.5, 50.0, least[bucket.rows]) for bucket in trial._buckets}

    monkeypatch.setattr(graphing._LaneTrial, "measure", measure)
    with pool(lanes=2) as made:
        served = model(Network)
        report = made.load(served)
        assert note_of(report.notes).endswith("by rows 8: 0.25 (from 7), 4: 0.25 (from 4), 2: 0.25, 1: 0.25")
        assert report.costs == [(rows, 12.5) for rows in (1, 2, 4, 8)]
        for lane in (0, 1):
            log.replays.clear()
            for rows, replays in ((3, 0), (6, 0), (7, 1), (4, 2), (8, 3)):
                made.ask(served, [np.ones((rows, 3), np.float32)], lane=lane)
                assert len(log.replays) == replays, rows


@pytest.mark.parametrize("whose", ["the daemon's", "the model's"])
def test_graphs_can_be_turned_off(log: Log, whose: str) -> None:
    with pool(graphs=whose != "the daemon's") as made:
        report = made.load(model(Network, graphs=whose != "the model's"))
    assert not log.captures
    assert not any("graphs" in note for note in report.notes)


def test_a_variant_that_is_given_up_has_no_graphs_any_more(log: Log, made: Pool) -> None:
    served = model(Network)
    made.load(served)
    calls = made.executor._calls
    plain = Network().to("cuda:0")
    calls.install(served.key, calls.installed(served.key), lambda: plain)
    log.replays.clear()
    made.ask(served, [np.ones((2, 3), np.float32)])
    assert len(log.replays) == 1
    made.executor.give_up_variant(served.key)
    made.ask(served, [np.ones((2, 3), np.float32)])
    assert len(log.replays) == 1


def test_the_network_as_it_is_runs_without(log: Log, made: Pool) -> None:
    served = model(Network)
    made.load(served)
    log.replays.clear()
    asked = Execution(0, 0, served, [(np.ones((2, 3), np.float32),)], [2], (), plain=True)
    made.executor.submit(asked)
    made.answers(1)
    assert not log.replays


@only_pretended
def test_memory_is_not_given_back_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "_MEMORY_PERIOD_S", 0.005)
    asked = threading.Semaphore(0)

    def is_idle() -> bool:
        asked.release()
        return True

    with pool() as made:
        counts = active.machine.counts
        with accelerator.capturing:
            before = counts["empty_cache"]  # what was asked for earlier may have been done
            made.executor.accelerator.memory.give_back(is_idle)  # type: ignore[attr-defined]
            for _ in range(3):
                assert asked.acquire(timeout=60)
            assert counts["empty_cache"] == before
        while counts["empty_cache"] == before:
            assert asked.acquire(timeout=60)


def test_a_lane_that_is_busy_runs_without(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool(lanes=2) as made:
        busy = made.executor._lanes[1]
        call, measured = busy.call, graphing._LaneTrial.measure
        begun, go_on = threading.Event(), threading.Event()

        def hang(runner: Any) -> None:
            begun.set()
            go_on.wait(60)

        hanging = threading.Thread(target=call, args=(hang,))

        def measure(trial: Any) -> Any:
            hanging.start()
            assert begun.wait(60)
            monkeypatch.setattr(busy, "call", lambda function, _: call(function, 0.05))  # the other lane has its time
            return measured(trial)

        monkeypatch.setattr(graphing._LaneTrial, "measure", measure)
        try:
            report = made.load(model(Network))
        finally:
            go_on.set()
            hanging.join()
        assert "graphs: lane 1 has none: the lane has been busy for 0.05 s" in report.notes
        assert {name for name, _ in log.captures} == {"cuda:0/0"}


@only_pretended
def test_graphs_of_a_lost_device_are_never_freed(log: Log) -> None:
    with pool() as made:
        served = model(Network)
        made.load(served)
        active.machine.devices[0].lose()
        made.submit(served, [np.ones((2, 3), np.float32)])
        execution = made._done.get(timeout=60)
        assert execution.fatal
        made.executor._lanes[0].forget(served.key)
        with suppress(torch.AcceleratorError):  # which is told once the lane has come to it
            made.executor._lanes[0].call(lambda runner: None)
        assert not log.freed


# --- planted defects -------------------------------------------------------------------------------------------------


def one_graph_for_all_slots(planting: pytest.MonkeyPatch) -> None:
    """The next batch overwrites the outputs of the last one while they are copied."""

    def graph(self: ModelGraphs, slot: Any, bucket: graphs.Bucket) -> Any:
        return next((made for (_, other), made in self._graphs.items() if other == bucket), None)

    planting.setattr(ModelGraphs, "graph", graph)


def inputs_that_wait_for_nobody(planting: pytest.MonkeyPatch) -> None:
    """Inputs are written while the last replay may not have read its own."""
    one_graph_for_all_slots(planting)

    def run(self: graphs.Graph, inputs: Sequence[Any]) -> Any:
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given)
        torch.cuda.current_stream().wait_stream(beside)
        self._graph.replay()
        return [output.clone() for output in self._outputs]

    planting.setattr(graphs.Graph, "run", run)


@only_pretended
def test_planted_races_are_noticed(log: Log) -> None:
    with pool(policy="random") as made:
        served = model(Network)
        made.load(served)
        asked = batches(40)
        assert wrong_answers(made, served, asked) == 0
        for plant in (one_graph_for_all_slots, inputs_that_wait_for_nobody):
            with pytest.MonkeyPatch.context() as planting:
                plant(planting)
                assert wrong_answers(made, served, asked) > 0, plant.__doc__
        assert wrong_answers(made, served, asked) == 0


def test_filling_in_an_answer_is_noticed_when_it_is_loaded(made: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelGraphs, "cut", lambda self, outputs, size: [*outputs])
    note = note_of(made.load(model(Network)).notes)
    assert note.startswith("graphs: none: model 'm': output 'x' has shape [8, 3], not [5, 3]"), note


def test_captures_of_another_thread_would_be_noticed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = graphs._record

    def record(*arguments: Any) -> Any:
        found: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def work() -> None:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                found.put(recorded(*arguments))

        threading.Thread(target=work, name="another").start()
        return found.get(timeout=60)

    monkeypatch.setattr(graphs, "_record", record)
    with pytest.raises(AssertionError, match="another"):
        test_each_lane_captures_replays_and_frees_its_own_graphs(log)


@only_pretended
def test_a_daemon_tells_what_became_of_graphs(run_daemon: Callable[..., Daemon]) -> None:
    running = run_daemon("--model", "mlp", program=program())
    with Client(running.endpoint, timeout=60) as tnx:
        x = np.ones((3, 256), np.float32)
        answers = [tnx.predict(x, device=device).output for device in ("cuda:0", "cpu")]
        np.testing.assert_allclose(*answers, rtol=1e-4, atol=1e-5)
    shown = tool.run("models", "show", "mlp", "--host", running.endpoint, "--timeout", 60)
    assert "graphs: " in shown.stdout, shown.output
