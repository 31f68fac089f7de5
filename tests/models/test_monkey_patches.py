"""Monkey patches of torch: found, named and undone; torch's own are left alone."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.process_state import monkey_patches
from tnxd.models.process_state.drift import DriftMonitor
from tnxd.models.process_state.restoration import settings_restored


def other(*_: Any, **__: Any) -> None:
    """In place of anything."""


@functools.wraps(torch.nn.functional.relu)
def disguised(*_: Any, **__: Any) -> None:
    """With the name and the module of torch's own."""


class Other:
    def __call__(self, *_: Any) -> None:
        """In place of anything."""


def put(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


REPLACED = [
    ("torch.nn.functional.relu", put(functional, "relu", other)),
    ("torch.nn.functional.relu", put(functional, "relu", disguised)),
    ("torch.nn.functional.relu", put(functional, "relu", functools.partial(other))),
    ("torch.nn.functional.relu", put(functional, "relu", Other())),
    ("torch.nn.functional.relu", put(functional, "relu", functional.gelu)),
    ("torch.nn.functional.relu", put(functional, "relu", torch.no_grad()(other))),
    ("torch.nn.functional.relu", lambda: setattr(functional, "relu", torch.compile(other, backend="eager"))),
    ("torch.nn.functional.relu", put(functional, "relu", None)),
    ("torch.nn.functional.relu", lambda: delattr(functional, "relu")),
    ("torch.softmax", put(torch, "softmax", other)),
    ("torch.nn.init.zeros_", put(torch.nn.init, "zeros_", other)),
    ("torch.linalg.inv", put(torch.linalg, "inv", other)),
    ("torch.Tensor.backward", put(torch.Tensor, "backward", other)),
    ("torch.Tensor.add", put(torch.Tensor, "add", other)),  # of its base class
    ("torch.Tensor.T", put(torch.Tensor, "T", property(other))),
    ("torch.nn.Linear.forward", put(torch.nn.Linear, "forward", other)),
    ("torch.nn.Linear.__call__", put(torch.nn.Linear, "__call__", other)),
    ("torch.nn.Module.__call__", put(torch.nn.Module, "__call__", other)),
    ("torch.nn.Module.to", put(torch.nn.Module, "to", staticmethod(other))),
    ("torch.nn.Embedding.from_pretrained", put(torch.nn.Embedding, "from_pretrained", classmethod(other))),
    ("torch.nn.LSTM", put(torch.nn, "LSTM", Other)),
    ("time.perf_counter", put(time, "perf_counter", other)),
    ("threading.get_ident", put(threading, "get_ident", time.monotonic)),
]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """Compile something: torch itself puts other functions in the places of some when it first does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(2, 2))
    assert monkey_patches.undo() == []


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    kept = contents()
    yield
    assert monkey_patches.undo() == []
    assert contents() == kept


def contents() -> dict[str, dict[str, Any]]:
    owners = (
        torch,
        functional,
        torch.nn.init,
        torch.Tensor,
        torch.nn.Module,
        torch.nn.Linear,
        torch.nn.Embedding,
        time,
        threading,
    )
    return {str(owner): {name: value for name, value in vars(owner).items() if callable(value)} for owner in owners}


@pytest.mark.parametrize(("name", "replace"), REPLACED)
@pytest.mark.filterwarnings("ignore")  # they are torch's own
def test_patch_is_named_and_undone(name: str, replace: Callable[[], None]) -> None:
    replace()
    assert monkey_patches.undo() == [name]


def test_step_that_patches_torch_fails() -> None:
    with (
        pytest.raises(FailedPrecondition, match=r"^importing net.py replaced torch.softmax, which all models use$"),
        settings_restored("importing net.py"),
    ):
        torch.softmax = other


def test_error_of_a_step_is_not_hidden_by_its_patches() -> None:
    def fail() -> None:
        torch.softmax = other
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), settings_restored():
        fail()


def test_sentence_names_three_patches_and_counts_the_others() -> None:
    for name in ("relu", "gelu", "silu", "elu", "celu"):
        setattr(functional, name, other)
    names = monkey_patches.undo()
    assert len(names) == 5
    assert monkey_patches.sentence("importing it", names) == (
        "importing it replaced torch.nn.functional.celu, torch.nn.functional.elu, torch.nn.functional.gelu and 2 more, "
        "which all models use"
    )


def test_patch_before_a_step_is_not_held_against_it(caplog: pytest.LogCaptureFixture) -> None:
    torch.softmax = other
    with settings_restored():
        pass
    assert "replaced torch.softmax" in caplog.text


def test_drift_monitor_undoes_patches() -> None:
    monitor = DriftMonitor()
    torch.softmax = other
    assert monitor.restore() == ["torch.softmax"]
    assert monitor.restore() == []


@pytest.mark.filterwarnings("ignore")
def test_patches_by_torch_itself_are_left_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    x = torch.ones(2, 2)
    with settings_restored():
        torch.compile(net, backend="eager")(x)
        torch.export.export(net, (x,))
        torch.fx.symbolic_trace(net)
        torch.jit.script(net)
        torch.jit.trace(net, x)
        torch.func.vmap(torch.sin)(x)
        torch.set_default_dtype(torch.float64)
    assert monkey_patches.undo() == []


def test_added_names_are_left_alone() -> None:
    try:
        torch.more = torch.Tensor.more = torch.nn.Linear.more = other
        assert monkey_patches.undo() == []
    finally:
        del torch.more, torch.Tensor.more, torch.nn.Linear.more


def test_undo_compares_no_names_one_by_one_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[object] = []
    monkeypatch.setattr(monkey_patches._Namespace, "_found", lambda self: looked.append(self) or iter(()))
    torch.softmax, kept = other, torch.softmax
    monkey_patches.undo()
    torch.softmax = kept
    assert len(looked) == 1
    monkey_patches.undo()
    looked.clear()
    assert monkey_patches.undo() == []
    assert looked == []
