"""Models that need a library beside torch."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

from format_tools import ask, open_model, refused, save_program, tensors
from tnxd.models.formats import ignore_warnings_about_torch_itself, libraries

LIBRARY = """
import collections, torch
from torch.utils import _pytree as pytree

library = torch.library.Library("tnxtest", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")

class Output(collections.OrderedDict):
    pass

pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(zip(names, values)),
    serialized_type_name="tnxtest_library.Output",
)

class Net(torch.nn.Module):
    def forward(self, x):
        return Output(y=torch.ops.tnxtest.twice(x))
"""

NAME = "tnxtest_library"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of packages with a library in it; what it has registered is gone afterwards."""
    directory = tmp_path / "packages"
    directory.mkdir()
    (directory / f"{NAME}.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield directory
    forget()


def forget() -> None:
    """Make it look as if nothing had imported the library."""
    module = sys.modules.pop(NAME, None)
    if module is not None:
        module.library._destroy()
        with contextlib.suppress(Exception):
            pytree._deregister_pytree_node(module.Output)
        pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.pop(f"{NAME}.Output", None)
        pytree.SUPPORTED_SERIALIZED_TYPES.pop(module.Output, None)
        pytree.SUPPORTED_NODES.pop(module.Output, None)


def save(root: Path, output: bool) -> None:
    """A program that uses the operator. Args: output: whether it also returns the class, or a tensor."""
    net = __import__(NAME).Net()
    network = net if output else First(net)
    save_program(root / "net/1/model.pt2", network, (torch.ones(2),))
    forget()


class First(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (y,) = self.net(x).values()
        return torch.add(y, 0)


@pytest.mark.usefixtures("place")
def test_a_program_whose_operators_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "models"
    save(root, output=False)
    said = refused(root)
    assert said == (
        f"net/1/model.pt2: torch {torch.__version__} cannot load it: the operator tnxtest::twice is not registered: "
        'the library that has it belongs into imports of model.toml, as in imports = ["tnxtest"]'
    )
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert loud == []  # the sentence says it all


@pytest.fixture
def _operator() -> Iterator[None]:
    """The operator of the library alone."""
    library = torch.library.Library("tnxtest", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    yield
    library._destroy()


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("times", [1, 2])
def test_a_class_that_is_not_there_is_taken_by_its_fields(
    tmp_path: Path, request: pytest.FixtureRequest, times: int
) -> None:
    root = tmp_path / "models"
    save(root, output=True)
    request.getfixturevalue("_operator")
    for _ in range(times):
        model = open_model(root)
        assert [spec.name for spec in model.outputs] == ["y"]
        assert ask(model, model.factory(), np.ones(2, np.float32))["y"].tolist() == [2.0, 2.0]
    assert NAME not in sys.modules


class Box:
    """Torch's context of it names no fields."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner


Pair = namedtuple("Pair", ["low", "high"])


class Returns(torch.nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> Any:
        return self.kind(x + 1) if self.kind is Box else self.kind(x + 1, x + 2)


@pytest.mark.parametrize("kind", [Box, Pair])
def test_a_class_that_does_not_name_its_fields_is_named(tmp_path: Path, kind: Any) -> None:
    name = f"test_libraries.{kind.__name__}"
    if kind is Box:
        pytree.register_pytree_node(
            Box, lambda box: ([box.inner], 7), lambda values, _: Box(*values), serialized_type_name=name
        )
    else:
        pytree._register_namedtuple(Pair, serialized_type_name=name)
    save_program(tmp_path / "net/1/model.pt2", Returns(kind), (torch.ones(2),))
    pytree._deregister_pytree_node(kind)
    assert refused(tmp_path).endswith(
        f"the class {name} is not registered with torch: the module that does so belongs into imports of model.toml, "
        f'as in imports = ["test_libraries"]'
    )


@pytest.mark.usefixtures("place")
def test_imports_bring_what_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(root, output=True)
    model = open_model(root, f'imports = ["{NAME}"]')
    assert [spec.name for spec in model.outputs] == ["y"]
    assert model.notes == ()
    assert ask(model, model.factory(), np.ones(2, np.float32))["y"].tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("place")
def test_what_works_by_luck_has_a_note(tmp_path: Path) -> None:
    root = tmp_path / "models"
    save(root, output=False)
    __import__(NAME)  # as another model may have
    (note,) = open_model(root).notes
    assert note.startswith("net/1/model.pt2 uses operators of tnxtest, which are there only because another model has")


def test_what_comes_with_torch_is_no_library() -> None:
    assert libraries.note(iter(["aten", "prim", "quantized"]), (), "net/1/model.pt2") == ()


@pytest.mark.usefixtures("place")
def test_torchscript_whose_operators_are_missing(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "net/1").mkdir(parents=True)
    ignore_warnings_about_torch_itself()
    network = First(__import__(NAME).Net())
    torch.jit.save(torch.jit.trace(network, torch.ones(2)), root / "net/1/model.pt")
    text = tensors("x", "FP32", [2]) + tensors("y", "FP32", [2], "outputs")
    assert open_model(root, text).notes[1].startswith("net/1/model.pt uses operators of tnxtest")
    forget()
    assert refused(root, text).startswith(
        "net/1/model.pt: damaged, or not TorchScript: the operator tnxtest::twice is not registered"
    )
    model = open_model(root, f'imports = ["{NAME}"]\n{text}')
    assert ask(model, model.factory(), np.ones(2, np.float32))["y"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ('["os/path"]', "net/model.toml: imports[0]: 'os/path' is no name of a module"),
        ('["os", "os.system()"]', "net/model.toml: imports[1]: 'os.system()' is no name of a module"),
        ('"os"', "net/model.toml: imports: expected array, got str, not 'os'"),
        (
            '["no_such.module"]',
            "net/model.toml: imports[0]: 'no_such.module': ModuleNotFoundError: No module named 'no_such'",
        ),
        ('["broken"]', "net/model.toml: imports[0]: 'broken': ValueError: on purpose"),
        ('["exits"]', "net/model.toml: imports[0]: 'exits': SystemExit: 3"),
    ],
)
def test_imports_that_fail(tmp_path: Path, place: Path, names: str, said: str) -> None:
    (place / "broken.py").write_text('raise ValueError("on purpose")')
    (place / "exits.py").write_text("raise SystemExit(3)")
    save_program(tmp_path / "models/net/1/model.pt2", torch.nn.Identity(), (torch.ones(2),))
    assert refused(tmp_path / "models", f"imports = {names}") == said


def test_a_factory_says_why_it_failed_in_the_first_place(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "net/1/model.safetensors")
    (tmp_path / "net/1/code.py").write_text(
        "def make():\n    try:\n        open('/no/such/file')\n    except OSError as error:\n"
        "        raise RuntimeError('no vocabulary') from error\n"
    )
    text = 'factory = "code:make"\n' + tensors("x", "FP32", [2]) + tensors("y", "FP32", [2], "outputs")
    assert refused(tmp_path, text) == (
        "net/1/code.py: make() raised RuntimeError: no vocabulary: FileNotFoundError: [Errno 2] No such file or "
        "directory: '/no/such/file'"
    )
