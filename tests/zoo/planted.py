"""Daemon without one of the mechanisms that keep answers apart, named by ZOO_PLANTED: run as a program.

Whoever moves such a mechanism moves its line in MECHANISMS, too.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from tnxd.executors.execution import PURE
from tnxd.executors.trial.state import State

MECHANISMS: dict[str, dict[str, Callable[..., Any]]] = {
    # No lane gets a copy of its own of a network that writes before it reads, and no output is copied. What compares
    # the lanes would notice it: so it is left out, too.
    "copies": {
        "tnxd.executors.trial.isolation:_kept_apart": lambda module, verdict: lambda: module,
        "tnxd.executors.pool:lanes_apart": lambda *_: "",
    },
    # No network is looked at when it is loaded: all are taken for pure.
    "classes": {
        "tnxd.executors.trial.trial:find_state": lambda *_: State(PURE),
        "tnxd.executors.trial.trial:_check_openings": lambda *_: None,
        "tnxd.executors.trial.trial:_written_since": lambda *_: [],
        "tnxd.executors.pool:lanes_apart": lambda *_: "",
    },
    # No two examples are run together and apart when a version is loaded: axis 0 counts rows wherever it varies.
    "proof": {
        "tnxd.executors.trial.trial:_with_rows": lambda verdict, *_: verdict,
        "tnxd.executors.trial.warmup:difference": lambda *_: None,
    },
    # No batch is recomputed.
    "audit": {"tnxd.deployment.audit:Audit.offer": lambda *_: None},
    # What an import, a build or a forward does to the process stays.
    "process": {
        "tnxd.models.process_state.snapshot:Snapshot.restore": lambda self: iter(()),
        "tnxd.models.process_state.drift:DriftMonitor.restore": lambda self: None,
    },
}
"""Part that is left out -> attributes as "module:dotted.name", and what takes their place."""


def find(place: str) -> tuple[Any, str]:
    """Holder of an attribute, and its name. Raises ImportError, AttributeError: it is not there."""
    module, _, path = place.partition(":")
    *holders, name = path.split(".")
    holder: Any = importlib.import_module(module)
    for each in holders:
        holder = getattr(holder, each)
    getattr(holder, name)
    return holder, name


def missing() -> list[str]:
    """Places of any mechanism that are not there."""
    lost = []
    for place in (place for places in MECHANISMS.values() for place in places):
        try:
            find(place)
        except (ImportError, AttributeError):
            lost.append(place)
    return lost


def main() -> None:
    from tnxd.cli import main as serve

    for place, substitute in MECHANISMS[os.environ["ZOO_PLANTED"]].items():
        setattr(*find(place), substitute)
    serve(prog_name="tnxd")


if __name__ == "__main__":
    main()
