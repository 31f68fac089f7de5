"""Factories of networks: their failures, and the modules beside them."""

from __future__ import annotations

import gc
import hashlib
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from factory_networks import NETWORK, TOML, X, expected, save_weights
from format_tools import ask, open_model, refused
from tnxctl.protocol.errors import FailedPrecondition, PermissionDenied
from tnxd.models import repository
from tnxd.models.formats import opening


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("def make():\n    raise OSError('no licence')", "net/1/net.py: make() raised OSError: no licence"),
        ("def make():\n    raise SystemExit(3)", "net/1/net.py: make() raised SystemExit: 3"),
        ("def make():\n    return 3", "net/1/net.py: make() returned int, not a torch.nn.Module"),
        ("def other():\n    pass", "net/1/net.py: the factory 'make' is not in it"),
        ("make = 3", "net/1/net.py: the factory 'make' is not callable"),
        ("def make(:", "net/1/net.py: importing it raised SyntaxError"),
        ("import no_such_package", "net/1/net.py: importing it raised ModuleNotFoundError"),
        ("raise ValueError('on import')", "net/1/net.py: importing it raised ValueError: on import"),
    ],
)
def test_a_factory_that_fails_is_named(tmp_path: Path, network: str, said: str) -> None:
    save_weights(tmp_path, network=network)
    assert said in refused(tmp_path, TOML)


def test_a_factory_that_is_not_there(tmp_path: Path) -> None:
    save_weights(tmp_path)
    message = refused(tmp_path, TOML.replace("net:make", "nett:make"))
    assert message == "net/model.toml: factory: there is no nett.py in net/1 or net"


WITH_SIBLINGS = """\
import torch
from . import layers
from .parts.inner import ONE
from .parts import TWO

class Net(torch.nn.Module):
    def forward(self, x):
        from .late import LATE
        return x + layers.SHIFT + ONE + TWO + LATE

def make():
    return Net()
"""


def save_siblings(root: Path, version: str, shift: int) -> None:
    folder = root / "net" / version
    (folder / "parts").mkdir(parents=True)
    (folder / "net.py").write_text(WITH_SIBLINGS)
    (folder / "layers.py").write_text(f"SHIFT = {shift}")
    (folder / "late.py").write_text("LATE = 1")
    (folder / "parts/__init__.py").write_text("from .inner import ONE\nTWO = ONE * 2")
    (folder / "parts/inner.py").write_text("ONE = 1")
    safetensors.torch.save_file({}, folder / "model.safetensors")


def loaded(root: Path) -> list[str]:
    """Files below a folder that are modules of this process."""
    files = [str(getattr(module, "__file__", "")) for module in sys.modules.values()]
    return [file for file in files if file.startswith(str(root))]


@pytest.fixture
def _no_module_stays(tmp_path: Path) -> Iterator[None]:
    path = list(sys.path)
    yield
    gc.collect()
    assert loaded(tmp_path) == []
    assert sys.path == path


@pytest.mark.usefixtures("_no_module_stays")
def test_modules_import_their_siblings_and_versions_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    save_siblings(tmp_path, "1", 10)
    save_siblings(tmp_path, "2", 20)
    models = {version: open_model(tmp_path, 'versions = "all"\n' + TOML, version=version) for version in "12"}
    modules = {version: model.factory() for version, model in models.items()}
    again = models["1"].factory()
    assert type(again) is type(modules["1"])  # executed once per model
    for version, shift in (("1", 14), ("2", 24)):
        got = ask(models[version], modules[version], np.zeros((1, 4), np.float32))
        assert got["y"].tolist() == [[shift] * 4]
    assert loaded(tmp_path)
    assert "layers" not in sys.modules
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.usefixtures("_no_module_stays")
@pytest.mark.parametrize("planted", ["net", "layers", "late", "parts/__init__", "parts/inner"])
def test_bytecode_in_the_repository_is_not_run(tmp_path: Path, planted: str) -> None:
    save_siblings(tmp_path, "1", 10)
    version = tmp_path / "net/1"
    (tmp_path / "net/model.toml").write_text(TOML)
    files = sorted(path for path in version.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(version)}\n" for path in files]
    (version / "SHA256SUMS").write_text("".join(sums))
    place = (version / planted).parent / "__pycache__"
    place.mkdir()
    source = tmp_path / ".planted.py"
    source.write_text("raise RuntimeError('planted')")
    py_compile.compile(
        str(source),
        cfile=str(place / f"{Path(planted).name}.{sys.implementation.cache_tag}.pyc"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    catalog = repository.scan(tmp_path, opening.open_model, require_manifest=True)
    assert catalog.failures == {}
    model = catalog.entries["net"].sources["1"].open(0)
    assert ask(model, model.factory(), np.zeros((1, 4), np.float32))["y"].tolist() == [[14] * 4]


def test_versions_share_modules_in_the_directory_of_the_model(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    (path.parent / "net.py").rename(tmp_path / "net/net.py")
    model = open_model(tmp_path, TOML)
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected(X), rtol=1e-5)
    (path.parent / "SHA256SUMS").write_text("")
    with pytest.raises(PermissionDenied, match="does not list"):
        open_model(tmp_path)


def test_a_module_that_changed_since_the_check_is_not_executed(tmp_path: Path) -> None:
    late = "calls = []\ndef make():\n    calls.append(1)\n    if len(calls) > 1: from . import late\n    return Net()\n"
    path = save_weights(tmp_path, network=NETWORK.partition("def make")[0] + late).parent / "late.py"
    path.write_text("")
    model = open_model(tmp_path, TOML)
    model.factory()
    path.write_text("raise RuntimeError('another one')")
    with pytest.raises(FailedPrecondition, match=r"net/1/late.py changed"):
        model.factory()
