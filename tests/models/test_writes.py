"""The writes of a module as its graph tells them: exported programs and TorchScript."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from format_tools import ask, open_model, save_program, tensors
from tnxd.models.formats import ignore_warnings_about_torch_itself
from tnxd.models.formats.writes import written, written_by_script, written_inputs

ROWS = Dim("rows", min=1, max=32)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    ignore_warnings_about_torch_itself()


class Holds(nn.Module):
    """Something to write to, in all the ways that there are; subclasses do it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.last: Tensor
        self.count: Tensor


class Copies(Holds):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.last
        self.last.copy_(x[0])
        return out


class WritesThroughViews(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.last.view(2, 2).t()[0].add_(1)
        self.count.unsqueeze(0).squeeze()[...] = 3
        return x


class SetsAnew(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.last + 1
        return x + self.last


class WritesToAWeight(Holds):
    def forward(self, x: Tensor) -> Tensor:
        self.inner.bias.data.mul_(0.5)
        return x


class WritesInLists(Holds):
    def forward(self, x: Tensor) -> Tensor:
        torch._foreach_add_([self.last, self.count], 1.0)
        return x


class WritesToOut(Holds):
    def forward(self, x: Tensor) -> Tensor:
        torch.add(x[0], 1, out=self.last)
        return x


class WritesThroughSplit(Holds):
    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.last.split(2)
        first.zero_()
        return x


class Pure(Holds):
    def forward(self, x: Tensor) -> Tensor:
        copy = self.last.clone()
        copy.add_(x[0])
        y = torch.zeros_like(x)
        y.copy_(x)
        return self.inner(y).relu_() + copy


def program(network: nn.Module) -> ExportedProgram:
    return torch.export.export(network.eval(), (torch.ones(2, 4),), dynamic_shapes=({0: ROWS},))


CASES: list[tuple[type[Holds], tuple[str, ...]]] = [
    (Copies, ("last",)),
    (WritesThroughViews, ("count", "last")),
    (SetsAnew, ("last",)),
    (WritesInLists, ("count", "last")),
    (WritesToOut, ("last",)),
    (WritesThroughSplit, ("last",)),
    (Pure, ()),
]


@pytest.mark.parametrize(("kind", "names"), CASES)
def test_what_a_program_writes_to(kind: type[Holds], names: tuple[str, ...]) -> None:
    exported = program(kind())
    assert written(exported) == names
    assert written(exported.run_decompositions()) == names  # where it is a result, and no operator any more


@pytest.mark.parametrize(("kind", "names"), [*CASES, (WritesToAWeight, ("inner.bias",))])
def test_what_torchscript_writes_to(kind: type[Holds], names: tuple[str, ...]) -> None:
    if kind is not WritesInLists:  # the compiler of TorchScript itself loses it
        assert written_by_script(torch.jit.script(kind().eval())) == names
    if kind not in (SetsAnew, WritesToAWeight):  # a trace loses it
        assert written_by_script(torch.jit.trace(kind().eval(), torch.ones(2, 4), check_trace=False)) == names


def test_batch_norm_writes_in_training_alone() -> None:
    network = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())
    assert written(program(network)) == ()
    assert written_by_script(torch.jit.script(network.eval())) == ()
    trained = torch.export.export(network.train(), (torch.ones(2, 4),))
    statistics = ("0.num_batches_tracked", "0.running_mean", "0.running_var")
    assert written(trained) == statistics
    assert written(trained.run_decompositions()) == statistics


class Branches(Holds):
    """Writes in a branch, in a loop, through what they return, and to attributes that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.kept = [torch.zeros(1)]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.sum() > 0:
            place = self.last
            self.kept.append(x)
        else:
            place = x
        for _ in range(2):
            place.add_(1)
            place = self.count
        return x


def test_writes_within_branches_and_loops_of_torchscript() -> None:
    assert written_by_script(torch.jit.script(Branches().eval())) == ("calls", "count", "kept", "last")


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(4))
        self.state: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.state.add_(x[0])
        return x + self.state


def test_a_write_within_an_inner_module_has_its_path() -> None:
    network = nn.Sequential(nn.Sequential(nn.ReLU(), Inner()), nn.ReLU())
    assert written(program(network)) == ("0.1.state",)
    assert written_by_script(torch.jit.script(network.eval())) == ("0.1.state",)


class UnderAutocast(Inner):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            self.state.add_(x[0])
            return x + self.state


def test_a_write_within_a_graph_of_its_own() -> None:
    exported = program(UnderAutocast())
    assert any(isinstance(part, torch.fx.GraphModule) for part in exported.graph_module.children())
    assert written(exported) == ("state",)


class WritesToInput(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.mul_(2) + y


def test_an_input_that_is_written_to_is_the_programs_own_copy(tmp_path: Path) -> None:
    network = WritesToInput()
    exported = torch.export.export(network, (torch.ones(2, 4), torch.ones(2, 4)))
    assert (written(exported), written_inputs(exported)) == ((), (0,))
    save_program(tmp_path / "net/1/model.pt2", network, (torch.ones(2, 4), torch.ones(2, 4)))
    model = open_model(tmp_path)
    assert model.writes == ()
    x = torch.ones(2, 4)
    (out,) = model.factory()(x, torch.ones(2, 4))
    assert torch.equal(out, torch.full((2, 4), 3.0))
    assert torch.equal(x, torch.ones(2, 4))


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_that_writes_opens_and_does_as_its_module_did(tmp_path: Path, decomposed: bool) -> None:
    exported = program(Copies())
    path = tmp_path / "net/1/model.pt2"
    path.parent.mkdir(parents=True)
    torch.export.save(exported.run_decompositions() if decomposed else exported, path)
    model = open_model(tmp_path)
    assert model.writes == ("last",)
    module = model.factory()
    first, second = (ask(model, module, np.full((1, 4), value, np.float32))["output"] for value in (5.0, 1.0))
    assert (first[0, 0], second[0, 0]) == (5.0, 6.0)
    held: Any = module
    assert torch.equal(dict(module.named_buffers())[held.held["last"]], torch.ones(4))


def test_torchscript_says_what_it_writes_to(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    torch.jit.save(torch.jit.script(Copies().eval()), tmp_path / "net/1/model.pt")
    model = open_model(tmp_path, tensors("x", "FP32", [-1, 4]) + tensors("y", "FP32", [-1, 4], "outputs"))
    assert model.writes == ("last",)
