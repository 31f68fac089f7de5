"""Notes in a recording about the daemon and its versions: what a simulation of this traffic needs to know of them.

`bench/schedule.py --trace` reads them.
"""

from __future__ import annotations

import time

import msgspec

from tnxctl import __version__
from tnxd.deployment.registry import Registry
from tnxd.scheduling.scheduler import Scheduler


def about(scheduler: Scheduler) -> dict[str, str]:
    """Notes about the daemon: its devices as JSON, and the time."""
    devices = {name: {"kind": device.kind, "lanes": device.lanes} for name, device in scheduler.devices.items()}
    return {
        "program": f"tnxd {__version__}",
        "began_s": f"{time.time():.3f}",
        "devices": msgspec.json.encode(devices).decode(),
    }


def describe(title: str, registry: Registry, scheduler: Scheduler) -> dict[str, str]:
    """Notes about a version, NAME@VERSION: how it batches, and what its batches cost as far as is known, as JSON."""
    model = registry.describe(title)[1].model
    if model is None:
        return {}
    notes = {
        "max_batch_size": str(model.max_batch_size),
        "priority": str(model.priority),
        "costs_us": msgspec.json.encode(scheduler.models.known_costs(model.key)).decode(),
    }
    if model.deadline_us is not None:
        notes["deadline_us"] = f"{model.deadline_us:g}"
    return notes
