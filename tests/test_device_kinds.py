"""Kinds of devices, and their names."""

from __future__ import annotations

import pytest

from tnxd.device_kinds import DEVICE, KINDS, kind_of


@pytest.mark.parametrize(
    ("name", "valid"),
    [("cpu", True), ("cuda", True), ("cuda:12", True), ("cpu:0", False), ("cuda:", False), ("cuda:x", False)],
)
def test_a_device_name_is_a_kind_and_perhaps_a_number(name: str, valid: bool) -> None:
    assert (DEVICE.fullmatch(name) is not None) is valid
    assert kind_of(name) in KINDS
