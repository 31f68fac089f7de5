"""Kinds of devices, and their names."""

from __future__ import annotations

import pytest
import torch

from tnxd.config import Config
from tnxd.device_kinds import CHOSEN, CPU, DEVICE, KINDS, PROCESS, kind_of


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("cpu", True),
        ("cuda", True),
        ("cuda:12", True),
        ("xpu", True),
        ("xpu:1", True),
        ("mps", True),
        ("cpu:0", False),
        ("mps:0", False),
        ("cuda:", False),
        ("cuda:x", False),
        ("process", False),
    ],
)
def test_a_device_name_is_a_kind_and_perhaps_a_number(name: str, valid: bool) -> None:
    assert (DEVICE.fullmatch(name) is not None) is valid
    assert kind_of(name) in KINDS


def test_every_kind_that_can_be_chosen_has_a_limit_of_memory_and_is_a_device_of_torch() -> None:
    for kind in CHOSEN:
        assert Config().memory.nbytes(kind.name) == 0
        assert torch.device(kind.name).type == kind.name
    assert {kind.name for kind in KINDS.values() if not kind.is_gpu} == {CPU.name, PROCESS.name}
