"""Advice about packages that are missing."""

from __future__ import annotations

import shlex
import sys


def installing(*packages: str) -> str:
    """Shell command that installs packages into the environment of this program, whatever is on the PATH.

    The packages are named themselves, not as extras of TensorNext, which an index may not have.
    """
    return shlex.join([sys.executable or "python3", "-m", "pip", "install", *packages])
