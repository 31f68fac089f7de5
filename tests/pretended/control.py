"""Orders to the devices of a daemon on a pretended machine, from the test that started it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretended.errors import LAUNCH_FAILURE
from pretended.possible import skip_where_impossible

if TYPE_CHECKING:
    from pretended.devices import Machine

_PROGRAM = str(Path(__file__).parent / "daemon.py")
_MOST = 1 << 16


def program(
    *,
    devices: int = 1,
    memory_mb: int | Sequence[int] = 8192,
    policy: str = "late",
    seed: int = 0,
    control: Path | None = None,
) -> tuple[str, str]:
    """A daemon on a pretended machine, as the `program` of `conftest.start_daemon` and `daemons.running`.

    Args:
        devices, memory_mb, policy, seed: as of `pretended.pretended`. control: path of the socket of `order`.
    """
    skip_where_impossible()
    plan = {"devices": devices, "memory_mb": memory_mb, "policy": policy, "seed": seed}
    return _PROGRAM, json.dumps(plan if control is None else {**plan, "control": str(control)})


def order(control: Path, method: str, device: int = 0, **arguments: Any) -> Any:
    """Give the machine of a daemon an order, and wait until it has been carried out.

    Args:
        method: of `Orders`. device: which one.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(control))
        connection.send(json.dumps([method, device, arguments]).encode())
        return json.loads(connection.recv(_MOST))


class Orders:
    """Orders that a daemon takes."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def lose(self, device: int, after: int = 0) -> None:
        """See `pretended.devices.Device.lose`."""
        self._machine.devices[device].lose(after)

    def vanish(self, device: int) -> None:
        """Lose the device now, also if it does nothing."""
        self._machine.devices[device].lost = LAUNCH_FAILURE

    def hang(self, device: int, after: int = 0) -> None:
        """See `pretended.devices.Device.hang`."""
        self._machine.devices[device].hang(after)

    def release(self, device: int) -> None:
        """End what hangs."""
        self._machine.devices[device].release()

    def fail_allocations(self, device: int, times: int) -> None:
        """Let allocations on the device fail. Args: times: how many; -1: from now on, 0: none any more."""
        self._machine.devices[device].memory.failing = times

    def fail_pinned(self, device: int, times: int) -> None:
        """Let allocations of pinned memory fail, likewise."""
        self._machine.host.failing = times

    def leave_free(self, device: int, mib: int) -> None:
        """Let only so much more be allocated on the device than is now."""
        memory = self._machine.devices[device].memory
        memory.limit = memory.held + (mib << 20)

    def counts(self, device: int) -> dict[str, int]:
        """Counts so far, see `pretended`."""
        return dict(self._machine.counts)


def serve(control: str, machine: Machine) -> None:
    """Take orders at a socket, on a thread."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(control)
    listener.listen()
    orders = Orders(machine)

    def take() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                method, device, arguments = json.loads(connection.recv(_MOST))
                with machine.lock:
                    answer = getattr(orders, method)(device, **arguments)
                connection.send(json.dumps(answer).encode())

    threading.Thread(target=take, name="pretended/control", daemon=True).start()
