"""Times that tests let pass on purpose: short ones, and longer ones where the machine stands still meanwhile."""

from __future__ import annotations

from collections.abc import Iterator


def longer_each_time(first_s: float, most_s: float = 120.0) -> Iterator[float]:
    """Times in seconds, each four times the one before.

    For what has to run out of its time, but only after something else has happened. Where the machine stands still, it
    runs out before that, and the test tries again with more. A daemon or client that is wrong fails with any of them.

    Raises:
        AssertionError: the last of them was not enough either.
    """
    seconds = first_s
    while seconds <= most_s:
        yield seconds
        seconds *= 4
    raise AssertionError(f"it did not happen within {seconds / 4:g} s either")
