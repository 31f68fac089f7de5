"""Opening: from one version in a repository to a model that can be put on devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import msgspec
import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models import pipeline_file, pipelines, ragged
from tnxd.models.file_formats import FORMATS, ONNX, PIPELINE, PT2, PYTHON, SAFETENSORS, TORCHSCRIPT
from tnxd.models.formats import (
    channels_last,
    compiling,
    converting,
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
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import TrustedFiles
from tnxd.models.variants import AUTO, NONE, Variant

_READERS: dict[str, Callable[[RepositorySource, TrustedFiles], Opened]] = {
    PT2.name: exported.read,
    SAFETENSORS.name: weights.read,
    TORCHSCRIPT.name: torchscript.read,
    ONNX.name: onnx.read,
    PYTHON.name: python.read,
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
            modules=FORMATS[source.format].has_modules,
        )
        libraries.load(source.settings.imports, source.settings_label)
        return examples.add(_READERS[source.format](source, files), source, files)
    except OSError as error:
        where = source.guard.label(source.directory) if error.filename is None else error.filename
        raise FailedPrecondition(f"{where}: {error.strerror or error}") from error


def open_model(source: RepositorySource, generation: int) -> Model:
    """Open a version, as `tnxd.models.catalog.Source.open` promises."""
    if source.format == PIPELINE.name:
        return _open_pipeline(source, generation)
    with settings_restored("reading it") as changes:
        opened = read(source)
    settings = source.settings
    notes = opened.notes + optional.notes(opened.signature) + changes.note()
    signature, said = opened.signature, settings.ragged
    axes = None
    if said is not None:
        if said.packed and source.format != SAFETENSORS.name:
            said = msgspec.structs.replace(said, packed=False)
            notes += ("ragged.packed: for what a factory makes; this file says what it is called with, and is padded",)
        axes = ragged.resolve(said, signature, source.settings_label)
    return Model(
        name=source.name,
        version=source.version,
        inputs=signature.inputs,
        outputs=signature.outputs,
        max_batch_size=signature.max_batch_size,
        factory=opened.build,
        format=source.format,
        devices=opened.devices or FORMATS[source.format].kinds or settings.devices,
        replicas=settings.replicas or int(source.format == PYTHON.name),
        threads=settings.threads,
        max_delay_us=settings.max_delay_us,
        time_limit_s=settings.time_limit_s,
        deadline_us=settings.deadline_us,
        priority=settings.priority,
        warm_up=settings.warm_up,
        generation=generation,
        notes=notes,
        examples=signature.examples,
        optional=signature.optional,
        example_values=opened.example_values,
        writes=opened.writes,
        state=settings.state,
        audit=DEFAULT_AUDIT if settings.audit is None else settings.audit,
        batching_asked=bool(settings.max_batch_size) or (settings.ragged is not None and settings.ragged.packed),
        isolation=settings.isolation or ("thread" if source.format == PYTHON.name else "none"),
        restarts=opened.restarts,
        ragged=axes,
        optimize=settings.optimize,
        graphs=settings.graphs,
        variants=_variants(source, opened),
        reference=functools.partial(_in_own_datatype, source) if settings.dtype else None,
        text=opened.text,
    )


def _variants(source: RepositorySource, opened: Opened) -> tuple[Variant, ...]:
    """The variants of a version that are to be tried, those first that are likely to be the fastest."""
    wanted = source.settings.optimize
    if wanted == NONE or not FORMATS[source.format].compiles:
        return ()
    if opened.signature.optional:
        return ()  # an export has all its inputs
    if source.settings.ragged is not None and source.settings.ragged.packed and source.format == SAFETENSORS.name:
        return ()  # and takes what the signature says
    found = (converting.variant(source), channels_last.variant(), compiling.variant(source))
    return tuple(variant for variant in found if wanted in (AUTO, variant.name))


def _in_own_datatype(source: RepositorySource) -> torch.nn.Module:
    """The module of a version in the datatype of its weights."""
    settings = msgspec.structs.replace(source.settings, dtype="")
    return read(dataclasses.replace(source, settings=settings)).build()


def _open_pipeline(source: RepositorySource, generation: int) -> Model:
    """A pipeline. It has no signature yet: that is what its steps' models make it."""
    try:
        files = TrustedFiles.check(
            source.guard, source.directory, require_manifest=source.require_manifest, modules=False
        )
        path, label = files.directory / PIPELINE.file, files.label(PIPELINE.file)
        with files.open(path):  # which compares before and after it is read
            description = pipeline_file.load(source.guard.resolve(path), label)
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
