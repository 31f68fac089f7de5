"""What exceptions say, as far as an error reply can carry it. They may be of any class, with any __str__."""

from __future__ import annotations

from tnxctl.errors import TensorNextError


def first_line(error: BaseException) -> str:
    """The first line of its message, in UTF-8."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be shown)"
    return (text.splitlines() or [""])[0][:200].encode("utf-8", "replace").decode()


def sentence(error: BaseException) -> str:
    """What is wrong: our own errors say it in words, of others the class belongs to it."""
    if isinstance(error, TensorNextError):
        return error.message
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
