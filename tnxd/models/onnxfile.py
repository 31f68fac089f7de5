"""Facts in an ONNX file that onnxruntime does not tell: files beside it with its tensors, tensors without a rank.

An ONNX file is one protobuf message (onnx.proto3). A walk over its fields finds both without a library: fields that do
not lead there, such as the weights themselves, are passed over by their length.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import overload

# Message -> number of a field -> the message in it. Only what leads to a tensor or to the shape of an input or output.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node"},
    "Graph": {1: "Node", 5: "Tensor", 11: "Value", 12: "Value", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_KEY, _VALUE = 1, 2
_NAME, _TYPE, _TENSOR_TYPE, _SHAPE = 1, 2, 1, 2

_WINDOW = 1 << 16

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class OnnxFile:
    """The facts of interest in an ONNX file.

    Attributes:
        beside: paths of the files that its tensors are in, as they stand there.
        unranked: names of the inputs and outputs that are tensors with any number of axes.
    """

    beside: set[str] = field(default_factory=set)
    unranked: set[str] = field(default_factory=set)


class _Window:
    """A file as if it were bytes, of which a part is in memory. No mapping: one that is cut short ends the process."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file.fileno()
        self._start = 0
        self._part = b""

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> bytes: ...
    def __getitem__(self, at: int | slice) -> int | bytes:
        if isinstance(at, slice):
            return os.pread(self._file, at.stop - at.start, at.start)
        place = at - self._start
        if not 0 <= place < len(self._part):
            self._start, place = at, 0
            self._part = os.pread(self._file, _WINDOW, at)
            if not self._part:
                raise ValueError("the file was cut short")
        return self._part[place]


_View = _Window | bytes


def read(content: bytes) -> OnnxFile:
    """Walk over the content of an ONNX file. Raises ValueError: it is damaged."""
    found = OnnxFile()
    _walk(content, 0, len(content), "Model", found)
    return found


def size(path: Path) -> int:
    """Bytes of an ONNX file and of the files beside it that have its tensors; of the file alone if it is damaged."""
    nbytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            found = OnnxFile()
            _walk(_Window(file), 0, nbytes, "Model", found)
        places = {path.parent / name for name in found.beside}
        return nbytes + sum(place.stat().st_size for place in places if place.is_file())
    except (ValueError, RecursionError):
        return nbytes


def _walk(view: _View, start: int, end: int, message: str, found: OnnxFile) -> None:
    if message == "Entry":
        entry = {number: view[first:last] for number, first, last in _fields(view, start, end)}
        if entry.get(_KEY) == b"location":
            found.beside.add(entry.get(_VALUE, b"").decode("utf-8", "replace"))
        return
    if message == "Value":
        name, ranked = _value(view, start, end)
        if not ranked:
            found.unranked.add(name)
        return
    inside = _FIELDS[message]
    for number, first, last in _fields(view, start, end):
        if number in inside:
            _walk(view, first, last, inside[number], found)


def _value(view: _View, start: int, end: int) -> tuple[str, bool]:
    """Name of an input or output, and whether its rank is known; what is no tensor counts as known."""
    name, ranked = "", True
    for number, first, last in _fields(view, start, end):
        if number == _NAME:
            name = view[first:last].decode("utf-8", "replace")
        elif number == _TYPE:
            for kind, inner, stop in _fields(view, first, last):
                if kind == _TENSOR_TYPE:
                    ranked = any(part == _SHAPE for part, _, _ in _fields(view, inner, stop))
    return name, ranked


def _fields(view: _View, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Numbers and places of the fields of a message that have a length. Raises ValueError: it ends too soon."""
    at = start
    while at < end:
        tag, at = _varint(view, at, end)
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(view, at, end)
            if length > end - at:
                raise ValueError("a field is longer than the file")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(view, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"there is no wire type {kind}")


def _varint(view: _View, at: int, end: int) -> tuple[int, int]:
    """A number of variable length, and where the next begins."""
    value = shift = 0
    while at < end and shift < 64:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("a number does not end")
