"""Kernel state of connections, also where a number has become that of something else."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tnxd.transport import descriptors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other kernels tell other things")

KINDS = ["tcp", "ipc", "abstract ipc", "no connection", "pipe", "closed"]


@pytest.fixture
def numbers(tmp_path: Path) -> Iterator[dict[str, int]]:
    """Descriptors by what they are."""
    with ExitStack() as stack:

        def accepted(family: int, address: object) -> int:
            listening = stack.enter_context(socket.socket(family))
            listening.bind(address)
            listening.listen()
            stack.enter_context(socket.socket(family)).connect(listening.getsockname())
            return stack.enter_context(listening.accept()[0]).fileno()

        ends = os.pipe()
        for end in ends:
            stack.callback(os.close, end)
        yield {
            "tcp": accepted(socket.AF_INET, ("127.0.0.1", 0)),
            "ipc": accepted(socket.AF_UNIX, str(tmp_path / "socket")),
            "abstract ipc": accepted(socket.AF_UNIX, f"\0{tmp_path}"),
            "no connection": stack.enter_context(socket.socket()).fileno(),
            "pipe": ends[0],
            "closed": 1 << 19,
        }


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_may_be_that_of_anything(numbers: dict[str, int], kind: str) -> None:
    number = numbers[kind]
    is_ipc = "ipc" in kind
    assert descriptors.peer_address(number).partition(":")[0] == {"tcp": "127.0.0.1"}.get(kind, "localhost" * is_ipc)
    assert isinstance(descriptors.peer_groups(number), tuple)
    assert descriptors.bytes_received(number) == {"tcp": 0, "no connection": 0}.get(kind, -1)
    assert isinstance(descriptors.is_open_to_all(number), bool)


def test_a_path_is_open_to_whom_its_permissions_say(numbers: dict[str, int], tmp_path: Path) -> None:
    for mode, is_open in ((0o600, False), (0o666, True), (0o620, False), (0o602, True)):
        (tmp_path / "socket").chmod(mode)
        assert descriptors.is_open_to_all(numbers["ipc"]) == is_open


def test_no_descriptor_is_left_open_or_closed(numbers: dict[str, int]) -> None:
    """However often: others of this process may open and close some meanwhile."""
    there = {number: os.fstat(number) for kind, number in numbers.items() if kind != "closed"}
    before, looks = len(os.listdir("/proc/self/fd")), 1000
    for _ in range(looks):
        for number in numbers.values():
            descriptors.peer_address(number)
            descriptors.is_open_to_all(number)
    assert len(os.listdir("/proc/self/fd")) < before + looks
    assert {number: os.fstat(number) for number in there} == there
