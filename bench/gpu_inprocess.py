"""Plain torch on a GPU, as a child of `gpu.py`: `python bench/gpu_inprocess.py SIZE`.

First it prints a line about the device, as JSON. Each line of stdin asks for one measurement, an `Asked`, and is
answered by a line, a `Found`. What fails is an answer, too: the next measurement may work.

    forward     one batch after the other, each waited for: what copies and forward take on the device
    pipeline    batches as a good program of its own would run them: pinned memory, copies on streams of their own, and
                the next batches under way while one computes
    answer      the output for the example, to be compared with the daemon's

Two modes: the forward is called, or a CUDA graph of it is replayed.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec
import torch
from torch import Tensor, nn

from gpu_networks import FLOAT32, Network, sized

SLOTS = 3
"""Batches under way in a pipeline."""

_WARM = 3
"""Forwards before one is captured or timed: libraries choose their kernels, the allocator gets its memory."""


class Asked(msgspec.Struct, frozen=True):
    """One measurement. Attributes: how: see above. seconds: that it takes. graph: whether a graph is replayed."""

    network: str
    rows: int
    how: str
    graph: bool
    seconds: float


class Found(msgspec.Struct, frozen=True):
    """Measurement of one network. Times are medians, in microseconds.

    Attributes:
        h2d_us, forward_us, d2h_us: between events on the device's stream. wall_us: of a whole batch, by the clock.
        rows_per_s: of a pipeline. output: of an answer, row by row. error: what went wrong, in words, if anything did.
    """

    h2d_us: float = 0.0
    forward_us: float = 0.0
    d2h_us: float = 0.0
    wall_us: float = 0.0
    rows_per_s: float = 0.0
    output: list[float] = []
    error: str = ""


class About(msgspec.Struct, frozen=True):
    """The device and what drives it."""

    device: str
    memory_mib: float
    torch: str
    cuda: str
    cudnn: str


class Slot:
    """A batch's memory: pinned on the host, and on the device. With a graph, that reads and writes just there."""

    def __init__(self, net: nn.Module, sources: Sequence[Tensor], stream: torch.cuda.Stream, graph: bool) -> None:
        self._net = net
        self._sources = sources
        self._stream = stream
        self._pinned = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in sources]
        self._inputs = [torch.empty(each.shape, dtype=each.dtype, device="cuda") for each in sources]
        self.fill()
        with torch.cuda.stream(stream):
            self.send()
            for _ in range(_WARM):
                self.output = net(*self._inputs)
        stream.synchronize()
        self.host = torch.empty(self.output.shape, dtype=self.output.dtype, pin_memory=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(stream):
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.output = net(*self._inputs)
                except BaseException:
                    with contextlib.suppress(RuntimeError):  # that the capture has failed is known
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
        self.ready, self.done, self.back = (_event() for _ in range(3))

    def fill(self) -> None:
        """Put the inputs into the pinned memory."""
        for pinned, source in zip(self._pinned, self._sources, strict=True):
            pinned.copy_(source)

    def send(self) -> None:
        """Have them copied to the device, on the current stream."""
        for tensor, pinned in zip(self._inputs, self._pinned, strict=True):
            tensor.copy_(pinned, non_blocking=True)

    def run(self) -> None:
        """Have the forward run, on the current stream."""
        if self._graph is None:
            self.output = self._net(*self._inputs)
        else:
            self._graph.replay()

    def fetch(self) -> None:
        """Have the output copied to the host, on the current stream."""
        self.host.copy_(self.output, non_blocking=True)


class Bench:
    """All measurements. Args: size: of the networks."""

    def __init__(self, size: str) -> None:
        self._networks = sized(size)
        self._built: dict[str, nn.Module] = {}
        self._streams = [torch.cuda.Stream() for _ in range(3)]  # type: ignore[no-untyped-call]

    def measure(self, asked: Asked) -> Found:
        """Measure once. Never raises."""
        try:
            network = self._networks[asked.network]
            measurement: Callable[[Asked, Callable[[], Slot]], Found] = getattr(self, f"_{asked.how}")
            net = self._net(asked.network, network)
            sources = [torch.from_numpy(array) for array in network.example(asked.rows).values()]
            return measurement(asked, lambda: Slot(net, sources, self._streams[1], asked.graph))
        except Exception as error:  # of a driver: it is told, and the next one may work
            return Found(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def _net(self, name: str, network: Network) -> nn.Module:
        if name not in self._built:
            net = network.build()
            if network.dtype != FLOAT32:
                net = net.to(getattr(torch, network.dtype))
            self._built[name] = net.to("cuda")
        return self._built[name]

    def _forward(self, asked: Asked, make: Callable[[], Slot]) -> Found:
        slot, stream = make(), self._streams[1]
        events = [_event(timing=True) for _ in range(4)]
        times: list[tuple[float, ...]] = []
        with torch.cuda.stream(stream):
            until = time.perf_counter() + asked.seconds
            while not times or time.perf_counter() < until:
                began = time.perf_counter()
                slot.fill()
                events[0].record(stream)
                slot.send()
                events[1].record(stream)
                slot.run()
                events[2].record(stream)
                slot.fetch()
                events[3].record(stream)
                events[3].synchronize()
                wall = 1e6 * (time.perf_counter() - began)
                on_device = [1e3 * first.elapsed_time(last) for first, last in pairwise(events)]
                times.append((*on_device, wall))
        h2d_us, forward_us, d2h_us, wall_us = [_median(each) for each in zip(*times, strict=True)]
        return Found(h2d_us, forward_us, d2h_us, wall_us)

    def _pipeline(self, asked: Asked, make: Callable[[], Slot]) -> Found:
        slots = [make() for _ in range(SLOTS)]
        to_device, compute, to_host = self._streams
        number, counted = 0, 0
        began = until = 0.0
        while True:
            slot = slots[number % SLOTS]
            if number >= SLOTS:
                slot.back.synchronize()  # its batch is over: its memory may be written
                now = time.perf_counter()
                if number == 2 * SLOTS:  # from nothing under way to a steady state
                    began, until = now, now + asked.seconds
                elif number > 2 * SLOTS:
                    counted += 1
                    if now >= until:
                        break
            slot.fill()
            with torch.cuda.stream(to_device):
                slot.send()
                slot.ready.record(to_device)
            with torch.cuda.stream(compute):
                compute.wait_event(slot.ready)
                slot.run()
                slot.done.record(compute)
            with torch.cuda.stream(to_host):
                to_host.wait_event(slot.done)
                slot.fetch()
                slot.back.record(to_host)
            number += 1
        torch.cuda.synchronize()  # no memory goes while something is under way
        return Found(rows_per_s=counted * asked.rows / (now - began))

    def _answer(self, asked: Asked, make: Callable[[], Slot]) -> Found:
        slot, stream = make(), self._streams[1]
        with torch.cuda.stream(stream):
            slot.send()
            slot.run()
            slot.fetch()
        stream.synchronize()
        return Found(output=slot.host.float().flatten().tolist())


def _event(*, timing: bool = False) -> torch.cuda.Event:
    """An event that a thread waits for without using a core."""
    return torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).median())


def about() -> About:
    """The first device."""
    return About(
        torch.cuda.get_device_name(0),
        torch.cuda.mem_get_info(0)[1] / 2**20,
        str(torch.__version__),
        str(torch.version.cuda),
        str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
    )


def main() -> None:
    print(msgspec.json.encode(about()).decode(), flush=True)
    bench = Bench(sys.argv[1])
    with torch.inference_mode():
        for line in sys.stdin:
            found = bench.measure(msgspec.json.decode(line, type=Asked))
            print(msgspec.json.encode(found).decode(), flush=True)


if __name__ == "__main__":
    main()
