"""Memory of the traffic, in times and sizes that a test makes up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tnxctl import malloc
from tnxd.config import Clients
from tnxd.process import resident
from tnxd.serving.traffic_memory import TrafficMemory
from tnxd.transport.client_limits import Admission

MIB = 1024 * 1024
QUIET_MIB = 300


@dataclass
class Process:
    """Stand-in for the process and its router.

    Attributes:
        resident_mib: memory that it holds.
        dropped, closed: as of `Router`. worst: whether a connection can be cut. cuts: how many were.
        trims: number of times that memory was given back.
    """

    resident_mib: float = QUIET_MIB
    dropped: int = 0
    closed: int = 0
    worst: bool = False
    cuts: int = 0
    trims: int = 0

    def cut_worst(self) -> bool:
        self.cuts += self.worst
        return self.worst

    def measure_unread(self, everywhere: bool) -> None:
        assert everywhere

    def trimmed(self) -> bool:
        """True if memory was given back since the last call, which a thread of its own does."""
        for thread in threading.enumerate():
            if thread.name == "trim":
                thread.join()
        trims, self.trims = self.trims, 0
        return trims > 0

    def trim(self) -> None:
        self.trims += 1


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    made = Process()
    monkeypatch.setattr(resident, "resident_bytes", lambda: int(made.resident_mib * MIB))
    monkeypatch.setattr(malloc, "trim", made.trim)
    return made


@pytest.fixture
def admission() -> Admission:
    return Admission(Clients(memory_mb=256.0), max_requests=1000, max_bytes=1 << 30)


@pytest.fixture
def look(process: Process, admission: Admission) -> Callable[[float], None]:
    """A look at a time in seconds, at a process that was quiet before."""
    memory = TrafficMemory(process, admission)  # type: ignore[arg-type]
    memory.look(0.0, settled=True)
    return lambda now: memory.look(now, settled=True)


def test_memory_beyond_that_of_a_quiet_daemon_is_given_back_each_second(
    process: Process, admission: Admission, look: Callable[[float], None]
) -> None:
    admission.unread = 100 * MIB
    process.resident_mib += 100
    look(1.0)
    assert not process.trimmed()
    admission.unread = 0
    for now in (2.0, 3.0):
        look(now)
        assert process.trimmed()
    look(3.5)
    assert not process.trimmed()


def test_memory_that_does_not_come_back_is_none_of_the_traffic(
    process: Process, admission: Admission, look: Callable[[float], None]
) -> None:
    admission.unread = 100 * MIB
    process.resident_mib += 100
    look(1)
    admission.unread = 0
    for now in range(2, 12):
        look(now)
        assert process.trimmed()
    look(12)
    assert not process.trimmed()


def test_memory_that_forwards_take_again_is_left_to_them(process: Process, look: Callable[[float], None]) -> None:
    trims = 0
    for now in range(1, 100):
        process.resident_mib = QUIET_MIB + 200 * (now % 3 > 0)  # it is seen given back, and taken again
        look(now)
        trims += process.trimmed()
    assert trims == 2 + 3  # and once in half a minute


def test_message_that_nobody_saw_is_given_back(process: Process, look: Callable[[float], None]) -> None:
    """It came and was answered between two looks."""
    for now in range(1, 9, 2):
        process.resident_mib = QUIET_MIB
        look(now)
        process.resident_mib = 100 * now + QUIET_MIB
        look(now + 1)
        assert process.trimmed()


def test_memory_that_is_freed_after_all_have_given_up_is_given_back_later(
    process: Process, look: Callable[[float], None]
) -> None:
    process.dropped += 1000
    process.resident_mib += 500
    for now in range(1, 20):
        look(now)
    process.trimmed()
    for now in range(20, 60):
        look(now)
    assert process.trimmed()


def test_daemon_that_has_less_for_half_a_minute_is_quiet_with_less(
    process: Process, look: Callable[[float], None]
) -> None:
    process.resident_mib = 100
    for now in range(1, 31):
        look(now)
    process.resident_mib = 200
    look(31)
    assert process.trimmed()


def test_memory_is_given_back_however_long_a_flood_is_dropped(process: Process, look: Callable[[float], None]) -> None:
    """Far longer than memory is sought that does not come back."""
    process.resident_mib += 100
    for now in range(1, 40):
        process.dropped += 1000
        look(now)
        assert process.trimmed()
    for now in range(40, 49):
        look(now)
        assert process.trimmed()
    look(50)
    assert not process.trimmed()


def test_connection_that_takes_the_memory_of_all_is_cut(
    process: Process, admission: Admission, look: Callable[[float], None]
) -> None:
    admission.unread = 300 * MIB
    look(1.0)
    assert process.cuts == 0
    process.worst = True
    look(2.0)
    assert process.cuts == 1


def test_memory_beyond_the_limit_that_nothing_explains_is_measured_anew(
    process: Process, look: Callable[[float], None]
) -> None:
    process.worst = True
    look(1.0)
    assert process.cuts == 0
    process.resident_mib += 300
    look(2.0)
    assert process.cuts == 1


def test_memory_is_given_back_where_many_connections_have_ended(process: Process, admission: Admission) -> None:
    memory = TrafficMemory(process, admission)  # type: ignore[arg-type]
    process.closed = 255
    memory.look_at_connections()
    assert not process.trimmed()
    process.closed = 256
    memory.look_at_connections()
    assert process.trimmed()
    memory.look_at_connections()
    assert not process.trimmed()
