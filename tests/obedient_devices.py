"""A daemon whose devices do what requests tell them: `python obedient_devices.py LANES OPTION...`, options as for tnxd.

`cuda:0` and `cpu` have as many lanes each. The first number of the first input of a request is what happens to the
batch that it is in, see the constants; the outputs are full of it. No network is built. The loop, the scheduler, the
reconciler and the protocol are the daemon's own. But batches cost what was told when the model was loaded, ten
milliseconds: what the scheduler decides depends on no machine.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from tnxctl.protocol.errors import Internal, ResourceExhausted, Unavailable
from tnxd.executors import execution as contract
from tnxd.executors.execution import Execution
from tnxd.lanes import NO_TEAMS
from tnxd.models.model import Model

ANSWER, HOLD, RELEASE, FAIL, EXHAUST, BREAK, VANISH, PAUSE, CROWD, BREAK_LATER, HANG = range(11)
"""Answer at once; wait for RELEASE; end such waits, and answer; raise; have no memory; lose the device; never end, and
have begun an hour ago; wait until a model is unloaded; have no memory as long as other batches may run on the device;
wait for RELEASE, and lose the device; wait for RELEASE, and have begun an hour ago."""

_HOUR_NS = 3600 * 10**9

_Inbox = queue.SimpleQueue[tuple[Execution, threading.Event]]
"""What a lane has to run, and the signal that ends its wait."""


class ObedientDevice:
    """Implements `tnxd.executors.execution.Executor`."""

    teams = NO_TEAMS
    runs_inline = False
    description = "does what it is told"

    def __init__(self, name: str, lanes: int, on_done: Callable[[Execution], None]) -> None:
        self.name = name
        self.kind = name.partition(":")[0]
        self.lanes = self.streams = lanes
        self.shares_chip = self.kind == "cuda"
        self._on_done = on_done
        self._inboxes: list[_Inbox] = [queue.SimpleQueue() for _ in range(lanes + 1)]
        for inbox in self._inboxes:
            threading.Thread(target=self._work, args=(inbox,), daemon=True).start()

    _release: ClassVar[list[threading.Event]] = [threading.Event()]
    """The signal that ends the waits of what has been submitted so far, to all devices."""

    _unloaded: ClassVar[threading.Event] = threading.Event()

    def load(self, model: Model) -> contract.LoadReport:
        return contract.LoadReport([(1, 1e4), (64, 1e4)], 1024)

    def touch(self, model: Model) -> None: ...
    def unload(self, key: str) -> None:
        self._unloaded.set()

    def forget_inline(self, key: str) -> None: ...
    def give_up_variant(self, key: str) -> None: ...
    def adopt_thread(self) -> None: ...
    def run_inline(self, execution: Execution) -> None:
        raise NotImplementedError  # warm-up says that every batch takes ten milliseconds

    def failure(self) -> str:
        return ""

    def memory_mb(self) -> tuple[float, float]:
        return 8000.0, 8000.0

    def submit(self, execution: Execution) -> None:
        self._inboxes[execution.lane if execution.lane >= 0 else self.lanes].put((execution, self._release[0]))

    def _work(self, inbox: _Inbox) -> None:
        while True:
            execution, release = inbox.get()
            execution.started_ns = time.perf_counter_ns()
            execution.memory_free_mb = 8000.0
            commands = [int(item[0].flat[0]) for item in execution.items if item[0] is not None]
            if HANG in commands or VANISH in commands:  # longer than any time limit, and others may take theirs
                execution.started_ns -= _HOUR_NS
            holds = not {HOLD, BREAK_LATER, HANG}.isdisjoint(commands)
            if holds and execution.lane >= 0:  # what is computed again in idle time does not wait
                release.wait()
            if PAUSE in commands:
                self._unloaded.wait()
            if RELEASE in commands:
                self._release[0].set()
                self._release[0] = threading.Event()
            if VANISH in commands:
                return
            for command, rows in zip(commands, execution.rows, strict=True):
                execution.outcomes.append(self._outcome(command, rows, execution))
            execution.finished_ns = time.perf_counter_ns()
            execution.compute_us = execution.run_us
            self._on_done(execution)

    def _outcome(self, command: int, rows: int, execution: Execution) -> contract.Outcome:
        if command == FAIL:
            return Internal("the model raised, as it was told")
        if self.kind == "cuda" and (command == EXHAUST or (command == CROWD and execution.crowded)):
            execution.exhausted = True
            return ResourceExhausted(f"{self.name} has no memory left")
        if command in (BREAK, BREAK_LATER) and self.kind == "cuda":
            execution.fatal = "it fell out of its slot"
            return Unavailable(f"{self.name} is lost")
        return tuple(np.full((rows, *spec.shape[1:]), command, np.float32) for spec in execution.model.outputs)


def main() -> None:
    from tnxd.executors import devices
    from tnxd.scheduling import scheduler

    lanes = int(sys.argv.pop(1))
    scheduler.learn = lambda batch, width, micros: None

    def open_devices(config: object, on_done: Callable[[Execution], None]) -> devices.OpenedDevices:
        executors = {name: ObedientDevice(name, lanes, on_done) for name in ("cuda:0", "cpu")}
        return devices.OpenedDevices(executors)  # type: ignore[arg-type]

    devices.open_devices = open_devices
    from tnxd.__main__ import main as daemon

    daemon()


if __name__ == "__main__":
    main()
