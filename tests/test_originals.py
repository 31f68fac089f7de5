"""Functions of torch that code puts others in place of: found, named and put back; torch's own doing is left alone."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models import originals
from tnxd.models.process import Watch, settings_kept


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
]


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """When it first compiles, torch itself puts other functions in the places of some."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(2, 2))
    assert originals.put_back() == []


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    kept = contents()
    yield
    assert originals.put_back() == []
    assert contents() == kept


def contents() -> dict[str, dict[str, Any]]:
    owners = (torch, functional, torch.nn.init, torch.Tensor, torch.nn.Module, torch.nn.Linear, torch.nn.Embedding)
    return {str(owner): {name: value for name, value in vars(owner).items() if callable(value)} for owner in owners}


@pytest.mark.parametrize(("name", "replace"), REPLACED)
@pytest.mark.filterwarnings("ignore")  # they are torch's own
def test_what_is_replaced_is_named_and_put_back(name: str, replace: Callable[[], None]) -> None:
    replace()
    assert originals.put_back() == [name]


def test_a_step_that_replaces_something_has_failed() -> None:
    with (
        pytest.raises(FailedPrecondition, match=r"^importing net.py replaced torch.softmax, which all models use$"),
        settings_kept("importing net.py"),
    ):
        torch.softmax = other


def test_an_error_is_not_hidden_by_what_was_replaced_before() -> None:
    def fail() -> None:
        torch.softmax = other
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), settings_kept():
        fail()


def test_many_are_not_all_named() -> None:
    for name in ("relu", "gelu", "silu", "elu", "celu"):
        setattr(functional, name, other)
    names = originals.put_back()
    assert len(names) == 5
    assert originals.sentence("importing it", names) == (
        "importing it replaced torch.nn.functional.celu, torch.nn.functional.elu, torch.nn.functional.gelu and 2 more, "
        "which all models use"
    )


def test_what_was_replaced_before_a_step_is_not_held_against_it(caplog: pytest.LogCaptureFixture) -> None:
    torch.softmax = other
    with settings_kept():
        pass
    assert "replaced torch.softmax" in caplog.text


def test_the_watch_puts_back_too() -> None:
    watch = Watch()
    torch.softmax = other
    assert watch.look() == ["torch.softmax"]
    assert watch.look() == []


@pytest.mark.filterwarnings("ignore")
def test_what_torch_does_itself_is_left_alone() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    x = torch.ones(2, 2)
    with settings_kept():
        torch.compile(net, backend="eager")(x)
        torch.export.export(net, (x,))
        torch.fx.symbolic_trace(net)
        torch.jit.script(net)
        torch.jit.trace(net, x)
        torch.func.vmap(torch.sin)(x)
        torch.set_default_dtype(torch.float64)
    assert originals.put_back() == []


def test_names_that_are_added_are_left_alone() -> None:
    try:
        torch.more = torch.Tensor.more = torch.nn.Linear.more = other
        assert originals.put_back() == []
    finally:
        del torch.more, torch.Tensor.more, torch.nn.Linear.more


def test_it_takes_a_moment() -> None:
    began = time.perf_counter()
    for _ in range(20):
        originals.put_back()
    assert (time.perf_counter() - began) / 20 < 0.005
