"""Benchmarks of counting, and of one working tree beside another: that they run, and count what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import run

ROOT = Path(__file__).parents[2]


def test_counting() -> None:
    printed = run("counting.py", "--rounds", "1", "--versions", "3")
    assert re.findall(r"^\| (\d+) \| [\d.]+ \| \d+ \|$", printed, re.MULTILINE) == ["1", "4", "16", "64"]
    assert re.search(r"^\| 3 \| [\d.]+ \| [\d,]+ \| [\d.]+ \|$", printed, re.MULTILINE)


@pytest.mark.slow
def test_trees() -> None:
    printed = run("trees.py", str(ROOT), "--rounds", "1", "--seconds", "0.1", "--outstanding", "4")
    assert re.findall(r"^\| 4 \| (\w+) \|", printed, re.MULTILINE) == ["before", "after", "ratio"]
