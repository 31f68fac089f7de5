"""Opening: from one version in a repository to a model that can be put on devices."""

from __future__ import annotations

from collections.abc import Callable

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models import pipelines
from tnxd.models.formats import compiling, examples, exported, libraries, onnx, optional, torchscript, weights
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
    if source.format == pipelines.FORMAT:
        return _open_pipeline(source, generation)
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
        replicas=settings.replicas,
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
    )


def _open_pipeline(source: RepositorySource, generation: int) -> Model:
    """A pipeline. It has no signature yet: that is what its steps' models make it."""
    try:
        files = TrustedFiles.check(
            source.guard, source.directory, require_manifest=source.require_manifest, modules=False
        )
        path, label = files.directory / pipelines.FILE, files.label(pipelines.FILE)
        with files.open(path):  # which compares before and after it is read
            description = pipelines.load(source.guard.resolve(path), label)
    except OSError as error:
        raise FailedPrecondition(f"{source.guard.label(source.directory)}: {error.strerror or error}") from error
    return pipelines.Pipeline(
        name=source.name,
        version=source.version,
        inputs=(),
        outputs=(),
        max_batch_size=0,
        factory=pipelines.no_module,
        format=source.format,
        deadline_us=source.settings.deadline_us,
        priority=source.settings.priority,
        generation=generation,
        audit=0.0,
        description=description,
        label=label,
    )
