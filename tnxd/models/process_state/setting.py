"""Settings of the process: what code can change in it, and how to read it and write it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Setting of the process that code can change and that other code depends on.

    Attributes:
        name: for people, as the object of a sentence.
        read: reads its value, which `==` compares. A setting whose `read` raises is left out.
        write: writes a value back that was read.
        watched: whether `DriftMonitor` looks at it. Libraries may rightly change some later, at their first use.
        harmless: whether nobody is harmed if a model changes it.
        describe: its name with what has changed of it, given the value before and now.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    watched: bool = True
    harmless: bool = False
    describe: Callable[[Any, Any], str] | None = None


def attribute(name: str, owner: Any, attribute: str, **options: Any) -> Setting:
    """Setting that is an attribute of a module or object."""
    return Setting(name, lambda: getattr(owner, attribute), lambda value: setattr(owner, attribute, value), **options)


def sequence(name: str, owner: Any, attribute: str, **options: Any) -> Setting:
    """Setting that is a list, restored in place: others hold references to it."""

    def write(kept: list[Any]) -> None:
        getattr(owner, attribute)[:] = kept

    return Setting(name, lambda: list(getattr(owner, attribute)), write, **options)
