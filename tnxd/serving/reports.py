"""Reports: the daemon's state, its devices, its models, and changes of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import UNSET

from tnxctl import __version__
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError, Unavailable
from tnxctl.protocol.wire import (
    MIB,
    VERSION,
    Compare,
    Comparison,
    DeviceInfo,
    Health,
    HealthReport,
    Metadata,
    MetadataReport,
    ModelInfo,
    ModelsReport,
    PipelineInfo,
    PipelineStep,
    ReloadReport,
)
from tnxd.deployment.audit import Audit
from tnxd.deployment.reconciler import Changes
from tnxd.deployment.registry import Deployment, Registry
from tnxd.deployment.shadow import Shadows
from tnxd.deployment.version import FAILED, READY, STARTING, Version
from tnxd.device_kinds import CUDA
from tnxd.executors.execution import Execution, Executor
from tnxd.models.model import Model
from tnxd.models.pipelines import Pipeline
from tnxd.scheduling.device import Batch
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler
from tnxd.serving.telemetry import Telemetry
from tnxd.serving.version_traffic import TrafficByVersion
from tnxd.transport.client_limits import Admission

# When to ask again a daemon that is starting, or one in the place of the one that is draining.
_RETRY_AFTER_S = 0.1


@dataclass
class Inventory:
    """Inventory of a daemon: the versions that it serves, and its devices.

    Attributes:
        audits: of versions that have one. executors: devices that work, by name.
        device_failures: device -> why it could not be opened, or what broke it later.
        traffic: of the versions in the registry. on_lanes: what runs there.
    """

    registry: Registry
    audits: Mapping[Version, Audit]
    executors: Mapping[str, Executor]
    device_failures: dict[str, str] = field(default_factory=dict)
    traffic: TrafficByVersion = field(default_factory=TrafficByVersion)
    on_lanes: dict[Execution, Batch] = field(default_factory=dict)


def health(
    request: Health,
    state: str,
    inventory: Inventory,
    scheduler: Scheduler,
    telemetry: Telemetry,
    undeliverable: int,
    max_message_bytes: int,
    admission: Admission,
) -> HealthReport:
    """The state of the daemon, its devices and its models, now."""
    inventory.traffic.fold()
    devices = device_infos(inventory, scheduler)
    try:
        version = inventory.registry.describe("")[1]
        if isinstance(version.model, Pipeline):  # where its first step would run
            version = inventory.registry.describe(version.model.description.models[0])[1]
        current = scheduler.route(Request(version.key, max_batch_size=0), 0)[0]
    except TensorNextError:
        current = None
    return HealthReport(
        v=VERSION,
        id=request.id,
        status=state,
        cuda_available=any(device.kind == CUDA.name and not device.error for device in scheduler.devices.values()),
        current_device=current.name if current else "",
        gpu_memory_free_mb=current.memory_free_mb if current and current.is_gpu else 0.0,
        version=__version__,
        uptime_s=telemetry.uptime_s(),
        devices=devices,
        models=model_infos(inventory, scheduler),
        queued=scheduler.queued,
        running=scheduler.running - scheduler.background,  # who asks waits for none of those
        requests=telemetry.requests,
        replies=telemetry.replies,
        errors=dict(telemetry.errors),
        undeliverable=undeliverable,
        abandoned=telemetry.abandoned,
        prediction_error_us=inventory.traffic.recent_error.mean_us,
        max_message_bytes=max_message_bytes,
        connections=sum(client.connections for client in admission),
        connections_refused=admission.refused,
        connections_cut=admission.cut,
        traffic_mb=admission.traffic_bytes / MIB,
        traffic_limit_mb=admission.max_traffic_bytes / MIB,
        traffic_owed_mb=admission.unsent / MIB,
        resent=telemetry.resent,
    )


def unavailable(state: str) -> Unavailable:
    """The refusal of a request that only a ready daemon serves."""
    return Unavailable(f"the daemon is {state}", retry_after_s=_RETRY_AFTER_S)


def stopped(what: str) -> Unavailable:
    """The error of what a daemon that stops in good order leaves undone: it can be asked of the next one."""
    return Unavailable(f"the daemon stopped before {what} was done", retry_after_s=_RETRY_AFTER_S)


def refusal(model: str, state: str, registry: Registry) -> TensorNextError:
    """The refusal of a request to a model by a daemon that is not ready. A model that failed is refused for good."""
    if state == STARTING and model:
        try:
            if not registry.awaits(model) and not registry.describe(model)[1].servable:
                return registry.why_not(model)
        except TensorNextError as error:
            return error
    return unavailable(state)


def metadata(request: Metadata, state: str, inventory: Inventory, scheduler: Scheduler) -> MetadataReport:
    """One version's signature and state.

    Raises:
        NotFound, FailedPrecondition: see `Registry.describe`.
        Unavailable: it is not known yet.
    """
    registry = inventory.registry
    if state == STARTING and registry.awaits(request.model):
        raise unavailable(state)
    return MetadataReport(
        v=VERSION, id=request.id, model=_model_info(*registry.describe(request.model), inventory, scheduler)
    )


def models(id_: int, name: str, inventory: Inventory, scheduler: Scheduler) -> ModelsReport:
    """All versions of one name, or for "" of all names."""
    infos = model_infos(inventory, scheduler)
    return ModelsReport(v=VERSION, id=id_, models=tuple(info for info in infos if name in ("", info.name)))


def comparison(request: Compare, state: str, inventory: Inventory, shadows: Shadows) -> Comparison:
    """The differences between two versions. Raises NotFound, FailedPrecondition, Unavailable."""
    deployment = inventory.registry.deployment(request.model)
    if state == STARTING:
        raise unavailable(state)
    baseline, candidate = (deployment.version(number).model for number in (request.baseline, request.candidate))
    if baseline is None or candidate is None:
        missing = request.candidate if baseline else request.baseline
        raise FailedPrecondition(f"version {missing} of {request.model!r} is not loaded")
    return shadows.report(request.id, baseline, candidate)


def reload_report(id_: int, changes: Changes, key_failures: Mapping[str, str]) -> ReloadReport:
    """The report on a reload. Args: key_failures: why the file of authorized keys was not taken, by its path."""
    return ReloadReport(
        v=VERSION,
        id=id_,
        loaded=tuple(changes.loaded),
        unloaded=tuple(changes.unloaded),
        failed={**key_failures, **changes.failed},
    )


def model_infos(inventory: Inventory, scheduler: Scheduler) -> tuple[ModelInfo, ...]:
    """All versions, and the directories that could not become one."""
    registry = inventory.registry
    infos = [_model_info(deployment, version, inventory, scheduler) for deployment, version in registry]
    titles = {version.title for _, version in registry}
    for what, why in registry.failures.items():
        if what in titles:
            continue  # told there
        name, _, number = what.partition("@")
        infos.append(ModelInfo(name=name, version=number, status="failed", error=why))
    return tuple(infos)


def device_infos(inventory: Inventory, scheduler: Scheduler) -> tuple[DeviceInfo, ...]:
    """All devices, those too that could not be opened."""
    names = dict.fromkeys([*scheduler.devices, *inventory.device_failures])
    return tuple(_device_info(name, inventory, scheduler) for name in names)


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


def _model_info(deployment: Deployment, version: Version, inventory: Inventory, scheduler: Scheduler) -> ModelInfo:
    registry, model = inventory.registry, version.model
    audit = inventory.audits.get(version)
    devices = () if model is None else _devices(model, registry, scheduler)
    traffic = deployment.traffic(version)
    state = STARTING if version.loading and version.state != READY else version.state
    if state == READY and version.unserved:
        state = FAILED
    return ModelInfo(
        name=deployment.name,
        version=version.number,
        status=state,
        default=deployment.name == registry.default,
        inputs=model.inputs if model else (),
        outputs=model.outputs if model else (),
        max_batch_size=model.max_batch_size if model else 0,
        devices=devices,
        error=version.unserved or version.error or registry.failures.get(version.title, ""),
        format=version.source.format,
        traffic=traffic,
        shadow=deployment.shadow == version.number and not traffic,
        memory_mb=version.nbytes / MIB if devices else 0.0,
        requests=inventory.traffic.requests(version),
        load_s=version.load_s,
        notes=version.notes + _restarted(model),
        example_shapes=tuple(model.example_shapes(1)) if model else (),
        state=version.kind,
        audited=audit.checked if audit else 0,
        audit_differences=audit.differing if audit else 0,
        restarts=model.restarts.count if model and model.restarts else 0,
        pipeline=_graph(model) if isinstance(model, Pipeline) else UNSET,
    )


def _devices(model: Model, registry: Registry, scheduler: Scheduler) -> tuple[str, ...]:
    """Devices that a model is on; those that the steps of a pipeline are on."""
    keys = {model.key}
    if isinstance(model, Pipeline):
        titles = [title for title in model.description.models if title in registry]
        keys = {registry.describe(title)[1].key for title in titles}
    return tuple(device.name for device in scheduler.devices.values() if keys & device.models and not device.error)


def _graph(pipeline: Pipeline) -> PipelineInfo:
    description = pipeline.description
    return PipelineInfo(
        steps=tuple(
            PipelineStep(name=step.name, model=step.model, inputs=dict(step.inputs)) for step in description.steps
        ),
        outputs=dict(description.outputs),
    )


def _restarted(model: Model | None) -> tuple[str, ...]:
    """A note about processes of a model that had to be started again."""
    if model is None or model.restarts is None or not model.restarts.count:
        return ()
    count, last = model.restarts.count, model.restarts.last
    return (f"its process was started again {f'{count} times' if count > 1 else 'once'}: {last}",)
