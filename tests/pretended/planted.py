"""Planted defects: one line of the daemon's own code wrong, to see that the tests would notice.

A defect is a text that stands once in the source of a function, and what stands there instead. A test that plants it
fails as soon as the text is gone, so that nobody believes in a defect that is planted no more.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Defect(NamedTuple):
    """One wrong line.

    Attributes:
        what: is wrong, for the name of a test. owner: class or module of the function. function: its name.
        right: what stands there. wrong: what is planted.
    """

    what: str
    owner: Any
    function: str
    right: str
    wrong: str


@contextmanager
def planted(defect: Defect) -> Iterator[None]:
    """Have a defect for the length of a block."""
    original = vars(defect.owner)[defect.function]
    function = getattr(original, "__func__", original)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(defect.right) == 1, f"{defect.right!r} is not a line of {defect.function} any more"
    made: dict[str, Any] = {}
    code = compile(
        source.replace(defect.right, defect.wrong), "<planted>", "exec", __future__.annotations.compiler_flag
    )
    exec(code, function.__globals__, made)
    setattr(defect.owner, defect.function, made[defect.function])
    try:
        yield
    finally:
        setattr(defect.owner, defect.function, original)
