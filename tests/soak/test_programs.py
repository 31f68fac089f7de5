"""The programs that `make soak` and `make fuzz` run: what they import is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("program", ["soak/soak.py", "faults/fuzz.py"])
def test_program_starts(program: str) -> None:
    command = [sys.executable, str(TESTS / program), "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
