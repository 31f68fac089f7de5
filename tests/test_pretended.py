"""The pretended accelerator: what it promises, held against a real device where there is one."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._device import _device_constructors  # noqa: E402

from conftest import Daemon, start_daemon  # noqa: E402
from dealer import Dealer, rows  # noqa: E402
from pretended import POLICIES, order, pretended, program  # noqa: E402
from pretended.errors import Unpretended  # noqa: E402

REAL = torch.cuda.is_available()

needs_pretended = pytest.mark.skipif(REAL, reason="the real device does not do as it is told")


@pytest.fixture(params=["real"] if REAL else POLICIES)
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A device: a pretended one under each policy, or the real one."""
    with nullcontext() if REAL else pretended(policy=request.param, seed=1):
        yield torch.device("cuda:0")


@pytest.fixture
def late() -> Iterator[Any]:
    """A machine with two devices that do nothing before somebody waits."""
    with pretended(devices=2, memory_mb=64) as machine:
        yield machine


def pinned(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float32).pin_memory()


# --- what holds on every device ------------------------------------------------------------------------------------

NETWORKS = {
    "convolution": (
        lambda: torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU()),
            *(torch.nn.Conv2d(6, 6, 3, groups=6), torch.nn.MaxPool2d(2), torch.nn.AdaptiveAvgPool2d(1)),
        ),
        lambda: torch.randn(2, 3, 12, 12),
    ),
    "attention": (
        lambda: torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: torch.randn(2, 5, 8),
    ),
    "lstm": (lambda: torch.nn.LSTM(8, 6, batch_first=True), lambda: torch.randn(2, 5, 8)),
    "gru": (lambda: torch.nn.GRU(8, 6, batch_first=True), lambda: torch.randn(2, 5, 8)),
    "embedding": (lambda: torch.nn.EmbeddingBag(10, 4), lambda: torch.tensor([[1, 2], [3, 9]])),
}


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_as_on_the_cpu(device: Any, name: str) -> None:
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    network, x = build().eval(), example()
    with torch.inference_mode():
        expected = network(x)
        got = network.to(device)(x.to(device))
    for each, other in zip(
        *[value if isinstance(value, tuple) else (value,) for value in (got, expected)], strict=True
    ):
        if isinstance(each, torch.Tensor):
            assert each.device == device
            torch.testing.assert_close(each.cpu(), other, atol=1e-3, rtol=1e-3)


def test_values_that_decide_about_the_program_are_there(device: Any) -> None:
    x = torch.arange(-3.0, 4.0, device=device)
    assert (x > 0).sum().item() == 3
    assert x[x > 1].tolist() == [2.0, 3.0]
    assert x.nonzero().shape == (6, 1)
    assert torch.equal(x, x.clone())
    assert x[torch.tensor([1, -1])].tolist() == [-2.0, 3.0]
    assert bool(x.any())


def test_copies_share_what_their_originals_share(device: Any) -> None:
    network = torch.nn.ModuleList([torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False)])
    network[1].weight = network[0].weight
    network.to(device)
    assert network[0].weight is network[1].weight
    own = copy.deepcopy(network)
    assert own[0].weight.untyped_storage().data_ptr() == own[1].weight.untyped_storage().data_ptr()
    with torch.no_grad():
        own[0].weight.fill_(1)
    assert not torch.equal(own[0].weight, network[0].weight)


def test_work_of_several_streams_is_ordered_by_events(device: Any) -> None:
    side = torch.cuda.Stream(device)
    x = pinned(1, 2, 3)
    with torch.cuda.stream(side):
        there = x.to(device, non_blocking=True)
    torch.cuda.current_stream().wait_stream(side)
    there.record_stream(torch.cuda.current_stream())
    doubled = there * 2
    back = torch.empty(3, pin_memory=True)
    done = torch.cuda.Event(enable_timing=True, blocking=True)
    back.copy_(doubled, non_blocking=True)
    done.record()
    done.synchronize()
    assert back.tolist() == [2.0, 4.0, 6.0]
    assert done.query()
    assert back.is_pinned()
    assert not torch.empty(1).is_pinned()


def test_every_thread_has_a_current_stream_of_its_own(device: Any) -> None:
    stream = torch.cuda.Stream(device)
    torch.cuda.set_stream(stream)
    try:
        found = []
        thread = threading.Thread(target=lambda: found.append(torch.cuda.current_stream()))
        thread.start()
        thread.join()
        assert found == [torch.cuda.default_stream()]
        assert torch.accelerator.current_stream() == stream
    finally:
        torch.cuda.set_stream(torch.cuda.default_stream())


def test_times_need_events_that_are_over(device: Any) -> None:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with pytest.raises(ValueError, match="recorded"):
        first.elapsed_time(last)
    first.record()
    torch.ones(10, device=device)
    last.record()
    last.synchronize()
    assert first.elapsed_time(last) > 0
    with pytest.raises(ValueError, match="enable_timing"):
        first.elapsed_time(torch.cuda.Event())


def test_a_graph_is_replayed_on_the_same_memory(device: Any) -> None:
    stream = torch.cuda.Stream(device)
    x = torch.zeros(3, device=device)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        y = (x + 1) * 2
        graph.capture_end()
        for value in (1.0, 5.0):
            x.fill_(value)
            graph.replay()
            assert y.tolist() == [(value + 1) * 2] * 3


@pytest.mark.parametrize("wait", ["stream", "device", "item", "blocking copy"])
def test_a_capture_bears_no_wait(device: Any, wait: str) -> None:
    stream = torch.cuda.Stream(device)
    x = torch.zeros(3, device=device)
    host = torch.zeros(3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        y = x + 1
        with pytest.raises(RuntimeError):
            {
                "stream": stream.synchronize,
                "device": torch.cuda.synchronize,
                "item": lambda: y[0].item(),
                "blocking copy": lambda: host.copy_(y),
            }[wait]()
        with pytest.raises(RuntimeError):
            graph.capture_end()


def test_memory_is_counted(device: Any) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    torch.empty(1 << 20, dtype=torch.uint8, device=device)
    assert torch.cuda.memory_allocated() - before == kept.nbytes
    assert torch.cuda.max_memory_allocated() - before == 2 * kept.nbytes
    del kept
    assert torch.cuda.memory_allocated() == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 50, dtype=torch.uint8, device=device)


def test_seeds_say_what_is_drawn(device: Any) -> None:
    drawn = []
    for _ in range(2):
        torch.cuda.manual_seed(5)
        drawn.append(torch.randn(4, device=device) + torch.rand(4, device=device))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], torch.randn(4, device=device))


# --- what the pretended one makes of mistakes ----------------------------------------------------------------------


@needs_pretended
def test_nothing_is_done_before_somebody_waits(late: Any) -> None:
    x = pinned(1, 2)
    there = x.to("cuda:0", non_blocking=True)
    back = torch.empty(2, pin_memory=True)
    back.copy_(there, non_blocking=True)
    assert back.isnan().all()
    x.fill_(7)  # while a copy reads it
    torch.cuda.synchronize()
    assert back.tolist() == [7.0, 7.0]


@needs_pretended
def test_a_stream_that_does_not_wait_reads_what_is_not_there(late: Any) -> None:
    x = pinned(1, 2).to("cuda:0", non_blocking=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert (x * 2).cpu().isnan().all()


@needs_pretended
@pytest.mark.parametrize("recorded", [False, True])
def test_memory_that_another_stream_reads_is_taken_unless_it_is_recorded(late: Any, recorded: bool) -> None:
    x = torch.ones(4, device="cuda:0")
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        doubled = x * 2
    if recorded:
        x.record_stream(side)
    del x
    side.synchronize()
    assert doubled.cpu().isnan().all() != recorded


@needs_pretended
def test_new_memory_is_used_by_its_stream_before(late: Any) -> None:
    side = torch.cuda.Stream()
    one = torch.ones(4, device="cuda:0")  # something to do for the current stream
    new = torch.empty(4, device="cuda:0")
    with torch.cuda.stream(side):
        new.copy_(pinned(1, 2, 3, 4), non_blocking=True)
    side.synchronize()
    assert (new + one).isnan().all()


@needs_pretended
def test_random_orders_differ_by_their_seed() -> None:
    seen = set()
    for seed in range(10):
        with pretended(policy="random", seed=seed):
            x = pinned(1)
            there = x.to("cuda:0", non_blocking=True)
            x.fill_(2)
            seen.add(there.item())
    assert seen == {1.0, 2.0}


@needs_pretended
def test_a_poll_comes_to_an_end(late: Any) -> None:
    torch.ones(4, device="cuda:0")
    event = torch.cuda.Event()
    event.record()
    assert sum(1 for _ in iter(event.query, True)) < 10


@needs_pretended
def test_a_lost_device_says_so_and_the_other_works_on(late: Any) -> None:
    x, y = (torch.ones(2, device=f"cuda:{index}") for index in range(2))
    late.devices[0].lose(after=3)
    event = torch.cuda.Event()
    for _ in range(4):
        x = x * 2
    event.record()
    for call in (event.synchronize, event.query, x.cpu, torch.cuda.synchronize, lambda: x + 1, torch.cuda.mem_get_info):
        with pytest.raises(torch.AcceleratorError) as caught:
            call()
        assert caught.value.error_code == 719
    assert (y * 2).tolist() == [2.0, 2.0]


@needs_pretended
@pytest.mark.parametrize("index", [3, -1])
def test_an_index_out_of_range_is_the_end_of_the_device(late: Any, index: int) -> None:
    table = torch.nn.Embedding(3, 2, device="cuda:0")
    found = table(torch.tensor([index]).pin_memory().to("cuda:0", non_blocking=True))
    with pytest.raises(torch.AcceleratorError, match="device-side assert"):
        found.cpu()


@needs_pretended
def test_a_device_hangs_until_it_is_let_go(late: Any) -> None:
    late.devices[0].hang()
    x = torch.ones(2, device="cuda:0")
    waiting = threading.Thread(target=torch.cuda.synchronize, daemon=True)
    waiting.start()
    event = torch.cuda.Event()
    event.record()
    assert not any(event.query() for _ in range(20))
    assert waiting.is_alive()
    late.devices[0].release()
    waiting.join(60)
    assert not waiting.is_alive()
    assert x.tolist() == [1.0, 1.0]


@needs_pretended
def test_memory_runs_out_once_or_for_good(late: Any) -> None:
    memory = late.devices[1].memory
    memory.failing = 2
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.empty(1, device="cuda:1")
    torch.empty(1, device="cuda:1")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(65 << 20, dtype=torch.uint8, device="cuda:1")
    torch.cuda.set_per_process_memory_fraction(0.5, 1)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(33 << 20, dtype=torch.uint8, device="cuda:1")
    late.host.failing = 1
    with pytest.raises(torch.AcceleratorError) as caught:
        torch.empty(1, pin_memory=True)
    assert caught.value.error_code == 2


def test_an_event_of_a_capture_is_the_graphs(device: Any) -> None:
    stream, side = (torch.cuda.Stream(device) for _ in range(2))
    x = torch.zeros(2, device=device)
    torch.cuda.synchronize()
    graph, event = torch.cuda.CUDAGraph(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        x += 1
        event.record()
        side.wait_event(event)  # captured, too, from then on
        with torch.cuda.stream(side):
            x += 2
        stream.wait_stream(side)
        x += 3
        graph.capture_end()
        graph.replay()
        assert x.tolist() == [6.0, 6.0]
    for ask in (event.synchronize, event.query):
        with pytest.raises(RuntimeError):
            ask()


@needs_pretended
def test_a_global_capture_is_spoilt_by_another_thread(late: Any) -> None:
    for mode, bears in (("thread_local", True), ("global", False)):
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        errors: list[BaseException] = []

        def ask(errors: list[BaseException] = errors) -> None:
            event = torch.cuda.Event()
            event.record()
            try:
                event.synchronize()
            except RuntimeError as error:
                errors.append(error)

        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode=mode)
            other = threading.Thread(target=ask)
            other.start()
            other.join()
            with nullcontext() if bears else pytest.raises(torch.AcceleratorError):
                graph.capture_end()
        assert bool(errors) != bears


@needs_pretended
def test_outputs_of_a_graph_last_until_its_next_replay(late: Any) -> None:
    stream = torch.cuda.Stream()
    x = torch.zeros(2, device="cuda:0")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        y = x + 1
        graph.capture_end()
        graph.replay()
        host = torch.empty(2, pin_memory=True)
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            host.copy_(y, non_blocking=True)
        x.fill_(5)
        graph.replay()  # before that copy is done
        stream.synchronize()
    side.synchronize()
    assert host.tolist() == [6.0, 6.0]


@needs_pretended
def test_memory_of_a_graph_is_freed_with_it(late: Any) -> None:
    memory = late.devices[0].memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.ones(1 << 10, device="cuda:0") + 1
        graph.capture_end()
    torch.cuda.synchronize()
    assert (memory.allocated, memory.held) == (0, 2 << 12)
    del graph
    gc.collect()
    torch.cuda.synchronize()
    assert memory.held == 0


@needs_pretended
def test_what_torch_would_not_check_is_refused(late: Any) -> None:
    with pytest.raises(Unpretended, match="reads beyond"):
        torch.cuda.Event().record(torch.Stream("cuda:0"))
    torch.Event().record(torch.cuda.Stream())


@needs_pretended
def test_nothing_is_left_of_it() -> None:
    before = {
        name: getattr(owner, name) for owner, name in ((torch, "empty"), (torch, "Stream"), (torch.cuda, "Event"))
    }
    tensor = None
    with pretended():
        tensor = torch.ones(3, device="cuda:0")
        assert torch.empty is not before["empty"]
    assert (torch.empty, torch.Stream, torch.cuda.Event) == tuple(before.values())
    assert not torch.cuda.is_available()
    assert "to" not in vars(torch.Tensor)
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(3, device="cuda:0")
    del tensor


# --- daemons on it -------------------------------------------------------------------------------------------------


@needs_pretended
def test_a_daemon_takes_orders_about_its_devices(tmp_path: Path) -> None:
    control, config = tmp_path / "control", tmp_path / "tnxd.toml"
    config.write_text('devices = ["cuda:0"]\ncuda.graphs = false\n')  # which take no memory for a batch
    running: Daemon = start_daemon(tmp_path / "log", "--config", str(config), program=program(control=control))
    try:
        with Dealer(running.endpoint) as dealer:
            dealer.predict(rows(2), device="cuda:0")
            result, (output,) = dealer.result()
            assert result.device == "cuda:0"
            assert np.isfinite(output).all()
            assert order(control, "counts")["host_to_device"] > 0
            order(control, "fail_allocations", times=-1)
            dealer.predict(rows(2), device="cuda:0")
            assert dealer.error().code == "RESOURCE_EXHAUSTED"
    finally:
        running.discard()


def test_a_thread_that_outlives_its_machine_waits_on_that_one() -> None:
    with pretended(policy="late"):
        stream = torch.cuda.Stream()
    with pretended(policy="random"):
        event = torch.cuda.Event()
        event.record(stream)
        event.synchronize()
        assert event.query()


def test_factories_follow_a_default_device_afterwards() -> None:
    _device_constructors.cache_clear()  # as in a process in which nobody has had a default device yet
    with pretended(), torch.device("meta"):
        torch.empty(1)
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
