"""Resident size, of processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_GROWTH_BY_SHARED_MEMORY = """
import mmap
from tnxd.process.resident import resident_bytes

block = bytes(range(256)) * (16 << 12)
before = resident_bytes()
shared = mmap.mmap(-1, 64 << 20)
for offset in range(0, len(shared), len(block)):
    shared[offset : offset + len(block)] = block
with_shared = resident_bytes()
own = bytearray(block * 4)
print(with_shared - before, resident_bytes() - with_shared)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_memory_that_is_shared_does_not_count() -> None:
    """Traffic would be taken for more than it is, and its clients cut off for it."""
    program = [sys.executable, "-c", _GROWTH_BY_SHARED_MEMORY]
    found = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    by_shared, by_own = map(int, found.stdout.split())
    assert by_shared < 16 << 20
    assert by_own > 48 << 20
