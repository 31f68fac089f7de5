"""The CUDA path: on a real device where there is one, as `make gpu-check` runs it, else on a pretended one."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import Daemon  # noqa: E402
from dealer import Dealer, rows  # noqa: E402
from pretended import POLICIES, pretended, program  # noqa: E402
from tnxctl.protocol.errors import TensorNextError  # noqa: E402
from tnxctl.protocol.wire import TensorSpec  # noqa: E402
from tnxd.config import Config  # noqa: E402
from tnxd.executors.devices import open_devices  # noqa: E402
from tnxd.executors.execution import Execution  # noqa: E402
from tnxd.executors.pool import LanePool  # noqa: E402
from tnxd.models.builtin import BUILTIN  # noqa: E402
from tnxd.models.model import Model  # noqa: E402

REAL = torch.cuda.is_available()


@pytest.fixture(scope="module", params=["real"] if REAL else POLICIES)
def policy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def opened(policy: str) -> Iterator[tuple[LanePool, queue.Queue[Execution]]]:
    done: queue.Queue[Execution] = queue.Queue()
    with nullcontext() if policy == "real" else pretended(policy=policy):
        devices = open_devices(Config(devices=("cuda:0",)), done.put)
        assert not devices.failures
        yield devices.executors["cuda:0"], done


def execution(model: Model, *items: np.ndarray, lane: int = 0) -> Execution:
    counts = [len(item) for item in items]
    return Execution(lane, 0, model, [(item,) for item in items], counts, ())


def outputs(finished: Execution) -> list[np.ndarray]:
    for outcome in finished.outcomes:
        assert not isinstance(outcome, TensorNextError), outcome
    return [outcome[0] for outcome in finished.outcomes]


def test_both_lanes_agree_with_plain_torch(opened: tuple[LanePool, queue.Queue[Execution]]) -> None:
    pool, done = opened
    model = BUILTIN["mlp"]
    pool.load(model)
    reference = model.factory()
    generator = np.random.default_rng(0)
    sent = [generator.random((1 + index % 64, 256), np.float32) for index in range(40)]
    for index, x in enumerate(sent):
        pool.submit(execution(model, x[: len(x) // 2], x[len(x) // 2 :], lane=index % 2))
    seen = 0
    for _ in sent:
        finished = done.get(timeout=60)
        got = np.concatenate(outputs(finished))
        expected = reference(torch.from_numpy(np.concatenate([item[0] for item in finished.items]))).detach().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-3)
        assert min(finished.h2d_us, finished.latency_us, finished.d2h_us) > 0
        assert finished.memory_free_mb > 0
        total = finished.gather_us + finished.h2d_us + finished.compute_us + finished.d2h_us
        assert total == pytest.approx((finished.finished_ns - finished.started_ns) / 1e3)
        seen += 1
    assert seen == len(sent)


def test_outputs_survive_later_batches(opened: tuple[LanePool, queue.Queue[Execution]]) -> None:
    pool, done = opened
    spec = (TensorSpec("x", "FP32", (-1, 100_000)),)
    model = Model("copy", "1", spec, spec, 4, torch.nn.Identity)
    pool.load(model)
    kept = []
    for value in range(20):
        pool.submit(execution(model, np.full((1, 100_000), value, np.float32)))
        kept.append(outputs(done.get(timeout=60))[0])
    assert (
        [float(array.min()) for array in kept] == [float(array.max()) for array in kept] == list(map(float, range(20)))
    )


def test_running_out_of_memory_fails_the_request_alone(opened: tuple[LanePool, queue.Queue[Execution]]) -> None:
    pool, done = opened

    class Greedy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wanted = int(x.max().item())
            torch.empty(wanted * 2**40, dtype=torch.uint8, device=x.device)
            return x

    spec = (TensorSpec("x", "FP32", (-1, 1)),)
    model = Model("greedy", "1", spec, spec, 8, Greedy)
    pool.load(model)
    pool.submit(execution(model, *[np.full((1, 1), value, np.float32) for value in (0, 1, 0, 0)]))
    finished = done.get(timeout=60)
    codes = [getattr(outcome, "code", "ok") for outcome in finished.outcomes]
    assert codes == ["ok", "RESOURCE_EXHAUSTED", "ok", "ok"]
    assert (finished.fatal, finished.exhausted, finished.safe_rows) == ("", True, 2)


def test_a_request_too_large_for_memory_runs_in_parts(opened: tuple[LanePool, queue.Queue[Execution]]) -> None:
    pool, done = opened
    mib = 2**20

    class Hungry(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            workspace = torch.empty(len(x) * 128 * mib, dtype=torch.uint8, device=x.device)
            return x * 2 + workspace[:0].sum()

    spec = (TensorSpec("x", "FP32", (-1, 1)),)
    model = Model("hungry", "1", spec, spec, 8, Hungry)
    pool.load(model)
    rows_of = [np.full((1, 1), value, np.float32) for value in range(8)]
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(0)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 600 * mib) / total, 0)
    try:
        for items in (rows_of, [np.concatenate(rows_of)]):
            pool.submit(execution(model, *items))
            finished = done.get(timeout=60)
            np.testing.assert_array_equal(np.concatenate(outputs(finished)), np.concatenate(rows_of) * 2)
            assert (finished.fatal, finished.exhausted, finished.safe_rows) == ("", True, 4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_the_daemon_prefers_the_gpu_and_says_why(run_daemon: Callable[..., Daemon]) -> None:
    running = run_daemon() if REAL else run_daemon(program=program(policy="random"))
    with Dealer(running.endpoint) as dealer:
        report = dealer.health()
        assert report.cuda_available
        assert report.current_device.startswith("cuda:")
        assert report.gpu_memory_free_mb > 0
        answers = {}
        for options in ({}, {"prefer_gpu": False}, {"min_gpu_memory_mb": 1e9}):
            dealer.predict(rows(4), **options)
            result, (output,) = dealer.result()
            answers[result.device.split(":")[0]] = output
            if options:
                assert result.device == "cpu"
            else:
                assert result.device.startswith("cuda:")
                assert result.gpu_memory_mb > 0
                assert result.timing.h2d_us > 0
        np.testing.assert_allclose(answers["cuda"], answers["cpu"], atol=1e-3)
