"""Work of pretended devices: queues, and the order in which what they hold is run.

A device does nothing by itself here. What is issued lies in the queue of its stream, and a *policy* says when a piece
of it is run, by the thread that issues or waits. Every policy keeps to what streams and events promise, and to no more:

- `eager`: at once. What a program sees that never forgets to wait.
- `late`: not before somebody waits for it, and no more than that wait needs. Host memory is read and written then.
- `random`: in any order that streams and events allow, drawn with a seed, some of it at once and some of it late.

Memory that is freed is overwritten as early as the order allows, by `late`, too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretended.capture import Capture
    from pretended.devices import Machine
    from pretended.streams import Stream


class Work:
    """A piece of work in the queue of a stream.

    Attributes:
        run: does it. needs: work that has to be done before, on any stream.
        chore: what it does where it is none of the program's: "taken" overwrites memory that was freed, "used" is the
            use of memory by somebody who had it before.
        capture: the graph that it was captured into, rather than queued.
        done: whether it has been run, or will never be because the device is lost. at: when that was, in seconds of
            `time.perf_counter`.
    """

    __slots__ = ("at", "capture", "chore", "done", "needs", "run", "stream")

    def __init__(
        self, stream: Stream, run: Callable[[], None], needs: tuple[Work, ...] = (), *, chore: str = ""
    ) -> None:
        self.stream = stream
        self.run = run
        self.needs = needs
        self.chore = chore
        self.capture: Capture | None = None
        self.done = False
        self.at = 0.0


class Policy:
    """An order of work; the machine's lock is held while it decides."""

    def issued(self, machine: Machine, work: Work) -> None:
        """Called after work has come into the queue of its stream."""

    def asked(self, machine: Machine, work: Work) -> None:
        """Called before somebody is told whether work is done. A program that asks for long enough gets it done."""
        step(machine, work.stream)

    def wait(self, machine: Machine, work: Work) -> None:
        """Have work done, because somebody waits for it."""
        while not work.done:
            step(machine, work.stream)


class Eager(Policy):
    def issued(self, machine: Machine, work: Work) -> None:
        self.wait(machine, work)


class Late(Policy):
    pass


class Random(Policy):
    """Args: seed: of the order."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def issued(self, machine: Machine, work: Work) -> None:
        if self._random.random() < 0.3:
            for _ in range(self._random.randrange(1, 8)):
                self._any_step(machine)

    def asked(self, machine: Machine, work: Work) -> None:
        self._any_step(machine)

    def wait(self, machine: Machine, work: Work) -> None:
        while not work.done:
            self._any_step(machine)
        if self._random.random() < 0.3:  # what nobody waits for may have run as well
            for _ in range(self._random.randrange(1, 8)):
                self._any_step(machine)

    def _any_step(self, machine: Machine) -> None:
        able = [stream for stream in machine.streams() if stream.queue and all(n.done for n in stream.queue[0].needs)]
        if able:
            step(machine, self._random.choice(able))


POLICIES = ("eager", "late", "random")


def policy_named(name: str, seed: int) -> Policy:
    """The policy of a name. Args: seed: for `random`."""
    return Random(seed) if name == "random" else {"eager": Eager, "late": Late}[name]()


def step(machine: Machine, stream: Stream) -> None:
    """Run the first piece of work of a stream, and before it, on other streams, what it needs."""
    queue: deque[Work] = stream.queue
    if not queue:
        return
    for needed in queue[0].needs:
        while not needed.done:
            step(machine, needed.stream)
    machine.execute(queue.popleft())
    while queue and queue[0].chore == "taken":
        machine.execute(queue.popleft())
