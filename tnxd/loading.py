"""Open the devices, put every model on each of them, warm up. Slow: runs beside the serving loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from tnxd.config import Config
from tnxd.control import Inventory
from tnxd.costs import CostModel
from tnxd.executors.devices import open_devices
from tnxd.executors.pool import LanePool, OnDone
from tnxd.executors.runner import first_line
from tnxd.work import Device

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """What `load_everything` made ready.

    Attributes:
        executors: by device name. devices: the same as the scheduler sees them.
        device_failures, model_failures: name -> why.
    """

    executors: dict[str, LanePool]
    devices: list[Device]
    device_failures: dict[str, str]
    model_failures: dict[str, str] = field(default_factory=dict)


def load_everything(config: Config, inventory: Inventory, costs: CostModel, on_done: OnDone) -> Loaded:
    """Load every model of the inventory on every device. What fails is left out, logged and reported.

    Raises:
        RuntimeError: no device works at all, or no model can be loaded on any.
    """
    opened = open_devices(config, on_done)
    for name, failure in opened.failures.items():
        log.error("device %s is left out: %s", name, failure)
    if not opened.executors:
        raise RuntimeError(f"no device works: {opened.failures}")
    loaded = Loaded(opened.executors, [], dict(opened.failures))
    for name, executor in opened.executors.items():
        models = set()
        for model in inventory.models.values():
            try:
                curve = costs.curve(name, model.name, model.example_group)
                for rows, micros in executor.load(model):
                    curve.observe(rows, micros)
            except BaseException as error:  # a model's code may raise anything
                log.exception("model %s cannot be loaded on %s", model.name, name)
                loaded.model_failures[model.name] = f"{name}: {type(error).__name__}: {first_line(error)}"
            else:
                models.add(model.name)
        inline_limit = config.cpu.inline_limit_us if executor.kind == "cpu" else 0.0
        free_mb = executor.memory_mb()[0]
        loaded.devices.append(
            Device(
                name,
                executor.kind,
                executor.lanes,
                frozenset(models),
                free_mb,
                inline_limit_us=inline_limit,
                lane_threads=executor.lane_threads,
            )
        )
    for device in loaded.devices:
        for model_name in device.models:
            loaded.model_failures.pop(model_name, None)  # it works somewhere
    if len(loaded.model_failures) == len(inventory.models):
        raise RuntimeError(f"no model can be loaded: {loaded.model_failures}")
    return loaded
