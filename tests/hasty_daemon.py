"""Daemon of odd models that ends soon where it has to wait for what may never come: run as a program."""

from __future__ import annotations

import odd_models  # noqa: F401 - it adds its models
import tnxd.daemon
from tnxd.cli import main
from tnxd.process import signals

if __name__ == "__main__":
    tnxd.daemon._FLUSH_S = 2.0  # and as long again before the process is ended: a busy machine may need it
    signals._REACTION_S = 0.3
    main(prog_name="tnxd")
