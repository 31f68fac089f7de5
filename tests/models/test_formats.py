"""Model files of every format: one network in all of them, and what holds for each."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim

from factory_networks import TOML, save_weights
from format_tools import ask, open_model, save_program, source
from model_repositories import load_example
from tnxctl.protocol.errors import FailedPrecondition
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import networks

ROWS = Dim("rows", max=32)


def test_the_digits_in_every_format_give_equal_answers(tmp_path: Path) -> None:
    load_example("digits", "save_formats").build(tmp_path)
    scans = (np.random.default_rng(1).random((5, 64)) * 16).astype(np.float32)
    with torch.inference_mode():
        expected = networks.digits()(torch.from_numpy(scans)).numpy()
    signatures = set()
    for version, kind in (("1", "pt2"), ("2", "safetensors"), ("3", "torchscript")):
        model = open_model(tmp_path, name="digits", version=version)
        assert model.format == kind
        signatures.add((model.inputs, model.outputs, model.max_batch_size))
        np.testing.assert_array_equal(ask(model, model.factory(), scans)["scores"], expected)
    assert signatures == {((TensorSpec("image", "FP32", (-1, 64)),), (TensorSpec("scores", "FP32", (-1, 10)),), 64)}


def test_model_toml_arrives_in_the_model(tmp_path: Path) -> None:
    save_program(tmp_path / "net/1/model.pt2", networks.DigitsNet().eval(), (torch.zeros(2, 64),), ({0: ROWS},))
    model = open_model(
        tmp_path,
        'max_batch_size = 16\nmax_delay_us = 100\ndevices = ["cpu", "cuda:1"]\nreplicas = 2\nwarm_up = [1, 16]\n'
        "time_limit_s = 3.0\ndeadline_us = 5000.0\npriority = 3",
    )
    assert (model.max_batch_size, model.max_delay_us, model.devices, model.replicas) == (16, 100, ("cpu", "cuda:1"), 2)
    assert (model.warm_up, model.time_limit_s, model.deadline_us, model.priority) == ((1, 16), 3.0, 5000.0, 3)


def test_a_version_that_went_away_after_the_scan(tmp_path: Path) -> None:
    path = save_weights(tmp_path)
    (tmp_path / "net/model.toml").write_text(TOML)
    found = source(tmp_path)
    path.unlink()
    with pytest.raises(FailedPrecondition, match=r"net/1/model.safetensors is missing"):
        found.open(0).factory()
    (path.parent / "net.py").unlink()
    os.rmdir(path.parent)
    with pytest.raises(FailedPrecondition, match="No such file"):
        found.open(0)
