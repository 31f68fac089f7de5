"""Formats of model files, as far as they matter before a file is opened. No torch.

A new format is an entry here, and a module in `tnxd/models/formats` with an entry in its `opening.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tnxd.device_kinds import CPU


@dataclass(frozen=True)
class FileFormat:
    """A format of model files.

    Attributes:
        name: as `tnxctl models` shows it.
        file: name of the file with the model.
        index: name of the file that lists several files where the model is in them; "": it is in one.
        has_modules: whether Python modules belong to it.
        needs_factory: whether the file has weights alone, and a function in Python makes the network.
        has_signature: whether the file says inputs and outputs. Else model.toml has to.
        fixes_dtype: whether the model runs in no other datatypes than those that it was saved with.
        compiles: whether torch.export can follow its network, so that others can compile it.
        kinds: names of the kinds of devices that it runs on; empty: all.
    """

    name: str
    file: str
    index: str = ""
    has_modules: bool = False
    needs_factory: bool = False
    has_signature: bool = False
    fixes_dtype: bool = False
    compiles: bool = False
    kinds: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of which a version of this format has one."""
        return (self.file, self.index) if self.index else (self.file,)


PT2 = FileFormat("pt2", "model.pt2", has_signature=True, fixes_dtype=True, compiles=True)
SAFETENSORS = FileFormat(
    "safetensors",
    "model.safetensors",
    index="model.safetensors.index.json",
    has_modules=True,
    needs_factory=True,
    compiles=True,
)
TORCHSCRIPT = FileFormat("torchscript", "model.pt")
ONNX = FileFormat("onnx", "model.onnx", has_signature=True, fixes_dtype=True, kinds=(CPU.name,))
PIPELINE = FileFormat("pipeline", "pipeline.toml", has_signature=True, fixes_dtype=True)
"""Steps that are models themselves, see `tnxd.models.pipeline_file`."""

PYTHON = FileFormat("python", "model.py", has_modules=True, fixes_dtype=True)

FORMATS = {each.name: each for each in (PT2, SAFETENSORS, TORCHSCRIPT, ONNX, PIPELINE, PYTHON)}
"""All formats, by name."""

FILES = {file: each for each in FORMATS.values() for file in each.files}
"""Name of the file with the model -> its format."""


def has_signature(name: str) -> bool:
    """Whether the files of a format say inputs and outputs. Built-in models have no file."""
    return name in FORMATS and FORMATS[name].has_signature
