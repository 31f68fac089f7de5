"""Daemon with odd models that writes all of its log, and sends its last spans, on a busy machine too: a program."""

from __future__ import annotations

import odd_models  # noqa: F401 - it adds its models
import tnxd.daemon
from tnxd.cli import main


def be_patient() -> None:
    """Have daemons of this process end only when all of that is written, unless a minute has passed."""
    tnxd.daemon.LAST_WORDS_S = 60.0


if __name__ == "__main__":
    be_patient()
    main(prog_name="tnxd")
