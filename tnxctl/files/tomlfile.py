"""TOML files, read into frozen Structs. Errors name file and key, and the line where the text is at hand, in words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from tnxctl.files import reading, tomledit
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument

T = TypeVar("T")


def read(path: Path, label: str = "") -> dict[str, Any]:
    """Read a TOML file.

    Args:
        label: what to call the file in errors; its path without one.

    Raises:
        InvalidArgument: it cannot be read, is no file or a large one, or is not TOML.
    """
    label = label or str(path)
    try:
        content = reading.read(path, label)
    except OSError as error:
        raise InvalidArgument(f"{label}: {error.strerror}") from None
    except FailedPrecondition as error:
        raise InvalidArgument(error.message) from None
    return parse(content, label)


def parse(content: bytes | str, label: str) -> dict[str, Any]:
    """The settings that a TOML text holds.

    Raises:
        InvalidArgument: it is not TOML.
    """
    try:
        settings: dict[str, Any] = msgspec.toml.decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # as numbers too long, nested too deep
        raise InvalidArgument(f"{label}: not TOML: {error}") from None
    return settings


def convert(settings: object, kind: type[T], label: str, *, text: str = "", at: Sequence[str] = ()) -> T:
    """Settings as a Struct.

    Args:
        kind: class of the Struct.
        label: what to call the file in errors.
        text: content of the file, for the line.
        at: keys of the table in the file that the settings are; empty: they are all of it.

    Raises:
        InvalidArgument: a key is unknown or a value is out of range: "LABEL: KEY: what is expected, not VALUE", or
            "LABEL:LINE: KEY: ..." with a text.
    """
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        key, what = _in_words(error, settings, kind)
        steps = (*at, *map(str, _steps(f".{key}")))
        name = ".".join(filter(None, (*at, key)))
        raise InvalidArgument(f"{where(label, text, steps)}: {name}{': ' if name else ''}{what}") from None


@contextlib.contextmanager
def placed(label: str, text: str, steps: Sequence[str]) -> Iterator[None]:
    """Add the place of a key to errors about its value."""
    try:
        yield
    except InvalidArgument as error:  # only now: to find a line takes as long as the text
        raise InvalidArgument(f"{where(label, text, steps)}: {error.message}") from None


def where(label: str, text: str, steps: Sequence[str]) -> str:
    """The place of a key in errors: "LABEL:LINE", or the label alone where the line is not found."""
    line = tomledit.line_of(text, steps)
    return f"{label}:{line}" if line else label


_PLACE = re.compile(r" - at (?:`key` in )?`(?:key in )?\$(?P<path>[^`]*)`$")
_ODD_KEY = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<key>[^`]*)`")
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+)\]")


def _in_words(error: msgspec.ValidationError, settings: object, kind: type) -> tuple[str, str]:
    """Error of msgspec in words: the key, "" for all of it, then what is expected there, and the value last."""
    text = str(error)
    place = _PLACE.search(text)
    path = "" if place is None else place["path"].removesuffix("[...]")
    key = path.removeprefix(".")
    odd = _ODD_KEY.match(text)
    if odd is not None:
        whole = f"{key}{'.' if key else ''}{odd['key']}"
        if odd["what"] != "contains unknown":
            return whole, "is missing"
        return whole, f"unknown key{_meant(odd['key'], inspect.type_info(kind), _steps(path))}"
    what = (text if place is None else text[: place.start()]).replace("`", "")
    what = what[0].lower() + what[1:]
    if not key:
        return key, what
    steps = _steps(path)
    if "invalid enum value" in what:
        what = f"expected one of {', '.join(map(str, _choices(inspect.type_info(kind), steps)))}"
    value: Any = settings
    try:
        for step in steps:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return key, what
    return key, what if isinstance(value, Mapping) else f"{what}, not {value!r}"


def _steps(path: str) -> list[str | int]:
    return [step["key"] if step["index"] is None else int(step["index"]) for step in _STEP.finditer(path)]


def _meant(key: str, kind: inspect.Type, steps: Sequence[str | int]) -> str:
    """Question whether a similar key was meant, with a comma before it; "" if none is similar."""
    table = _struct_at(kind, steps)
    names = [field.encode_name for field in table.fields] if table else []
    close = get_close_matches(key, names, 1) or _elsewhere(key, kind)
    return f", did you mean {close[0]}?" if close else ""


def _elsewhere(key: str, kind: inspect.Type) -> list[str]:
    """Keys of the same name in the tables, as TABLE.KEY."""
    whole = _struct_at(kind, ())
    tables = {field.encode_name: _struct_at(field.type, ()) for field in whole.fields} if whole else {}
    return [
        f"{name}.{key}"
        for name, table in tables.items()
        if table is not None and any(field.encode_name == key for field in table.fields)
    ]


def _struct_at(kind: inspect.Type, steps: Sequence[str | int]) -> inspect.StructType | None:
    """Table at a place; None if there is none."""
    if isinstance(kind, inspect.Metadata):
        return _struct_at(kind.type, steps)
    if isinstance(kind, inspect.UnionType):
        return next(filter(None, (_struct_at(part, steps) for part in kind.types)), None)
    if isinstance(kind, inspect.VarTupleType | inspect.ListType) and steps:
        return _struct_at(kind.item_type, steps[1:])
    if not isinstance(kind, inspect.StructType):
        return None
    if not steps:
        return kind
    return next((_struct_at(field.type, steps[1:]) for field in kind.fields if field.encode_name == steps[0]), None)


def _choices(kind: inspect.Type, steps: Sequence[str | int]) -> list[Any]:
    """Literals that are allowed at a place."""
    if isinstance(kind, inspect.Metadata):
        return _choices(kind.type, steps)
    if isinstance(kind, inspect.UnionType):
        return [choice for part in kind.types for choice in _choices(part, steps)]
    if isinstance(kind, inspect.LiteralType) and not steps:
        return list(kind.values)
    if isinstance(kind, inspect.StructType) and steps:
        return [choice for field in kind.fields if field.name == steps[0] for choice in _choices(field.type, steps[1:])]
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)) and steps:
        return _choices(kind.item_type, steps[1:])
    return []
