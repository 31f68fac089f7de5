"""Kinds of devices, and the executors that are opened for them."""

from __future__ import annotations

import pytest

from tnxd.config import Config
from tnxd.device_kinds import DEVICE, KINDS, kind_of
from tnxd.executors import devices


@pytest.mark.parametrize(
    ("name", "valid"),
    [("cpu", True), ("cuda", True), ("cuda:12", True), ("cpu:0", False), ("cuda:", False), ("cuda:x", False)],
)
def test_a_device_name_is_a_kind_and_perhaps_a_number(name: str, valid: bool) -> None:
    assert (DEVICE.fullmatch(name) is not None) is valid
    assert kind_of(name) in KINDS


def test_every_kind_of_device_can_be_opened() -> None:
    assert devices._OPENERS.keys() == KINDS.keys()


def test_a_numbered_kind_without_a_number_is_its_first_device() -> None:
    assert devices._names(("cuda", "cpu", "cuda:0", "cuda:1", "cpu")) == ["cuda:0", "cpu", "cuda:1"]


def test_a_device_that_cannot_be_opened_is_a_failure_beside_the_others() -> None:
    opened = devices.open_devices(Config(devices=("cuda:99", "cpu")), lambda execution: None)
    assert list(opened.executors) == ["cpu"]
    assert list(opened.failures) == ["cuda:99"]
    cpu = opened.executors["cpu"]
    assert (cpu.name, cpu.kind, cpu.runs_inline) == ("cpu", "cpu", True)
