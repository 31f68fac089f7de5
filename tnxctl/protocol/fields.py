"""Types of the fields that headers have. A field with a bound is refused before it is decoded."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from tnxctl.protocol.limits import MAX_ID, MAX_RANK

Name = Annotated[str, msgspec.Meta(max_length=1024)]
Title = Annotated[str, msgspec.Meta(max_length=256)]
Word = Annotated[str, msgspec.Meta(max_length=64)]


BYTES = "BYTES"
"""Datatype of strings and blobs, see `tnxctl.protocol.strings`: the one whose elements have no fixed size."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Name, datatype and shape of one tensor, on the wire as `[name, datatype, [d0, d1, ...]]`.

    In a message the shape is that of the frame that follows; in a model's signature an axis of -1 takes any length.
    """

    name: Name
    datatype: Word
    shape: Annotated[tuple[int, ...], msgspec.Meta(max_length=MAX_RANK)]


class Span(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Some bytes of shared memory, on the wire as `[offset, nbytes]`, see `tnxctl.protocol.shared_memory`."""

    offset: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]


Id = Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
Version = Literal[1]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]  # NaN is not >= 0 either
