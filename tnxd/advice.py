"""Advice about packages that are missing."""

from __future__ import annotations

import shlex
import sys


def installing(*packages: str) -> str:
    """Shell command that installs packages where this program runs: in its environment, whatever is on the PATH.

    It names the packages themselves, not extras of TensorNext, which an index may not have.
    """
    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *packages])
