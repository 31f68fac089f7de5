"""Memory that the C library keeps, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")

_FAULTS_OF_BLOCKS = """
import resource, threading
from tnxctl import malloc

if {keep}:
    malloc.keep_freed()

def take_blocks(count):
    for _ in range(count):
        bytearray(48 << 20)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for thread in (threading.Thread(target=take_blocks, args=(2,)) for _ in range(2)):
    thread.start()
    thread.join()
before = faults()
thread = threading.Thread(target=take_blocks, args=(10,))
thread.start()
thread.join()
taken = faults() - before
malloc.trim()
before = faults()
take_blocks(1)
print(taken, faults() - before)
"""


def faults(*, keep: bool, **environment: str) -> tuple[int, int]:
    """Page faults of ten blocks of 48 MiB, one after the other in a new thread, and of one block after a trim."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    program = [sys.executable, "-c", _FAULTS_OF_BLOCKS.format(keep=keep)]
    found = subprocess.run(program, env=clean | environment, capture_output=True, text=True, check=True, timeout=60)
    taken, after_trim = map(int, found.stdout.split())
    return taken, after_trim


def test_a_block_that_was_freed_is_used_again_by_every_thread() -> None:
    by_default, _ = faults(keep=False)
    kept, after_trim = faults(keep=True)
    pages = (48 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert kept < pages / 10
    if by_default < pages:
        pytest.skip("the kernel gives memory in pages so large that faults tell nothing")
    assert after_trim > pages / 2  # the trim gave it back


def test_the_operator_may_say_otherwise() -> None:
    by_default, _ = faults(keep=False)
    for name, value in {"MALLOC_ARENA_MAX": "8", "GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}.items():
        assert faults(keep=True, **{name: value})[0] > by_default / 2
