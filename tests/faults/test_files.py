"""Pipes, devices, sparse and shrinking files where the daemon and the tool expect a model, settings or tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from daemons import running
from dealer import Dealer
from model_repositories import Repository, scaled
from tnxctl.cli import tensorfiles
from tnxctl.cli.exits import FileProblem
from tnxctl.files import reading
from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import weights

GIB = 1 << 30


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 40 * GIB)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


BAD: dict[str, Callable[[Path], Any]] = {"fifo": os.mkfifo, "device": device, "sparse": sparse}


def test_models_without_a_file_are_named_and_the_others_served(tmp_path: Path) -> None:
    """One sentence each, with its name, and the others are served."""
    repository = Repository(tmp_path / "models")
    cases = {}
    for bad in BAD:
        for file in ("model.toml", "1/SHA256SUMS", "1/network.py", "network.py"):
            name = f"{bad}-{len(cases)}"
            cases[name] = bad, file
            repository.settings(name)
            repository.publish(name, 1, scaled(2.0))
            path = repository.root / name / file
            if file.endswith("network.py"):
                (repository.root / name / "1/network.py").unlink()
            path.unlink(missing_ok=True)
            BAD[bad](path)
    repository.settings("good")
    repository.publish("good", 1, scaled(2.0))
    with running(tmp_path, "--model-repository", str(repository.root)) as daemon, Dealer(daemon.endpoint) as dealer:
        models = {model.name: model for model in dealer.await_health(status="ready").models}
        assert models.pop("good").status == "ready"
        assert models.keys() == cases.keys()
        for name, (bad, file) in cases.items():
            named = "/dev/zero" if bad == "device" else f"{name}/{file}"  # which anybody may write to
            assert (models[name].status, named in models[name].error) == ("failed", True), models[name].error
        assert "Traceback" not in daemon.log
        assert daemon.stop() == 0


@pytest.mark.parametrize("bad", BAD)
def test_configuration_that_is_no_file_is_refused(bad: str, tmp_path: Path) -> None:
    path = tmp_path / "tnxd.toml"
    BAD[bad](path)
    ended = subprocess.run(
        [sys.executable, "-m", "tnxd", "--config", str(path)], capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert str(path) in ended.stderr


def test_lock_of_an_ipc_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tnx.lock")
    with running(tmp_path) as daemon:
        assert daemon.process.wait(60) == 1
        assert "tnx.lock" in daemon.log


def test_file_that_is_replaced_between_check_and_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("text")
    os.mkfifo(fifo)
    seen = os.stat(file)
    monkeypatch.setattr(reading.os, "stat", lambda path: seen)
    with pytest.raises(FailedPrecondition, match="it is a named pipe, not a file"):
        reading.open_file(fifo, "it")


# --- files that shrink ---------------------------------------------------------------------------------------

SHRINKS = """
import os, sys
from pathlib import Path
import torch
from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import weights

path = Path(sys.argv[1])
network = torch.nn.Module()
network.weight = torch.nn.Parameter(torch.empty(16 << 20), requires_grad=False)

def state_dict(keep_vars):
    os.truncate(path, 4096)  # its names and shapes are known, its weights have not been copied
    return {"weight": network.weight}

network.state_dict = state_dict
with path.open("rb") as file:
    try:
        weights.fill(network, weights.of_file(file, "file"), "file", "a test")
    except FailedPrecondition as error:
        print(error.message)
print(float(network.weight.sum()))
"""


def test_weights_shortened_while_they_are_loaded_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(16 << 20)}, path)
    ended = subprocess.run([sys.executable, "-c", SHRINKS, str(path)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended
    assert ended.stdout == "16777216.0\n"


def test_weights_shortened_before_they_are_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(1 << 20)}, path)
    with path.open("rb") as file:
        size = os.stat(path)
        os.truncate(path, 4096)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights.os, "fstat", lambda descriptor: size)
            with pytest.raises(FailedPrecondition, match="changed while it was loaded"):
                weights.of_file(file, "model.safetensors")


# --- the tool ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["device", "sparse"])
def test_tensors_without_end_are_refused(bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfiles, "MOST_BYTES", 1 << 20)
    path = tmp_path / "input.npy"
    BAD[bad](path)
    with pytest.raises(FileProblem, match="more than 1048576 bytes"):
        tensorfiles.content(str(path))
