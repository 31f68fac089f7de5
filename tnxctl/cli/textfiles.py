"""Tensors written as text: JSON, which may have names, CSV, and lines. Their datatypes are those that a model takes."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tnxctl.cli.exits import FileProblem
from tnxctl.protocol.errors import InvalidArgument

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
    from tnxctl.protocol.wire import TensorSpec


def takes_strings(spec: TensorSpec) -> bool:
    """Whether an input is of strings."""
    from tnxctl.protocol.wire import BYTES  # late, as numpy below: a --help needs neither

    return spec.datatype == BYTES


def read_json(name: str, content: str) -> dict[str, Any]:
    """The values of a JSON document: lists are the only input, an object has inputs by their names.

    Args:
        name: of what is read, for error sentences.

    Raises:
        FileProblem: it is not JSON, or there is nothing in it.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"cannot read {name}: not JSON: {error}") from None
    if isinstance(value, dict):
        if not value:
            raise FileProblem(f"cannot read {name}: it holds no tensors")
        return value
    return {"": value}


def read_csv(name: str, content: str) -> dict[str, Array]:
    """The tensor of a CSV file: a row for each line, a column for each cell. A first line without numbers is a heading.

    Raises:
        FileProblem: a cell is no number, or lines have different lengths; the sentence has the line.
    """
    import numpy as np

    rows: list[list[float]] = []
    reader = csv.reader(io.StringIO(content, newline=""), skipinitialspace=True)
    try:
        for cells in reader:
            if not cells or (not rows and reader.line_num == 1 and not any(map(_is_number, cells))):
                continue
            rows.append([_number(name, reader.line_num, column, cell) for column, cell in enumerate(cells, start=1)])
            if len(rows[-1]) != len(rows[0]):
                lengths = f"{len(rows[-1])} cells, the one before has {len(rows[0])}"
                raise FileProblem(f"cannot read {name}: line {reader.line_num} has {lengths}")
    except csv.Error as error:
        raise FileProblem(f"cannot read {name}: line {reader.line_num}: {error}") from None
    if not rows:
        raise FileProblem(f"cannot read {name}: it holds no numbers")
    return {"": np.array(rows)}


def read_lines(name: str, content: bytes) -> list[bytes]:
    """The lines of a text, without what ends them. Raises FileProblem: there is none."""
    lines = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        raise FileProblem(f"cannot read {name}: it holds no text")
    return lines


def read_table(name: str, content: str, inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors of a CSV file for a model that takes strings.

    Where the first line names inputs, each column is the input of that name. Else all lines are rows of the only input.

    Raises:
        FileProblem: lines have different lengths, a cell is no number where the input takes some, or columns have no
            input; the sentence has the line.
    """
    from tnxctl.protocol.strings import array_of

    specs = {spec.name: spec for spec in inputs}
    reader = csv.reader(io.StringIO(content, newline=""), skipinitialspace=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows.extend((reader.line_num, cells) for cells in reader if cells)
    except csv.Error as error:
        raise FileProblem(f"cannot read {name}: line {reader.line_num}: {error}") from None
    heading = rows[0][1] if rows else []
    for line, cells in rows:
        if len(cells) != len(heading):
            raise FileProblem(f"cannot read {name}: line {line} has {len(cells)} cells, the first has {len(heading)}")
    if heading and len(set(heading)) == len(heading) and set(heading) <= specs.keys():
        if len(rows) == 1:
            raise FileProblem(f"cannot read {name}: it holds a heading alone")
        return {
            title: _of_cells(name, [(line, cells[at]) for line, cells in rows[1:]], at + 1, specs[title])
            for at, title in enumerate(heading)
        }
    if len(inputs) > 1:
        raise FileProblem(f"cannot read {name}: its first line has to name inputs of the model: {', '.join(specs)}")
    if not rows:
        raise FileProblem(f"cannot read {name}: it holds no text")
    elements = [cell.encode() for _, cells in rows for cell in cells]
    (spec,) = inputs
    one_axis = len(spec.shape) == 1 and 1 in (len(rows), len(heading))
    return {"": array_of(elements, (len(elements),) if one_axis else (len(rows), len(heading)))}


def _of_cells(name: str, cells: Sequence[tuple[int, str]], column_number: int, spec: TensorSpec) -> Array:
    """A column of a table. Args: cells: with their lines."""
    import numpy as np

    if takes_strings(spec):
        return column([cell.encode() for _, cell in cells], spec)
    array = np.array([_number(name, line, column_number, cell) for line, cell in cells])
    return array.reshape(_column_shape(len(cells), spec))


def column(elements: Sequence[bytes], spec: TensorSpec) -> Array:
    """Strings as a tensor with a row for each, of one element."""
    from tnxctl.protocol.strings import array_of

    return array_of(elements, _column_shape(len(elements), spec))


def _column_shape(rows: int, spec: TensorSpec) -> tuple[int, ...]:
    rank = len(spec.shape)
    return () if rows == 1 and not rank else (rows, *[1] * (rank - 1))


def strings(name: str, value: Any, spec: TensorSpec) -> Array:
    """Strings of JSON as a tensor. A list of them is a column where the input has two axes.

    Raises:
        FileProblem: something else is in it, or lists have different lengths.
    """
    from tnxctl.strings import to_bytes

    try:
        array = to_bytes(name, value)
    except InvalidArgument:
        raise FileProblem(
            f"cannot read {name}: {spec.name!r} takes strings, and it holds something else, or lists of other lengths"
        ) from None
    if array.ndim == 1 and len(spec.shape) == 2 and spec.shape[1] in (-1, 1):
        return array.reshape(-1, 1)
    return array


def numbers(name: str, value: Any) -> Array:
    """Numbers or booleans of JSON as a tensor. Raises FileProblem: it is none."""
    import numpy as np

    try:
        array: Array = np.asarray(value)
    except ValueError:
        raise FileProblem(f"cannot read {name}: its lists have different lengths, so they are no tensor") from None
    if array.dtype.kind not in "biuf":
        raise FileProblem(f"cannot read {name}: it holds something that is neither a number nor true or false")
    return array


def _is_number(cell: str) -> bool:
    return _number_of(cell) is not None


def _number(name: str, line: int, column: int, cell: str) -> float:
    number = _number_of(cell)
    if number is None:
        raise FileProblem(f"cannot read {name}: line {line}, column {column}: {cell!r} is no number")
    return number


def _number_of(cell: str) -> float | None:
    if "_" in cell:  # which Python allows between digits
        return None
    for kind in (int, float):  # a large whole number would be rounded
        try:
            return kind(cell)
        except ValueError:
            continue
    return None
