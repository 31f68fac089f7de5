"""Descriptors that a service manager passes: which are the daemon's, and that its children get none of them."""

from __future__ import annotations

import os

import pytest

from tnxd.process import activation


def passed(monkeypatch: pytest.MonkeyPatch, pid: object, count: object, names: str | None) -> list[int]:
    """Descriptors that the daemon takes, told so by the environment; the variables are gone then."""
    for name, value in (("LISTEN_PID", pid), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    taken = activation.take_descriptors()
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
    return taken


@pytest.mark.parametrize(
    ("count", "names", "taken"),
    [
        (2, "tnxd:tnxd", [3, 4]),
        (3, "http:tnxd:metrics", [4]),
        (2, "http:metrics", []),
        (2, None, [3, 4]),
        (2, "", [3, 4]),
        (2, "tnxd", [3]),
        (0, "", []),
        ("two", "tnxd:tnxd", []),
        ("-1", "tnxd", []),
        (None, None, []),
    ],
)
def test_those_of_its_name_are_taken(
    monkeypatch: pytest.MonkeyPatch, count: object, names: str | None, taken: list[int]
) -> None:
    assert passed(monkeypatch, os.getpid(), count, names) == taken


@pytest.mark.parametrize("pid", [None, "", "1", "self"])
def test_those_of_another_process_are_not(monkeypatch: pytest.MonkeyPatch, pid: object) -> None:
    assert passed(monkeypatch, pid, 1, "tnxd") == []


def test_they_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passed(monkeypatch, os.getpid(), 1, "tnxd") == [3]
    assert activation.take_descriptors() == []
