"""The tensors that --input names: in a file of some format, on standard input, or written out on the command line."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tnxctl.cli import images, tensorfiles, textfiles
from tnxctl.cli.exits import FileProblem

if TYPE_CHECKING:
    from tnxctl.protocol.frames import Array
    from tnxctl.protocol.wire import ModelInfo

_FORMATS = ".npy, .npz, .json, .csv and images"


@dataclass(frozen=True)
class Source:
    """Tensors as they were read.

    Attributes:
        name: of where they come from, for error sentences.
        tensors: by name; one without a name is a model's only input.
        has_datatypes: whether they have datatypes of their own. Text has none: its numbers take those of a model.
        image: in place of tensors.
    """

    name: str
    tensors: dict[str, Array]
    has_datatypes: bool = True
    image: Any = None

    @property
    def needs_model(self) -> bool:
        """Whether they cannot be sent without what a model's signature says."""
        return self.image is not None or not self.has_datatypes

    def fitted(self, model: ModelInfo, cast: bool) -> dict[str, Array]:
        """The tensors in the datatypes of a model, and an image in its layout.

        Args:
            cast: convert whatever there is. Otherwise a number that the datatype cannot hold is an error.

        Raises:
            InvalidArgument: they cannot be that.
        """
        from tnxctl import casting

        tensors = self.tensors
        if self.image is not None:
            tensors = {"": images.to_array(self.name, self.image, model)}
        elif not self.has_datatypes and len(model.inputs) == 1 and len(model.inputs[0].shape) == 1:
            # A line or a column of a table is what stands for a tensor of one axis.
            tensors = {name: array.ravel() if 1 in array.shape else array for name, array in tensors.items()}
        return casting.cast(tensors, model, exact=not cast)


def read(argument: str) -> Source:
    """Read what --input says: a path, - for standard input, or JSON that begins with a bracket.

    The first bytes tell the format of a file, and for text its name. Text on standard input is CSV if it does not begin
    with a bracket.

    Raises:
        FileProblem: it cannot be read, or is in no such format.
    """
    if argument.lstrip()[:1] in ("[", "{"):
        return Source("--input", textfiles.read_json("--input", argument), has_datatypes=False)
    name, content = tensorfiles.content(argument)
    if tensorfiles.is_tensors(content):
        return Source(name, tensorfiles.parse(name, content))
    if images.is_image(content):
        return Source(name, {}, image=images.decode(name, content))
    suffix = argument.lower().rpartition(".")[2]
    is_json = content[:64].removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"[", b"{")
    if content and (is_json or suffix in ("json", "csv") or argument == tensorfiles.STANDARD):
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileProblem(f"cannot read {name}: it is none of {_FORMATS}: {error}") from None
        parse = textfiles.read_json if suffix == "json" or (suffix != "csv" and is_json) else textfiles.read_csv
        return Source(name, parse(name, text), has_datatypes=False)
    what = f"starts with {content[:8]!r}" if content else "is empty"
    raise FileProblem(f"cannot read {name}: it {what}, so it is none of {_FORMATS}")
