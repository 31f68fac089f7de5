"""Daemon of odd models that ends soon where it has to wait for what may never come: run as a program."""

from __future__ import annotations

from typing import Any

import odd_models  # noqa: F401 - it adds its models
import tnxd.daemon
from patient_daemon import be_patient
from tnxd.cli import main
from tnxd.process import signals

handled_signals = signals.handled_signals


def handled_patiently(on_stop: Any, on_reload: Any, stop_timeout_s: float, linger_s: float) -> Any:
    """Handle signals so that after the first one a busy machine has a minute more, before the process is ended."""
    return handled_signals(on_stop, on_reload, stop_timeout_s + 60.0, linger_s)


if __name__ == "__main__":
    be_patient()
    tnxd.daemon._FLUSH_S = 2.0
    signals._REACTION_S = 0.3
    signals.handled_signals = handled_patiently
    main(prog_name="tnxd")
