"""Runner of the CPU: the layout of weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lane_pools import execution, pool, served
from tnxctl.protocol.errors import TensorNextError
from tnxd.executors.cpu import CpuRunner, order_weights


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
def test_weights_of_linear_layers_are_stored_input_by_input() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4)).requires_grad_(False)
    example = torch.randn(3, 6)
    before, weight = net(example), net[0].weight.clone()
    ordered = order_weights(net)
    assert ordered[0].weight.t().is_contiguous()
    assert torch.equal(ordered[0].weight, weight)
    torch.testing.assert_close(ordered(example), before)


def test_weights_that_other_layers_use_keep_their_layout() -> None:
    net = torch.nn.Sequential(torch.nn.Embedding(5, 6), torch.nn.Linear(6, 5)).requires_grad_(False)
    net[1].weight = net[0].weight
    doubles = torch.nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    assert order_weights(net)[1].weight.is_contiguous()
    assert order_weights(doubles).weight.is_contiguous()


class Apart(torch.nn.Module):
    """Takes the weight of a layer apart, as attention with latent keys does. Args: take: gives its values."""

    def __init__(self, take: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.layer.weight.copy_(torch.tensor([[2.0, 2.0], [5.0, 7.0]]))
        self._take = take

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self._take(self.layer.weight)[:2]
        return x * first + second


@pytest.mark.parametrize("take", [lambda weight: weight.view(-1), lambda weight: weight.as_strided((4,), (1,))])
def test_a_weight_that_a_forward_takes_apart_keeps_its_layout(take: Callable[[torch.Tensor], torch.Tensor]) -> None:
    lanes, done = pool(1, CpuRunner, order_weights)
    model = served(lambda: Apart(take))
    report = lanes.load(model)
    assert (report.warmed, report.batches, report.notes) == (True, True, ())
    lanes.submit(execution(model, 0, 3.0))
    outcome = done.get(timeout=60).outcomes[0]
    assert not isinstance(outcome, TensorNextError)
    assert outcome[0].tolist() == [[8.0, 8.0]]
