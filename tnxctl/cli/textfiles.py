"""Tensors written as text: JSON, which may have names, and CSV. Their datatypes are those that a model takes."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Any

from tnxctl.cli.exits import FileProblem

if TYPE_CHECKING:
    from tnxctl.protocol.frames import Array


def read_json(name: str, content: str) -> dict[str, Array]:
    """Tensors of JSON: lists of numbers are the only input, an object has inputs by their names.

    Args:
        name: of what is read, for error sentences.

    Raises:
        FileProblem: it is not JSON, or something in it is no array of numbers or booleans.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileProblem(f"cannot read {name}: not JSON: {error}") from None
    if isinstance(value, dict):
        if not value:
            raise FileProblem(f"cannot read {name}: it holds no tensors")
        return {key: _array(f"{name}, {key!r}", item) for key, item in value.items()}
    return {"": _array(name, value)}


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


def _array(name: str, value: Any) -> Array:
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
