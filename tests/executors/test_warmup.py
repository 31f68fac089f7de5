"""Warm-up: the sizes of its batches, what ends it, and what it finds about rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from lane_pools import Small, drain, pool
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.host import Peak
from tnxd.executors.trial.warmup import warm_up_sizes
from tnxd.models.model import Model


def test_warm_up_covers_every_power_of_two_and_the_limit() -> None:
    assert warm_up_sizes(0) == [1]
    assert warm_up_sizes(1) == [1]
    assert warm_up_sizes(8) == [1, 2, 4, 8]
    assert warm_up_sizes(12) == [1, 2, 4, 8, 12]


class Frugal(CpuRunner):
    """Has 1,024 MiB of memory left, and sees each row take 20."""

    def __init__(self, small: Small) -> None:
        super().__init__()
        self.small = small

    def memory_left(self) -> int:
        return 1024 * 2**20

    @contextlib.contextmanager
    def measured(self) -> Iterator[Peak]:
        peak = Peak()
        drain(self.small.seen)
        yield peak
        peak.nbytes = 20 * 2**20 * self.small.calls[0]


@pytest.mark.parametrize(("lanes", "most"), [(1, 8), (2, 4), (16, 1)])
def test_a_warm_up_ends_where_a_batch_would_take_too_much_of_the_memory(lanes: int, most: int) -> None:
    """A row takes 20 MiB; of 1,024, a quarter may be taken by all lanes together."""
    small = Small(64)
    made, _ = pool(lanes, lambda: Frugal(small))
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    report = made.load(Model("m", "1", spec, spec, 64, lambda: small))
    assert (report.most_rows, report.safe_rows, [rows for rows, _ in report.costs][-1]) == (most, 0, most)


@pytest.mark.parametrize(("sizes", "run"), [(None, [1, 2, 4]), ((1, 3), [1, 3]), ((), [])])
def test_a_warm_up_runs_the_configured_sizes(sizes: tuple[int, ...] | None, run: list[int]) -> None:
    made, _ = pool(1, CpuRunner)
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    report = made.load(Model("m", "1", spec, spec, 4, torch.nn.Identity, warm_up=sizes))
    assert report.warmed
    assert report.batches
    assert [rows for rows, _ in report.costs] == run


class FromEleven(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0) if len(x) > 10 else x


class Experts(torch.nn.Module):
    """Two experts that take the first four rows each that choose them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.nn.functional.one_hot((x[:, 0] > x[:, 1]).long(), 2)
        place = (chosen.cumsum(0) * chosen).sum(1)
        return x * (place <= 4)[:, None]


class LastHalf(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:40], x[40:] - x[40:].mean(0)]) if len(x) > 40 else x


@pytest.mark.parametrize("network", [FromEleven, Experts, LastHalf])
@pytest.mark.parametrize("asked", [False, True])
def test_rows_that_mix_in_large_batches_alone_are_found_by_the_warm_up(
    network: type[torch.nn.Module], asked: bool
) -> None:
    made, _ = pool(1, CpuRunner)
    spec = (TensorSpec("x", "FP32", (-1, 2)),)
    served = Model("m", "1", spec, spec, 64, network, batching_asked=asked)
    if asked:
        with pytest.raises(
            FailedPrecondition, match=r"axis 0 does not count rows: alone and in a batch of (8|16|64), output"
        ):
            made.load(served)
    else:
        report = made.load(served)
        assert (report.batches, [rows for rows, _ in report.costs]) == (False, [1])
        assert "alone and in a batch of " in report.notes[0]
