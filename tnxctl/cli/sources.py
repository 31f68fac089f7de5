"""The tensors that --input names: in a file of some format, on standard input, or written out on the command line."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tnxctl.cli import images, tensorfiles, textfiles
from tnxctl.cli.exits import FileProblem

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
    from tnxctl.protocol.wire import ModelInfo, TensorSpec

_FORMATS = ".npy, .npz, .json, .csv and images"

Kind = Literal["tensors", "json", "csv", "lines", "image", "other"]


@dataclass(frozen=True)
class Source:
    """Tensors as they were read.

    Attributes:
        name: of where they come from, for error sentences.
        kind: what its bytes look like. Only tensors have datatypes of their own: all else takes those of a model.
        tensors: by name, or the parts of a JSON document; one without a name is a model's only input.
        content: what was read, of the other kinds.
    """

    name: str
    kind: Kind
    tensors: dict[str, Any]
    content: bytes = b""

    @property
    def needs_model(self) -> bool:
        """Whether they cannot be sent without what a model's signature says."""
        return self.kind != "tensors"

    def fitted(self, model: ModelInfo, cast: bool) -> dict[str, Array]:
        """The tensors in the datatypes of a model, and an image in its layout.

        A model whose only input is BYTES gets text line by line, and any other file as it is, as one element.

        Args:
            cast: convert whatever there is. Otherwise a number that the datatype cannot hold is an error.

        Raises:
            FileProblem: they are in no format that the model can have.
            InvalidArgument: they cannot be that.
        """
        from tnxctl import casting

        return casting.cast(self._read(model), model, exact=not cast)

    def _read(self, model: ModelInfo) -> dict[str, Array]:
        if self.kind == "tensors":
            return self.tensors
        only = model.inputs[0] if len(model.inputs) == 1 else None
        if only is not None and textfiles.takes_strings(only) and self.kind in ("lines", "image", "other"):
            is_text = self.kind == "lines"
            elements = textfiles.read_lines(self.name, self.content) if is_text else [self.content]
            return {"": textfiles.column(elements, only)}
        if self.kind == "json":
            return _of_json(self.name, self.tensors, model)
        if self.kind == "lines" and _is_json(self.content):
            return _of_json(self.name, textfiles.read_json(self.name, self._text()), model)
        if self.kind == "image":
            return {"": images.to_array(self.name, images.decode(self.name, self.content), model)}
        if self.kind == "other":
            raise _none_of(self.name, self.content)
        if any(map(textfiles.takes_strings, model.inputs)):
            return textfiles.read_table(self.name, self._text(), model.inputs)
        tensors = textfiles.read_csv(self.name, self._text())
        if only is not None and len(only.shape) == 1:
            # A line or a column of a table is what stands for a tensor of one axis.
            return {name: array.ravel() if 1 in array.shape else array for name, array in tensors.items()}
        return tensors

    def _text(self) -> str:
        return _decoded(self.name, self.content)


def _is_json(content: bytes) -> bool:
    """Whether text begins as JSON that holds tensors does."""
    return content[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileProblem(f"cannot read {name}: it is none of {_FORMATS}: {error}") from None


def _of_json(name: str, values: dict[str, Any], model: ModelInfo) -> dict[str, Array]:
    specs: dict[str, TensorSpec] = {spec.name: spec for spec in model.inputs}
    if len(model.inputs) == 1:
        specs[""] = model.inputs[0]
    tensors = {}
    for key, value in values.items():
        called = f"{name}, {key!r}" if key else name
        if key in specs and textfiles.takes_strings(specs[key]):
            tensors[key] = textfiles.strings(called, value, specs[key])
        else:
            array = textfiles.numbers(called, value)
            is_line = len(model.inputs) == 1 and len(model.inputs[0].shape) == 1 and 1 in array.shape
            tensors[key] = array.ravel() if is_line else array
    return tensors


def read(argument: str) -> Source:
    """Read what --input says: a path, - for standard input, or JSON that begins with a bracket.

    The first bytes tell the format of a file, and for text its name. Text on standard input that does not begin with a
    bracket is CSV, or lines for a model whose only input is BYTES.

    Raises:
        FileProblem: it cannot be read, or is in no format at all.
    """
    if argument.lstrip()[:1] in ("[", "{"):
        return Source("--input", "json", textfiles.read_json("--input", argument))
    name, content = tensorfiles.content(argument)
    if tensorfiles.is_tensors(content):
        return Source(name, "tensors", tensorfiles.parse(name, content))
    if images.is_image(content):
        return Source(name, "image", {}, content)
    suffix = argument.lower().rpartition(".")[2]
    if not content or f".{suffix}" in tensorfiles.ARRAYS:
        raise _none_of(name, content)
    if suffix == "json" or (suffix not in ("csv", "txt") and _is_json(content)):
        return Source(name, "json", textfiles.read_json(name, _decoded(name, content)))
    if suffix in ("csv", "txt") or argument == tensorfiles.STANDARD:
        return Source(name, "csv" if suffix == "csv" else "lines", {}, content)
    return Source(name, "other", {}, content)


def _none_of(name: str, content: bytes) -> FileProblem:
    what = f"starts with {content[:8]!r}" if content else "is empty"
    return FileProblem(f"cannot read {name}: it {what}, so it is none of {_FORMATS}")
