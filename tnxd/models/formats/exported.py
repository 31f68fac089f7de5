"""model.pt2: a program of torch.export, which knows its signature."""

from __future__ import annotations

import contextlib
import logging
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import cause
from tnxd.models.file_formats import PT2
from tnxd.models.formats import classes, ignore_warnings_about_torch_itself, libraries, optional
from tnxd.models.formats.description import describe
from tnxd.models.formats.program import Program
from tnxd.models.formats.signature import DEFAULT_MAX_BATCH_SIZE, Opened, resolve
from tnxd.models.formats.writes import written
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import TrustedFiles


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    label = files.label(PT2.file)
    settings = source.settings
    program = load(files, label)
    description = describe(
        program,
        label,
        settings.max_batch_size or DEFAULT_MAX_BATCH_SIZE,
        [tensor.name for tensor in settings.outputs],
    )
    signature = resolve(description.found, settings, source.settings_label, label)
    signature = optional.resolve(signature, settings, source.settings_label, label, None)
    description = replace(description, returned=tuple(description.returned[index] for index in signature.returned))
    if signature.max_batch_size:
        description = replace(description, conditions=description.conditions.without_rows())
    writes = written(program)
    notes = description.notes + libraries.note(libraries.of_program(program), settings.imports, label)
    notes += tuple(f"{label} was exported in training mode: {what}" for what in _training(program))
    values = description.found.example_values
    description = replace(description, found=replace(description.found, example_values={}))  # it stays in memory
    first = [program]  # for the first build, and held no longer
    del program

    def build() -> torch.nn.Module:
        return Program(first.pop() if first else load(files, label), description)

    return Opened(signature, build, notes, writes=writes, example_values=values)


def load(files: TrustedFiles, label: str) -> ExportedProgram:
    """The program in a file. It is code: torch unpickles a part of it.

    Raises:
        FailedPrecondition: it is damaged, or made for another torch.
    """
    ignore_warnings_about_torch_itself()
    with files.open(files.directory / PT2.file) as file:
        if not zipfile.is_zipfile(file):
            raise FailedPrecondition(f"{label}: incomplete, or not a program of torch.export")
        while True:
            file.seek(0)
            with _logged_errors() as logged:
                try:
                    return _without_tokens(torch.export.load(file))
                except Exception as error:  # whatever torch stumbles over
                    why = logged[-1] if logged else error
                    if classes.stand_in(why):
                        continue
                    raise FailedPrecondition(
                        f"{label}: torch {torch.__version__} cannot load it: {cause(why)}"
                    ) from error


def _without_tokens(program: ExportedProgram) -> ExportedProgram:
    """The program without the tokens that order its side effects, such as checks of matrices after decomposing.

    `ExportedProgram.module` drops them in the same way, since a graph runs in order anyway.
    """
    if any(spec.kind is InputKind.TOKEN for spec in program.graph_signature.input_specs):
        from torch.export._remove_effect_tokens_pass import _remove_effect_tokens

        program = _remove_effect_tokens(program)
        program.graph_module.recompile()
    return program


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[BaseException]]:
    """Errors that torch.export only logs, before it raises another that refers to the log."""
    thread = threading.get_ident()
    errors: list[BaseException] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if record.thread != thread or error is None:
            return True
        errors.append(error)
        return False

    log = logging.getLogger("torch.export")
    log.addFilter(keep)
    try:
        yield errors
    finally:
        log.removeFilter(keep)


def _training(program: ExportedProgram) -> list[str]:
    """Things that a program does only in training, because its network was in that mode when it was exported."""
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function":
            name = str(node.target)
            if name == "aten.dropout.default" and len(node.args) > 2 and node.args[2]:
                found.add("its dropout makes answers random")
            if name == "aten.batch_norm.default" and node.args[5]:
                found.add("its batch norm mixes the rows of a batch")
    return sorted(found)
