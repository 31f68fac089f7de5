"""Substitutes: variants in the place of networks, which answer whatever the variant may answer otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.executors.cpu import CpuRunner
from tnxd.executors.execution import Execution
from tnxd.executors.runner_calls import RunnerCalls
from tnxd.executors.substitute import Substitute
from tnxd.models.model import Model

CPU = torch.device("cpu")


class Answers(torch.nn.Module):
    """Answers full of a number, or raises. Args: raises: what."""

    def __init__(self, number: float, raises: BaseException | None = None) -> None:
        super().__init__()
        self.number = number
        self.raises = raises

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises is not None:
            raise self.raises
        return torch.full_like(x, self.number)


def answered(x: torch.Tensor, raises: BaseException | None = None, device: str = "cpu") -> float:
    """The number that comes first of what a substitute answers: 1 from the variant, 2 from the network."""
    found: torch.Tensor = Substitute(Answers(1, raises), Answers(2), torch.device(device))(x)
    return float(found.flatten()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_the_variant_answers_usual_values(dtype: torch.dtype) -> None:
    assert answered(torch.full((300, 300), 100.0).to(dtype)) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_the_network_answers_values_that_are_no_numbers(value: float) -> None:
    x = torch.ones(4, 3)
    x[2] = value
    assert answered(x) == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32])
def test_the_network_answers_whole_numbers_that_fp32_cannot_hold(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 3, dtype=dtype)
    x[2] = 1 << 24
    assert answered(x) == 1
    x[2] = (1 << 24) + 1
    assert answered(x) == 2
    if dtype.is_signed:
        assert answered(-x) == 2


def test_the_network_answers_where_there_is_nothing_in_an_input() -> None:
    calls: list[str] = []

    def noting(name: str) -> torch.nn.Module:
        module = Answers(0)
        module.register_forward_pre_hook(lambda *_: calls.append(name))
        return module

    Substitute(noting("variant"), noting("network"), CPU)(torch.ones(2, 0))
    assert calls == ["network"]


@pytest.mark.parametrize("error", [InvalidArgument("too long"), IndexError("out of range"), RuntimeError("no")])
def test_the_network_answers_what_the_variant_refuses(error: Exception) -> None:
    assert answered(torch.ones(1, 1), error) == 2


def test_the_network_says_what_is_wrong_with_a_request() -> None:
    both = Substitute(Answers(0, InvalidArgument("mine")), Answers(0, ValueError("of the network")), CPU)
    with pytest.raises(ValueError, match="of the network"):
        both(torch.ones(1, 1))


def test_what_may_be_the_end_of_a_device_is_not_tried_again_there() -> None:
    with pytest.raises(RuntimeError, match="asserted"):
        answered(torch.ones(1, 1), RuntimeError("device-side asserted"), "cuda")
    assert answered(torch.ones(1, 1), InvalidArgument("too long"), "cuda") == 2


def test_memory_that_is_out_is_no_other_answer() -> None:
    with pytest.raises(MemoryError):
        answered(torch.ones(1, 1), MemoryError())


def test_a_runner_asks_the_network_for_what_is_plain_and_when_the_variant_is_given_up() -> None:
    specs = (TensorSpec("x", "FP32", (-1, 2)),)
    model = Model("net", "1", specs, specs, 8, lambda: Answers(0))
    calls, runners = RunnerCalls(lambda: None), [CpuRunner(), CpuRunner()]
    calls.add(runners[0])
    calls.install(model.key, lambda: Answers(1), lambda: Answers(2))
    calls.add(runners[1])

    def ask(plain: bool) -> list[float]:
        found = []
        for runner in runners:
            execution = Execution(0, 0, model, [(np.zeros((1, 2), "f4"),)], [1], (), plain=plain)
            runner.run(execution)
            (outputs,) = execution.outcomes
            assert isinstance(outputs, tuple)
            found.append(float(outputs[0][0, 0]))
        return found

    assert (ask(False), ask(True)) == ([1, 1], [2, 2])
    calls.give_up_variant(model.key)
    assert (ask(False), ask(True)) == ([2, 2], [2, 2])
    calls.install(model.key, lambda: Answers(3))
    assert (ask(False), ask(True)) == ([3, 3], [3, 3])
    calls.forget(model.key)
    assert [runner.plain_calls for runner in runners] == [{}, {}]
