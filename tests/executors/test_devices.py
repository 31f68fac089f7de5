"""Devices of a configuration: opened, or a failure beside the others."""

from __future__ import annotations

import pytest

from tnxd.config import Config
from tnxd.device_kinds import KINDS
from tnxd.executors import devices
from tnxd.executors.devices import OpenedDevices


def opened(*names: str) -> OpenedDevices:
    return devices.open_devices(Config(devices=names), lambda execution: None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_device_is_opened_or_says_why_not(kind: str) -> None:
    found = opened(kind)
    assert len(found.executors) + len(found.failures) == 1
    assert not [why for why in found.failures.values() if why.startswith("KeyError")]  # its opener is missing


def test_a_numbered_kind_without_a_number_is_its_first_device() -> None:
    found = opened("cuda", "cpu", "cuda:0", "cuda:98", "cpu")
    assert sorted([*found.executors, *found.failures]) == ["cpu", "cuda:0", "cuda:98"]


def test_a_device_that_cannot_be_opened_is_a_failure_beside_the_others() -> None:
    found = opened("cuda:99", "cpu")
    assert list(found.executors) == ["cpu"]
    assert list(found.failures) == ["cuda:99"]
    cpu = found.executors["cpu"]
    assert (cpu.name, cpu.kind, cpu.runs_inline) == ("cpu", "cpu", True)
