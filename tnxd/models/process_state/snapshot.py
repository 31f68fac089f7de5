"""Snapshots of settings of the process, and their restoration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from tnxd.models.process_state.python_settings import PYTHON_SETTINGS
from tnxd.models.process_state.setting import Setting
from tnxd.models.process_state.torch_settings import TORCH_SETTINGS

SETTINGS: tuple[Setting, ...] = (*TORCH_SETTINGS, *PYTHON_SETTINGS)
"""All settings, in the order in which they are restored."""

_UNREADABLE = object()


class Snapshot:
    """Values of settings at one time, and the thread's own values on the thread that takes it."""

    def __init__(self, settings: Iterable[Setting] = SETTINGS) -> None:
        self._values = {setting: read(setting) for setting in settings}

    def restore(self) -> Iterator[tuple[Setting, str, bool]]:
        """Restore the settings that have changed, one with each step of the iterator.

        Yields:
            The setting, a name of the change for people, and whether it could be restored.
        """
        for setting, value in self._values.items():
            now = read(setting)
            if differs(value, now):
                with suppress(Exception):  # signal handlers, off the main thread
                    setting.write(value)
                name = setting.name if setting.describe is None else setting.describe(value, now)
                yield setting, name, not differs(value, read(setting))


def read(setting: Setting) -> Any:
    """Value of a setting, or a mark that `differs` takes for equal to everything."""
    try:
        return setting.read()
    except Exception:  # a directory that is gone, a platform or a release of torch without it
        return _UNREADABLE


def differs(before: Any, now: Any) -> bool:
    """Whether a setting has changed between two values that were read."""
    if before is now or before is _UNREADABLE or now is _UNREADABLE:
        return False
    try:
        return not bool(before == now)
    except Exception:  # whatever a handler or a hook makes of a comparison
        return True
