"""Drift of the process while models serve: settings that change, and functions of torch that are replaced."""

from __future__ import annotations

import logging

from tnxd.events import event
from tnxd.models.process_state import monkey_patches
from tnxd.models.process_state.snapshot import SETTINGS, Snapshot

log = logging.getLogger(__name__)


class DriftMonitor:
    """Settings as they are to stay while models serve. Make it, and use it, on the thread that serves."""

    def __init__(self) -> None:
        self._snapshot = Snapshot(setting for setting in SETTINGS if setting.watched)
        self._logged: set[str] = set()

    def restore(self) -> list[str]:
        """Restore what has drifted, and log each name once. Returns the names. A fraction of a millisecond."""
        drifted = []
        for setting, name, restored in self._snapshot.restore():
            drifted.append(name)
            if setting.name not in self._logged:
                self._logged.add(setting.name)
                log.warning(
                    "a model that serves has changed %s: %s",
                    *(name, "put back" if restored else "it stays so"),
                    extra=event("setting_changed", names=[name], restored=restored),
                )
        for name in monkey_patches.undo():
            drifted.append(name)
            if name not in self._logged:
                self._logged.add(name)
                log.warning(
                    "a model that serves has replaced %s, which all models use: put back",
                    name,
                    extra=event("function_replaced", names=[name]),
                )
        return drifted
