"""Edits of TOML texts that people write: tables come and go, all else stays as it is, comments included.

Tables are found line by line, by their headers: `[keys.alice]`. The editors of a file parse what comes out and hold it
against what they meant, so whatever else TOML allows is refused, and not spoilt.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence

_HEADER = re.compile(r"\s*\[")
_KEY = re.compile(r"""\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[A-Za-z0-9_-]+))\s*=""")
_BARE = re.compile(r"[A-Za-z0-9_-]+")

Value = str | int | float


def line_of(text: str, steps: Sequence[str]) -> int:
    """Number of the line where a key or a table stands, or the nearest table around it; 0 if nothing is found."""
    best, depth = 0, 0
    for number, table, key in _lines(text):
        found = (*table, key) if key else table
        common = min(len(found), len(steps))
        if depth < common and tuple(steps[:common]) == found[:common]:
            best, depth = number, common
    return best


def append_table(text: str, steps: Sequence[str], values: Mapping[str, Value]) -> str:
    """The text with a table at its end."""
    lines = [f"[{'.'.join(map(_key, steps))}]", *(f"{_key(key)} = {_value(value)}" for key, value in values.items())]
    if text and not text.endswith("\n"):
        text += "\n"
    return "".join((text, "\n" if text.strip() else "", *(f"{line}\n" for line in lines)))


def remove_table(text: str, steps: Sequence[str]) -> str:
    """The text without a table. Lines in it that are comments stay."""
    inside, kept = False, []
    tables = {number: table for number, table, key in _lines(text) if not key}
    for number, line in enumerate(text.split("\n"), 1):
        if number in tables:
            inside = tables[number] == tuple(steps)
        if not inside or line.lstrip().startswith("#"):
            kept.append(line)
    return "\n".join(kept)


def _lines(text: str) -> Iterator[tuple[int, tuple[str, ...], str]]:
    """Lines with a header, "" as their key, and lines with a key: their number, the table, and the key."""
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.split("\n"), 1):
        if _HEADER.match(line):
            header = _header(line.rstrip("\r"))
            if header is not None:
                table = header
                yield number, table, ""
            continue
        key = _KEY.match(line)
        if key is not None:
            yield number, table, next(part for part in key.groups() if part is not None)


def _header(line: str) -> tuple[str, ...] | None:
    """Keys of the header in a line; None if it holds none, as a line of an array may."""
    try:
        tables: object = tomllib.loads(line)
    except tomllib.TOMLDecodeError:
        return None
    steps = []
    while isinstance(tables, list | dict) and tables:
        if isinstance(tables, list):
            tables = tables[0]
        else:
            ((step, tables),) = tables.items()
            steps.append(step)
    return tuple(steps)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Value) -> str:
    """A value in TOML. A string must be of printable ASCII."""
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)
