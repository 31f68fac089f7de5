"""A datatype that model.toml asks for: how far its answers are from those in the datatype of the weights."""

from __future__ import annotations

import queue
import re
from collections.abc import Callable

import pytest
import torch

from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution
from tnxd.executors.pool import LanePool
from tnxd.models.formats.precision import Precision
from tnxd.models.model import Model

SPEC = (TensorSpec("x", "FP32", (-1, 64)),)


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.Linear(64, 64).requires_grad_(False).eval()


def notes(factory: Callable[[], torch.nn.Module], reference: Callable[[], torch.nn.Module] | None) -> tuple[str, ...]:
    done: queue.Queue[Execution] = queue.Queue()
    pool = LanePool(
        *("cpu", "cpu", ""),
        make_runner=CpuRunner,
        lanes=1,
        inline=None,
        memory_mb=lambda: (0.0, 0.0),
        on_done=done.put,
    )
    return pool.load(Model("m", "1", SPEC, SPEC, 4, factory, reference=reference)).notes


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0.1, 3.0), (torch.float32, 0.0, 0.0)])
def test_the_difference_is_measured(dtype: torch.dtype, least: float, most: float) -> None:
    (note,) = notes(lambda: Precision(network(), dtype, SPEC), network)
    found = re.fullmatch(r"dtype: answers differ by up to ([\d.]+)% of the largest value from .*", note)
    assert found is not None
    assert least <= float(found[1]) <= most


class Partly(torch.nn.Module):
    """A network whose answers are not finite for small inputs. Args: everywhere: nor for others."""

    def __init__(self, *, everywhere: bool = False) -> None:
        super().__init__()
        self.network = network()
        self._least = 1e9 if everywhere else 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.network(x)
        return torch.where(x.amax(1, keepdim=True) > self._least, answer, torch.nan)


def test_examples_for_which_the_reference_has_no_number_say_nothing() -> None:
    (note,) = notes(lambda: Precision(network(), torch.bfloat16, SPEC), Partly)
    found = re.fullmatch(r"dtype: answers differ by up to ([\d.]+)% of the largest value from .*", note)
    assert found is not None
    assert 0.1 <= float(found[1]) <= 3.0
    (note,) = notes(lambda: Precision(network(), torch.bfloat16, SPEC), lambda: Partly(everywhere=True))
    assert note == "dtype: not compared with the datatype of the weights: those give no number for any example"


def test_an_answer_that_is_no_number_in_the_other_datatype_is_named() -> None:
    class Overflowing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.network(x)
            return torch.cat([answer[:, :-1], answer[:, -1:] + 1e39], 1)

    (note,) = notes(lambda: Precision(Overflowing(), torch.float16, SPEC), network)
    assert note == "dtype: some answers are infinite or NaN, which those in the weights' own datatype are not"


def test_a_reference_that_cannot_be_built_keeps_nothing_from_being_served() -> None:
    def broken() -> torch.nn.Module:
        raise MemoryError("no room for two")

    (note,) = notes(lambda: Precision(network(), torch.bfloat16, SPEC), broken)
    assert note == "dtype: not compared with the datatype of the weights: MemoryError: no room for two"


def test_without_another_datatype_nothing_is_said() -> None:
    assert notes(network, None) == ()
