"""Text for people: values, durations, tables, and what a peer's words cannot do to a terminal."""

from __future__ import annotations

import click
import ml_dtypes
import numpy as np
import pytest

from tnxctl.cli import report, text
from tnxctl.protocol import wire
from tnxctl.protocol.strings import array_of


@pytest.mark.parametrize(
    ("array", "room", "expected"),
    [
        (np.array([[1.0, 2.0]]), None, "1 2"),
        (np.arange(9), None, "0 1 2 …"),
        (np.arange(9), 8, "0 1 2 …"),
        (np.arange(4), 7, "0 1 2 3"),
        (np.arange(4), 6, "0 1 …"),
        (np.array([1e-9, np.nan, -np.inf], np.float16), None, "0 nan -inf"),
        (np.array([0.123456, 1.5], ml_dtypes.bfloat16), None, "0.124 1.5"),
        (np.array([True, False]), None, "True False"),
        (np.zeros((0, 3)), None, ""),
        (np.arange(4), 1, "…"),
        (np.arange(4), -5, "…"),
    ],
)
def test_preview_of_values(array: np.ndarray, room: int | None, expected: str) -> None:
    assert report.preview(array, room) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.84, "840 ms"),
        (1.25, "1.2 s"),
        (42.0, "42 s"),
        (125, "2 min 5 s"),
        (7509, "2 h 5 min"),
        (90061, "1 d 1 h"),
        (9.96, "10.0 s"),
        (float("nan"), "-"),
        (float("inf"), "-"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_a_table_is_aligned_and_cut() -> None:
    lines = text.table(("A", "N", "LAST"), [("x", "1", "short"), ("yyy", "10", "very long")], "<><", width=16)
    assert [click.unstyle(line) for line in lines] == ["A     N  LAST", "x     1  short", "yyy  10  very l…"]


def test_the_widest_of_the_flexible_columns_gives_way_first() -> None:
    row = ("name of it", "first of two", "the second, longer one", "12 MiB")

    def table(width: int) -> list[str]:
        lines = text.table(("A", "FIRST", "SECOND", "LAST"), [row], "<<<>", width, ("FIRST", "SECOND"))
        return [click.unstyle(line) for line in lines]

    assert table(46) == [
        "A           FIRST         SECOND          LAST",
        "name of it  first of two  the second,…  12 MiB",
    ]
    assert table(30) == [
        "A           FIR…  SEC…    LAST",
        "name of it  fir…  the…  12 MiB",
    ]
    assert table(1)[1] == "name of it  …  …  12 MiB", "the other columns stay whole"


def test_a_tensor_without_a_name_is_called_so() -> None:
    assert text.tensor(wire.TensorSpec("", "FP32", (-1, 3))) == "(unnamed) FP32 [-1,3]"


def test_a_peer_cannot_steer_the_terminal() -> None:
    assert text.clean("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert text.clean("grün µs") == "grün µs"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"a", "'a'"),
        ("wölf\x1b[0m\n".encode(), r"'wölf\x1b[0m\n'"),
        (b"\xff\0", r"b'\xff\x00'"),
        (b"x" * 100, "'" + "x" * 38 + "…"),
    ],
)
def test_a_string_for_people(value: bytes, shown: str) -> None:
    assert text.string(value) == shown
    assert report.preview(array_of([value, b""], (2,)), None) == f"{shown} ''"
