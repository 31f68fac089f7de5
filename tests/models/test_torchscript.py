"""TorchScript models."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from format_tools import ask, open_model, refused, tensors
from tnxd.models import networks


def save_torchscript(root: Path, network: torch.nn.Module) -> Path:
    (root / "net/1").mkdir(parents=True, exist_ok=True)
    path = root / "net/1/model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(network).save(str(path))
    return path


DIGITS = tensors("image", "FP32", [-1, 64]) + tensors("scores", "FP32", [-1, 10], "outputs")


def test_torchscript_has_its_deprecation_said_and_raises_no_warning(tmp_path: Path) -> None:
    save_torchscript(tmp_path, networks.digits().train())
    with warnings.catch_warnings(record=True) as caught:
        model = open_model(tmp_path, DIGITS)
        module = model.factory()
    assert caught == []
    assert "TorchScript is deprecated" in model.notes[0]
    scans = np.ones((2, 64), np.float32)
    with torch.inference_mode():
        wanted = networks.digits()(torch.from_numpy(scans)).numpy()
    np.testing.assert_array_equal(ask(model, module, scans)["scores"], wanted)


def test_torchscript_in_another_datatype(tmp_path: Path) -> None:
    save_torchscript(tmp_path, networks.digits())
    model = open_model(tmp_path, 'dtype = "bfloat16"\n' + DIGITS)
    module = model.factory()
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert ask(model, module, np.ones((2, 64), np.float32))["scores"].dtype == np.float32


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_damaged_torchscript_is_named(tmp_path: Path, keep: int) -> None:
    path = save_torchscript(tmp_path, networks.digits())
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(tmp_path, DIGITS).startswith("net/1/model.pt: damaged, or not TorchScript")
