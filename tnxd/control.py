"""Answers about the daemon itself: what it is, what it has, how it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tnxctl import __version__
from tnxctl.errors import FailedPrecondition, NotFound, Unavailable
from tnxctl.wire import VERSION, DeviceInfo, Health, HealthReport, Metadata, MetadataReport, ModelInfo, excerpt
from tnxd.executors.execution import Executor
from tnxd.models.model import Model
from tnxd.scheduler import Scheduler
from tnxd.telemetry import Telemetry
from tnxd.work import Request

Report = HealthReport | MetadataReport

STARTING = "starting"
READY = "ready"
DRAINING = "draining"


@dataclass
class Inventory:
    """What the daemon serves, and on what.

    Attributes:
        models: every configured model by name. default_model: for requests that name none.
        executors: devices that work, by name.
        device_failures: device -> why it could not be opened, or what broke it later.
        model_failures: model -> why no device could load it.
    """

    models: dict[str, Model]
    default_model: str
    executors: Mapping[str, Executor] = field(default_factory=dict)
    device_failures: dict[str, str] = field(default_factory=dict)
    model_failures: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Model:
        """The model of that name, or the default model for "". Raises NotFound, FailedPrecondition."""
        model = self.models.get(name or self.default_model)
        if model is None:
            raise NotFound(f"no model {excerpt(name)}; there are {', '.join(self.models)}")
        failure = self.model_failures.get(model.name)
        if failure is not None:
            raise FailedPrecondition(f"model {model.name!r} is not loaded: {failure}")
        return model


def health(
    request: Health,
    state: str,
    inventory: Inventory,
    scheduler: Scheduler,
    telemetry: Telemetry,
    undeliverable: int,
) -> HealthReport:
    """The state of everything, now."""
    devices = tuple(_device_info(name, inventory, scheduler) for name in _device_names(inventory, scheduler))
    try:
        current = scheduler.route(Request(inventory.default_model, max_batch_size=0), 0)[0]
    except Unavailable:
        current = None
    return HealthReport(
        v=VERSION,
        id=request.id,
        status=state,
        cuda_available=any(info.name.startswith("cuda") and info.status == READY for info in devices),
        current_device=current.name if current else "",
        gpu_memory_free_mb=current.memory_free_mb if current and current.kind == "cuda" else 0.0,
        version=__version__,
        uptime_s=telemetry.uptime_s(),
        devices=devices,
        models=tuple(_model_info(model, inventory, scheduler) for model in inventory.models.values()),
        queued=scheduler.queued,
        running=scheduler.running,
        requests=telemetry.requests,
        replies=telemetry.replies,
        errors=dict(telemetry.errors),
        undeliverable=undeliverable,
        abandoned=telemetry.abandoned,
        prediction_error_us=telemetry.prediction_error_us,
    )


def metadata(request: Metadata, inventory: Inventory, scheduler: Scheduler) -> MetadataReport:
    """One model's signature and state. Raises NotFound."""
    model = inventory.models.get(request.model or inventory.default_model)
    if model is None:
        raise NotFound(f"no model {excerpt(request.model)}; there are {', '.join(inventory.models)}")
    return MetadataReport(v=VERSION, id=request.id, model=_model_info(model, inventory, scheduler))


def _device_names(inventory: Inventory, scheduler: Scheduler) -> list[str]:
    return list(dict.fromkeys([*scheduler.devices, *inventory.device_failures]))


def _device_info(name: str, inventory: Inventory, scheduler: Scheduler) -> DeviceInfo:
    failure = inventory.device_failures.get(name, "")
    device = scheduler.devices.get(name)
    executor = inventory.executors.get(name)
    if device is None or executor is None:
        return DeviceInfo(name=name, status="failed", error=failure)
    free, total = executor.memory_mb()
    return DeviceInfo(
        name=name,
        status="failed" if failure else READY,
        description=executor.description,
        lanes=device.lanes,
        busy_lanes=device.lanes - len(device.free_lanes),
        queued_rows=device.queued_rows,
        memory_free_mb=free,
        memory_total_mb=total,
        error=failure,
    )


def _model_info(model: Model, inventory: Inventory, scheduler: Scheduler) -> ModelInfo:
    failure = inventory.model_failures.get(model.name, "")
    devices = tuple(
        device.name for device in scheduler.devices.values() if model.name in device.models and not device.error
    )
    return ModelInfo(
        name=model.name,
        version=model.version,
        status="failed" if failure else READY if devices else STARTING,
        default=model.name == inventory.default_model,
        inputs=model.inputs,
        outputs=model.outputs,
        max_batch_size=model.max_batch_size,
        devices=devices,
        error=failure,
    )
