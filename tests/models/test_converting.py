"""Networks that onnxruntime runs in place of torch: converted by a child process, kept by contents."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from format_tools import ask, open_model, save_program
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument, Unavailable
from tnxd.models.formats import artifacts, converting
from tnxd.models.formats.called import Program
from tnxd.models.model import Model
from tnxd.models.variants import Workshop

pytestmark = pytest.mark.skipif(bool(converting.missing()), reason=converting.missing() or "-")

TOML = 'optimize = "onnxruntime"'


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.linear(x) * scale
        return {"sum": hidden.sum(1), "hidden": hidden}


def save(root: Path) -> torch.nn.Module:
    torch.manual_seed(3)
    network = Net().eval()
    rows = torch.export.Dim("rows", max=8)
    axes = ({0: rows, 1: torch.export.Dim("length", min=3, max=9)}, {0: rows})
    save_program(root / "net/1/model.pt2", network, (torch.zeros(2, 5, 4), torch.ones(2, 1, 1)), axes)
    return network


def make(model: Model, cache: Path | None = None, seconds: float = 100.0) -> torch.nn.Module:
    (variant,) = model.variants
    assert variant.missing == ""
    return variant.make(model.factory, Workshop(torch.device("cpu"), cache, seconds))


def forbid_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", forbidden)


@pytest.mark.timeout(120)
def test_a_converted_network_answers_and_refuses_as_before_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, cache = save(tmp_path / "models"), tmp_path / "cache"
    cache.mkdir()
    model = open_model(tmp_path / "models", TOML)
    converted = make(model, cache)
    forbid_processes(monkeypatch)
    again = make(open_model(tmp_path / "models", TOML), cache)  # as after a restart
    for module in (converted, again):
        assert isinstance(module, Program)
        for rows, length in ((1, 3), (8, 9), (2, 5)):
            generator = np.random.default_rng(rows)
            x = generator.random((rows, length, 4)).astype(np.float32)
            scale = generator.random((rows, 1, 1)).astype(np.float32)
            with torch.inference_mode():
                wanted = network(torch.from_numpy(x), torch.from_numpy(scale))
            got = ask(model, module, x, scale)
            np.testing.assert_allclose(got["sum"], wanted["sum"].numpy(), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(got["hidden"], wanted["hidden"].numpy(), rtol=1e-5, atol=1e-6)
        with pytest.raises(InvalidArgument, match="here axis 1 of 'x' is 2"):
            ask(model, module, np.zeros((2, 2, 4), np.float32), np.ones((2, 1, 1), np.float32))


def test_weights_in_bfloat16_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "models")
    (variant,) = open_model(tmp_path / "models", TOML).variants
    forbid_processes(monkeypatch)
    with pytest.raises(FailedPrecondition, match="bfloat16"):
        variant.make(lambda: Net().to(torch.bfloat16), Workshop(torch.device("cpu"), None, 100.0))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_other_contents_make_another_artifact(tmp_path: Path) -> None:
    save(tmp_path / "models")
    cache = tmp_path / "cache"
    cache.mkdir()
    make(open_model(tmp_path / "models", TOML), cache)
    (tmp_path / "models/net/1/notes.txt").write_text("changed")
    make(open_model(tmp_path / "models", TOML), cache)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_damaged_artifact_is_made_again(tmp_path: Path) -> None:
    save(tmp_path / "models")
    cache = tmp_path / "cache"
    cache.mkdir()
    model = open_model(tmp_path / "models", TOML)
    make(model, cache)
    (kept,) = cache.iterdir()
    whole = (kept / converting.CONVERTED).read_bytes()
    (kept / converting.CONVERTED).write_bytes(whole[:-1])
    assert isinstance(make(model, cache), Program)
    assert len((kept / converting.CONVERTED).read_bytes()) == len(whole)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_cannot_be_converted_is_named_and_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models/net/1").mkdir(parents=True)
    torch.save({}, tmp_path / "unused")

    class Complex(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).real

    save_program(
        tmp_path / "models/net/1/model.pt2",
        Complex(),
        (torch.eye(3).repeat(2, 1, 1),),
        ({0: torch.export.Dim("rows", max=8)},),
    )
    cache = tmp_path / "cache"
    cache.mkdir()
    model = open_model(tmp_path / "models", TOML)
    with pytest.raises(FailedPrecondition) as first:
        make(model, cache)
    assert first.value.message.startswith("torch.onnx cannot convert it")
    forbid_processes(monkeypatch)
    with pytest.raises(FailedPrecondition) as second:
        make(model, cache)
    assert second.value.message == first.value.message


def test_a_conversion_that_takes_too_long_is_ended_and_tried_again_another_time(tmp_path: Path) -> None:
    save(tmp_path / "models")
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(Unavailable, match="longer than 0 s"):
        make(open_model(tmp_path / "models", TOML), cache, seconds=0.05)
    assert list(cache.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("code", ["raise OSError(28, 'No space left on device')", "os._exit(7)"])
def test_a_compiler_without_room_is_tried_again_another_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """Its disk is full where it writes what it made: the child alone runs that code, which a module of torch holds."""
    root, cache = tmp_path / "models", tmp_path / "cache"
    save(root)
    cache.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        f"import pathlib, os\ndef full(self, *args, **kwargs):\n    {code}\npathlib.Path.write_bytes = full\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"ended with 1: .*No space left|ended with 7"):
        make(open_model(root, TOML), cache)
    assert list(cache.iterdir()) == []


def test_what_a_compiler_that_takes_too_long_has_started_is_ended_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a C++ compiler, which holds the pipe that the daemon reads to its end."""
    save(tmp_path / "models")
    (tmp_path / "sitecustomize.py").write_text(
        f"import subprocess\nsubprocess.Popen(['sleep', '300']).pid\nopen({str(tmp_path / 'began')!r}, 'w').close()\n"
        "import signal\nsignal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seconds = 2
    while not (tmp_path / "began").exists():  # a busy machine needs longer for that, too
        with pytest.raises(Unavailable, match=f"longer than {seconds} s"):
            make(open_model(tmp_path / "models", TOML), seconds=seconds)
        seconds *= 2


def test_a_directory_that_others_may_write_to_keeps_nothing(tmp_path: Path) -> None:
    own, shared = tmp_path / "own", tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "file").write_text("")
    assert artifacts.directory(str(own)) == own
    assert own.stat().st_mode & 0o777 == 0o700
    assert artifacts.directory(str(shared)) is None
    assert artifacts.directory(str(tmp_path / "file")) is None
    assert artifacts.directory("") is None
    (shared / "below").mkdir(mode=0o700)
    assert artifacts.directory(str(shared / "below")) is None  # who may write above it may put another there


def test_the_service_has_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path / "service"))
    assert artifacts.directory("auto") == tmp_path / "service/variants"
    monkeypatch.delenv("CACHE_DIRECTORY")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert artifacts.directory("auto") == tmp_path / "user/tensornext/variants"
