"""Sentences about failures, for error replies: short, in UTF-8, whatever class and `__str__` an exception has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tnxctl.protocol.errors import TensorNextError

_LENGTH = 200

# What is looked at of a message, from its begin and from its end: some show a whole tensor, and to search a megabyte of
# text holds the GIL for a third of a second.
_MOST_CHARACTERS = 16 * 1024

_MOST_CAUSES = 20

# Where TorchScript has shown the line at fault; what went wrong comes after it.
_HERE = "<--- HERE"

_LOCATION = re.compile(r"\s|Traceback of TorchScript|.*\(\d+\): [\w<>]+$")
"""Line of source, or of the stack of a module that was made by tracing."""

_OPERATOR = re.compile(
    r"Unknown builtin op: (?P<a>\w+::\w+)"  # torch.jit.load
    r"|failed to resolve torch\.ops\.(?P<b>\w+\.\w+)"  # torch.export.load
    r"|'_OpNamespace' '(?P<c>\w+)' object has no attribute '(?P<d>\w+)'"
    r"|(?:No such operator|Could not find schema for) (?P<e>\w+::\w+)"
)
_CLASS = re.compile(r"(?:Deserializing|namedtuple class) (?P<name>[\w.]+) (?:in pytree is not registered|because)")


def first_line(error: BaseException) -> str:
    """First line of an exception's message."""
    return _clean((_text(error).splitlines() or [""])[0])


def sentence(error: BaseException) -> str:
    """Sentence about an exception, and at its end the first cause: our own errors in words, others with their class."""
    if isinstance(error, TensorNextError):
        return error.message
    said, why = _said(error), cause(error)
    return said if why in said else f"{said}: {why}"


def cause(error: BaseException) -> str:
    """First cause of an exception in one line, along the chain of `raise ... from`."""
    for _ in range(_MOST_CAUSES):
        if error.__cause__ is None:
            break
        error = error.__cause__
    return error.message if isinstance(error, TensorNextError) else _said(error)


def named(failures: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each failure, by name of what failed: the reason, behind that name unless it begins so."""
    return (why if why.startswith(what) else f"{what}: {why}" for what, why in failures.items())


def _said(error: BaseException) -> str:
    text = _text(error)
    operator = _OPERATOR.search(text)
    if operator is not None:
        name = "::".join(part for part in operator.groups() if part).replace(".", "::")
        return (
            f"the operator {name} is not registered: the library that has it belongs into imports of model.toml, "
            f'as in imports = ["{name.partition("::")[0]}"]'
        )
    kind = _CLASS.search(text)
    if kind is not None:
        module = kind["name"].rpartition(".")[0]
        return (
            f"the class {kind['name']} is not registered with torch: the module that does so belongs into imports of "
            f'model.toml, as in imports = ["{module}"]'
        )
    if _HERE in text:  # the lines after it say what they had to say in Python, after the class of the interpreter's own
        return _clean(re.sub(r"^RuntimeError: (?=\w+(?:Error|Exception): )", "", " ".join(_after(text).split())))
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _after(text: str) -> str:
    """Message of TorchScript behind the lines of source, which are indented, and behind the stack of a trace."""
    lines = text.rpartition(_HERE)[2].splitlines()
    start = next((at for at, line in enumerate(lines) if line and not _LOCATION.match(line)), len(lines))
    return "\n".join(lines[start:]) or text


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        return "(its message cannot be shown)"
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else text[:half] + text[-half:]


def _clean(line: str) -> str:
    return line[:_LENGTH].encode("utf-8", "replace").decode()
