"""Arguments of calls, checked before anything is sent."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

from tnxctl.hedging import DEFAULT_PERCENTILE
from tnxctl.protocol import wire
from tnxctl.protocol.errors import InvalidArgument

MAX_DEADLINE_S = wire.MAX_DEADLINE_US / 1e6


def check_hedge(hedge: object, endpoints: int) -> float | None:
    """The share of requests that get no copy for another daemon; None: there are no copies."""
    if hedge is False:
        return None
    percentile = DEFAULT_PERCENTILE if hedge is True else hedge
    if not isinstance(percentile, float) or not 0 < percentile < 1:
        raise InvalidArgument(f"hedge={hedge!r}: expected True, False, or a share above 0 and below 1, such as 0.95")
    if endpoints < 2:
        raise InvalidArgument(f"hedge={hedge!r}: a copy goes to another daemon, and there is one endpoint")
    return percentile


def check_timeout(value: float) -> float:
    """A timeout in seconds. Raises InvalidArgument, which names it."""
    try:
        if 0 < value < math.inf:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgument(f"timeout {value!r}: expected a positive, finite number of seconds")


def check_deadline(value: float) -> float:
    """A deadline in seconds from now. Raises InvalidArgument, which names it."""
    try:
        if 0 < value <= MAX_DEADLINE_S:
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgument(
        f"deadline {value!r}: expected a positive number of seconds from now, at most {MAX_DEADLINE_S:.0f}"
    )


def check_priority(value: int) -> int:
    """A priority. Raises InvalidArgument, which names it."""
    try:
        level = operator.index(value)
        if 0 <= level <= wire.LOWEST_PRIORITY and value is not True and value is not False:
            return level
    except TypeError:
        pass
    raise InvalidArgument(f"priority {value!r}: expected an integer from 0 (first) to {wire.LOWEST_PRIORITY} (last)")


def check_string(name: str, value: str) -> str:
    """A string. Raises InvalidArgument, which names it."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} {value!r}: expected a string, got {type(value).__name__}")
    return value


def check_title(model: str) -> str:
    """The title of a model: NAME or NAME@VERSION. Raises InvalidArgument, which names it."""
    wire.split_title(check_string("model", model))
    return model


def check_name(model: str) -> str:
    """The name of a model, without a version. Raises InvalidArgument, which names it."""
    wire.check_name(check_string("model", model))
    return model


def check_version(what: str, value: str | int) -> str:
    """A version, a number to people, as the string that the protocol has. Raises InvalidArgument."""
    if value is True or value is False or not isinstance(value, str | int) or value == "":
        raise InvalidArgument(f"{what} {value!r}: expected the number of a version")
    return str(value)


def check_weights(weights: Mapping[str, float] | Mapping[int, float]) -> dict[str, float]:
    """Weights of versions. Raises InvalidArgument, which names it."""
    if not isinstance(weights, Mapping):
        raise InvalidArgument(f"weights {weights!r}: expected a mapping of versions to their shares")
    checked: dict[str, float] = {}
    for key, weight in weights.items():
        version = check_version("version", key)
        if version in checked:
            raise InvalidArgument(f"weights {dict(weights)!r}: version {version} has two")
        try:
            checked[version] = float(weight) if 0 <= weight <= wire.MAX_WEIGHT else math.nan  # NaN is not >= 0
        except (TypeError, ValueError, OverflowError):
            checked[version] = math.nan
        if math.isnan(checked[version]):
            raise InvalidArgument(
                f"weight {weight!r} of version {version}: expected a number from 0 to {wire.MAX_WEIGHT:g}"
            )
    if checked and not any(checked.values()):
        raise InvalidArgument(f"weights {checked!r}: none is above 0")
    return checked


def check_flag(name: str, value: bool) -> bool:
    """A flag. Raises InvalidArgument, which names it."""
    if value is not True and value is not False:
        raise InvalidArgument(f"{name} {value!r}: expected True or False")
    return value


def check_megabytes(name: str, value: float) -> float:
    """A number of MiB. Raises InvalidArgument, which names it."""
    try:
        if value >= 0:  # which NaN is not
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidArgument(f"{name} {value!r}: expected a number of MiB, 0 or more")
