"""Opening: from one version in a repository to a model that can be put on devices."""

from __future__ import annotations

from collections.abc import Callable

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats import (
    compiling,
    examples,
    exported,
    libraries,
    onnx,
    optional,
    python,
    torchscript,
    weights,
)
from tnxd.models.formats.signature import Opened
from tnxd.models.model import DEFAULT_AUDIT, Model
from tnxd.models.process_state.restoration import settings_restored
from tnxd.models.repository import WITH_MODULES, RepositorySource
from tnxd.models.trust import TrustedFiles

_READERS: dict[str, Callable[[RepositorySource, TrustedFiles], Opened]] = {
    "pt2": exported.read,
    "safetensors": weights.read,
    "torchscript": torchscript.read,
    "onnx": onnx.read,
    "python": python.read,
}


def read(source: RepositorySource) -> Opened:
    """Check the files of a version, and learn its signature.

    Raises:
        TensorNextError: it cannot be served; the sentence names file and key.
    """
    try:
        files = TrustedFiles.check(
            source.guard,
            source.directory,
            require_manifest=source.require_manifest,
            modules=source.format in WITH_MODULES,
        )
        libraries.load(source.settings.imports, source.settings_label)
        return examples.add(_READERS[source.format](source, files), source, files)
    except OSError as error:
        where = source.guard.label(source.directory) if error.filename is None else error.filename
        raise FailedPrecondition(f"{where}: {error.strerror or error}") from error


def open_model(source: RepositorySource, generation: int) -> Model:
    """Open a version, as `tnxd.models.catalog.Source.open` promises."""
    with settings_restored("reading it") as changes:
        opened = read(source)
    settings = source.settings
    build = opened.build
    notes = opened.notes + optional.notes(opened.signature) + changes.note()
    if settings.compile == "inductor":
        missing = compiling.missing()
        if missing:
            notes += (f"compile: {missing}: runs eager",)
        else:
            build = compiling.lazily(source, opened)
    return Model(
        name=source.name,
        version=source.version,
        inputs=opened.signature.inputs,
        outputs=opened.signature.outputs,
        max_batch_size=opened.signature.max_batch_size,
        factory=build,
        format=source.format,
        devices=opened.devices or settings.devices,
        replicas=settings.replicas or (1 if source.format == "python" else 0),
        max_delay_us=settings.max_delay_us,
        time_limit_s=settings.time_limit_s,
        deadline_us=settings.deadline_us,
        priority=settings.priority,
        warm_up=settings.warm_up,
        generation=generation,
        notes=notes,
        examples=opened.signature.examples,
        optional=opened.signature.optional,
        example_values=opened.example_values,
        writes=opened.writes,
        state=settings.state,
        audit=DEFAULT_AUDIT if settings.audit is None else settings.audit,
        batching_asked=bool(settings.max_batch_size),
        isolation=settings.isolation or ("thread" if source.format == "python" else "none"),
        restarts=opened.restarts,
    )
