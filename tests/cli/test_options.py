"""Options of the tool: their limits, and durations."""

from __future__ import annotations

import click
import pytest

from tnxctl import arguments, durations, encoder
from tnxctl.cli import options, record
from tnxctl.protocol import wire


def test_the_limits_of_the_options_are_those_of_the_client() -> None:
    assert encoder.DEFAULT_TIMEOUT_S == options.DEFAULT_TIMEOUT_S
    assert arguments.MAX_DEADLINE_S == options.MAX_DEADLINE_S
    assert wire.MAX_RECORDING_S == record.LONGEST_S
    assert encoder.LOAD_TIMEOUT_S == options.LOAD_TIMEOUT_S
    assert wire.LOWEST_PRIORITY == options.LOWEST_PRIORITY


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("50ms", 0.05),
        ("0.05s", 0.05),
        (".5 ms", 0.0005),
        ("200us", 0.0002),
        ("200µs", 0.0002),
        ("200μs", 0.0002),
        ("2s", 2.0),
        ("2", 2.0),
        ("1e-3", 0.001),
        (" 5E1ms ", 0.05),
        ("86400", 86_400.0),
    ],
)
def test_durations_are_read(given: str, seconds: float) -> None:
    assert options.Duration(most=86_400.0).convert(given, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "given", ["", "ms", "5 m", "5MS", "1h", "5msec", "nan", "inf", "0x5", "1_0", "5ms5ms", "--5", "٥½"]
)
def test_bad_durations_are_told_apart(given: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a duration: 50ms, 200us and 0\.05s are"):
        options.Duration(most=86_400.0).convert(given, None, None)


@pytest.mark.parametrize("given", ["0", "0ms", "-1s", "-0.0", "86400.1", "1e400", "1e-400"])
def test_durations_have_a_range(given: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{given}' is not in the range above 0 and up to 86400 s"):
        options.Duration(most=86_400.0).convert(given, None, None)


@pytest.mark.parametrize("given", ["0", "-1s", "1e400", "1e-400"])
def test_durations_without_a_limit_are_finite(given: str) -> None:
    assert options.Duration().convert("1e9", None, None) == 1e9
    with pytest.raises(click.BadParameter, match=rf"'{given}' is not in the range above 0\."):
        options.Duration().convert(given, None, None)


@pytest.mark.parametrize(
    ("seconds", "spelled"),
    [
        (1e-6, "1 us"),
        (0.0002, "200 us"),
        (0.02, "20 ms"),
        (1.0, "1 s"),
        (2.5, "2.5 s"),
        (600.0, "600 s"),
        (0.1, "100 ms"),
    ],
)
def test_durations_are_spelled_as_they_are_read(seconds: float, spelled: str) -> None:
    assert durations.spell(seconds) == spelled
    assert durations.read(spelled) == pytest.approx(seconds)
