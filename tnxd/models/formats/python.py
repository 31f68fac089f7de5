"""model.py: a model in plain Python."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxd.device_kinds import CPU, PROCESS
from tnxd.models import structures
from tnxd.models.formats import optional
from tnxd.models.formats.signature import Opened, Signature, declared
from tnxd.models.process_state import monkey_patches
from tnxd.models.python.instance import Code, Instance, Plan, default_workers
from tnxd.models.python.module import InProcess, InThread
from tnxd.models.python.processes import Processes, Restarts
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import TrustedFiles

FILE = "model.py"


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    label = files.label(FILE)
    signature = declared(source.settings, source.settings_label, label)
    plan = _plan(source, files, signature)
    if source.settings.isolation == PROCESS.name:
        return _in_processes(source, plan, signature, label)
    return _in_threads(source, plan, signature, label)


def _plan(source: RepositorySource, files: TrustedFiles, signature: Signature) -> Plan:
    return Plan(
        name=source.name,
        version=source.version,
        config=source.settings.config,
        inputs=signature.inputs,
        outputs=signature.outputs,
        batches=bool(signature.max_batch_size),
        workers=default_workers(),
        root=str(files.guard.root),
        owners=tuple(files.guard.owners),
        directory=str(files.directory),
        shared=str(files.shared),
        code=tuple(map(str, files.code)),
        identities={str(path): identity for path, identity in files.identities.items()},
        memory_limit_mb=source.settings.memory_limit_mb,
    )


def _in_threads(source: RepositorySource, plan: Plan, signature: Signature, label: str) -> Opened:
    settings = source.settings
    code = Code(plan)
    replaced = monkey_patches.undo()
    if replaced:
        raise FailedPrecondition(f"{label}: {monkey_patches.sentence('importing it', replaced)}")
    first = [Instance(code)]
    signature = _with_optional(source, signature, label, first[0].optional)
    limit_s = settings.time_limit_s or source.limits.batch_s

    def build() -> torch.nn.Module:
        return InThread(code, first, settings.replicas or 1, limit_s)

    devices: tuple[str, ...] = ()
    if code.framework == "numpy":
        if settings.devices and CPU.name not in settings.devices:
            raise InvalidArgument(
                f"{source.settings_label}: devices: {label} takes arrays of numpy, which are on the CPU: "
                f'framework = "torch" in its class has it get tensors'
            )
        devices = (CPU.name,)
    return Opened(signature, build, devices=devices)


def _in_processes(source: RepositorySource, plan: Plan, signature: Signature, label: str) -> Opened:
    settings = source.settings
    limits = replace(source.limits, batch_s=settings.time_limit_s or source.limits.batch_s)
    replicas = settings.replicas or 1
    restarts = Restarts()
    first = [Processes(plan, replicas, limits, restarts)]
    empty = inspect.Parameter.empty
    arguments = {name: None if has_default else empty for name, has_default in first[0].defaults.items()}
    signature = _with_optional(source, signature, label, arguments)

    def build() -> torch.nn.Module:
        return InProcess(first.pop() if first else Processes(plan, replicas, limits, restarts), plan.outputs)

    return Opened(signature, build, devices=(PROCESS.name,), restarts=restarts)


def _with_optional(
    source: RepositorySource, signature: Signature, label: str, arguments: Mapping[str, Any]
) -> Signature:
    """The signature with the inputs that may be left out, since the code has a default for them."""
    names = structures.tree([spec.name for spec in signature.inputs])
    ordered = {name: arguments.get(name, inspect.Parameter.empty) for name in names}
    return optional.resolve(signature, source.settings, source.settings_label, label, ordered)
