"""TOML files into frozen Structs; a mistake is named with file and key, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from tnxctl.errors import FailedPrecondition, InvalidArgument
from tnxd import files

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
        settings: dict[str, Any] = msgspec.toml.decode(files.read(path, label))
    except OSError as error:
        raise InvalidArgument(f"{label}: {error.strerror}") from None
    except FailedPrecondition as error:
        raise InvalidArgument(error.message) from None
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # as numbers too long, nested too deep
        raise InvalidArgument(f"{label}: not TOML: {error}") from None
    return settings


def convert(settings: Mapping[str, Any], kind: type[T], label: str) -> T:
    """Settings as a Struct of that kind.

    Raises:
        InvalidArgument: a key is unknown or a value is out of range: "LABEL: KEY: what is expected, not VALUE".
    """
    try:
        return msgspec.convert(settings, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{label}: {_in_words(error, settings, kind)}") from None


_PLACE = re.compile(r" - at `(?:key in )?\$(?P<path>[^`]*)`$")
_ODD_KEY = re.compile(r"Object (?P<what>contains unknown|missing required) field `(?P<key>[^`]*)`")
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+)\]")


def _in_words(error: msgspec.ValidationError, settings: Mapping[str, Any], kind: type) -> str:
    """msgspec says what it expected where; put the key first, and the value last."""
    text = str(error)
    place = _PLACE.search(text)
    path = "" if place is None else place["path"].removesuffix("[...]")
    key = path.removeprefix(".")
    odd = _ODD_KEY.match(text)
    if odd is not None:
        problem = "unknown key" if odd["what"] == "contains unknown" else "is missing"
        return f"{key}{'.' if key else ''}{odd['key']}: {problem}"
    what = (text if place is None else text[: place.start()]).replace("`", "")
    what = what[0].lower() + what[1:]
    if not key:
        return what
    steps: list[str | int] = [
        step["key"] if step["index"] is None else int(step["index"]) for step in _STEP.finditer(path)
    ]
    if "invalid enum value" in what:
        what = f"expected one of {', '.join(map(str, _choices(inspect.type_info(kind), steps)))}"
    value: Any = settings
    try:
        for step in steps:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        return f"{key}: {what}"
    return f"{key}: {what}" if isinstance(value, Mapping) else f"{key}: {what}, not {value!r}"


def _choices(kind: inspect.Type, steps: Sequence[str | int]) -> list[Any]:
    """Literals that are allowed at that place."""
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
