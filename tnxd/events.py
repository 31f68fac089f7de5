"""Events: stable names and typed fields of what the log tells, for its format that machines read.

A call site names its event where it has its sentence:

    log.info("%s is %s", version.title, state, extra=event("model_unloaded", version.title))

docs/operations.md has the table of all events. The format is in `tnxd.process.json_format`.
"""

from __future__ import annotations

import threading
from typing import Any

NAME = "tnxd_event"
"""Attribute of a log record: name of its event."""

FIELDS = "tnxd_fields"
"""Attribute of a log record: fields of its event, by name."""

FOR_MACHINES = "tnxd_for_machines"
"""Attribute of a log record that the text format leaves out: people have it from another line, or need not know."""


class _Speaker(threading.local):
    """Attributes: model: key or title of the model whose code runs on this thread, or ran last; "" before any."""

    model = ""


speaker = _Speaker()
"""Speaker of this thread, whose code runs on it: what is printed is told apart by that."""


def event(name: str, model: str = "", /, **fields: Any) -> dict[str, Any]:
    """The `extra` of a log record about an event.

    Args:
        name: of the event, in snake_case: a literal, which never changes.
        model: name, title or key of the model that it is about: becomes the fields model and version.
        fields: strings, numbers, lists and dicts of them. `message` takes the place of the sentence.
    """
    return {NAME: name, FIELDS: {**model_fields(model), **fields}}


def machine_event(name: str, model: str = "", /, **fields: Any) -> dict[str, Any]:
    """The same for a record that the text format leaves out."""
    return {FOR_MACHINES: True, **event(name, model, **fields)}


def model_fields(model: str) -> dict[str, str]:
    """Fields model and version, of NAME, NAME@VERSION or a key; none for ""."""
    name, _, version = model.partition("#")[0].partition("@")
    fields = {"model": name, "version": version}
    return {key: value for key, value in fields.items() if value}
