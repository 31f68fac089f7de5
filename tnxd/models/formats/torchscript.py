"""model.pt: TorchScript, which torch has deprecated in favour of torch.export."""

from __future__ import annotations

import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import cause
from tnxd.models.file_formats import PT2, TORCHSCRIPT
from tnxd.models.formats import ignore_warnings_about_torch_itself, libraries, optional
from tnxd.models.formats.calling import arranged, check_names, defaults
from tnxd.models.formats.precision import Precision
from tnxd.models.formats.signature import Opened, check_for_torch, declared
from tnxd.models.formats.writes import written_by_script
from tnxd.models.repository import RepositorySource
from tnxd.models.trust import TrustedFiles

NOTE = f"TorchScript is deprecated by torch: export the model anew with torch.export, as {PT2.file}"


def read(source: RepositorySource, files: TrustedFiles) -> Opened:
    """See `tnxd.models.formats.opening.read`."""
    settings = source.settings
    label = files.label(TORCHSCRIPT.file)
    signature = declared(settings, source.settings_label, label)
    check_names(signature, source.settings_label)
    check_for_torch(signature, source.settings_label)

    def load() -> torch.jit.ScriptModule:
        ignore_warnings_about_torch_itself()
        with files.open(files.directory / TORCHSCRIPT.file) as file:
            try:
                # By the path of the open file: of a file object, torch would make a copy.
                module: torch.jit.ScriptModule = torch.jit.load(  # type: ignore[no-untyped-call]
                    f"/proc/self/fd/{file.fileno()}", map_location="cpu"
                )
            except Exception as error:  # torch raises many kinds for a damaged file
                raise FailedPrecondition(f"{label}: damaged, or not TorchScript: {cause(error)}") from None
        return module.eval()

    first = [load()]  # for the first build, and held no longer
    notes = (NOTE, *libraries.note(libraries.of_script(first[0]), settings.imports, label))
    writes = written_by_script(first[0])
    signature = optional.resolve(signature, settings, source.settings_label, label, defaults(first[0]))

    def build() -> torch.nn.Module:
        module = arranged(
            first.pop() if first else load(), [spec.name for spec in signature.inputs], signature.optional
        )
        if settings.dtype:
            module = Precision(module, getattr(torch, settings.dtype), signature.outputs)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module.eval()

    return Opened(signature, build, notes=notes, writes=writes)
