"""Executor of a device: its lanes, and beside them the one on which models are loaded (`loading`)."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator

import torch

from tnxd.executors.execution import Execution, LoadReport
from tnxd.executors.lane import Lane, OnDone
from tnxd.executors.loading import Loading, as_it_is
from tnxd.executors.optimizer import Optimizer
from tnxd.executors.runner import Runner
from tnxd.executors.runner_calls import RunnerCalls
from tnxd.executors.trial.examples import Item
from tnxd.executors.trial.warmup import run_example
from tnxd.lanes import BACKGROUND, NO_TEAMS, Teams
from tnxd.models.model import Model


class LanePool:
    """Executor made of lanes; implements `tnxd.executors.execution.Executor`.

    Args:
        name, kind, description: as in `Executor`.
        make_runner: makes the runner of a lane; two more lanes warm models up and run what nobody waits for.
        lanes: how many batches run at a time.
        inline: a runner for the caller's thread; None: the device does not allow that.
        teams: of threads, for batches that run wide.
        scheduling: "idle": threads run only where nothing else wants a core; "normal": as others do.
        place: puts a freshly built module on the device. arrange: orders its weights in memory for the device.
        memory_mb: free and total memory of the device in MiB, without blocking.
        give_back: returns unused memory to the system; may block.
        settle: waits until tensors that the calling thread has made can be used on all lanes.
        optimizer: looks for variants of modules that are faster on the device; None: modules run as they are.
        on_done: called on the lane's thread with every execution that `submit` took, when it is over.
    """

    shares_chip = False

    def __init__(
        self,
        name: str,
        kind: str,
        description: str,
        *,
        make_runner: Callable[[], Runner],
        lanes: int,
        inline: Runner | None,
        teams: Teams = NO_TEAMS,
        scheduling: str = "normal",
        place: Callable[[torch.nn.Module], torch.nn.Module] = as_it_is,
        arrange: Callable[[torch.nn.Module], torch.nn.Module] = as_it_is,
        memory_mb: Callable[[], tuple[float, float]],
        give_back: Callable[[], None] = lambda: None,
        settle: Callable[[], None] = lambda: None,
        optimizer: Optimizer | None = None,
        on_done: OnDone,
    ) -> None:
        self.name = name
        self.kind = kind
        self.description = description
        self.lanes = self.streams = lanes
        self.teams = teams
        self.runs_inline = inline is not None
        self.memory_mb = memory_mb
        self._make_runner = make_runner
        self._inline = inline
        self._calls = RunnerCalls(settle)
        if inline is not None:
            self._calls.add(inline)
        self._examples: dict[str, tuple[Model, Item]] = {}
        self._place = place
        self._arrange = arrange
        self._give_back = give_back
        self._optimizer = optimizer
        self._on_done = on_done
        self._idles = scheduling == "idle"
        self._lanes = [self._start_lane(str(lane), serves=True) for lane in range(lanes)]
        self._warm_up = self._start_lane("warm-up"), threading.Lock()
        self._background = self._start_lane("background", yields=True)

    def _start_lane(self, label: str, *, serves: bool = False, yields: bool = False) -> Lane:
        runner = self._make_runner()
        self._calls.add(runner)
        return Lane(f"{self.name}/{label}", runner, self._on_done, yields=yields, idles=self._idles)

    def load(self, model: Model) -> LoadReport:
        loading = Loading(
            model,
            self.name,
            self._calls,
            self._lanes[0],
            lanes=self.lanes,
            teams=self.teams,
            place=self._place,
            arrange=self._arrange,
            optimizer=self._optimizer,
        )
        try:
            with self._warm_up_lane() as lane:
                report = loading.run(lane)
            report = self._warm_lanes(loading, report)
        except BaseException:
            self.unload(model.key)
            raise
        if loading.example is not None:
            self._examples[model.key] = loading.example
        return report

    def _warm_lanes(self, loading: Loading, report: LoadReport) -> LoadReport:
        """Do what each lane needs before a model serves, where warm-up on another thread is not enough.

        Returns:
            The report, with what was found meanwhile.
        """
        return report

    @contextlib.contextmanager
    def _warm_up_lane(self) -> Iterator[Lane]:
        """The lane that models are loaded on, for one caller at a time."""
        lane, busy = self._warm_up
        if not busy.acquire(blocking=False):  # a model that somebody gave up hangs there, perhaps for good
            self._calls.remove(lane.runner)
            lane, busy = self._warm_up = self._start_lane("warm-up"), threading.Lock()
            busy.acquire()
        try:
            yield lane
        finally:
            busy.release()

    def touch(self, model: Model) -> None:
        if model.key in self._examples:
            served, item = self._examples[model.key]
            for number, lane in enumerate(self._lanes):
                if number < self.teams.lanes and model.threads != 1:
                    lane.call(lambda runner: run_example(runner, served, item, self.teams.threads))
                lane.call(lambda runner: run_example(runner, served, item))

    def give_up_variant(self, key: str) -> None:
        self._calls.give_up_variant(key)

    def unload(self, key: str) -> None:
        self._calls.forget(key)
        self._examples.pop(key, None)
        for lane in (*self._lanes, self._warm_up[0], self._background):
            lane.forget(key)
        gc.collect()  # a network may refer to itself
        self._give_back()

    def forget_inline(self, key: str) -> None:
        if self._inline is not None:
            self._inline.forget(key)

    def submit(self, execution: Execution) -> None:
        lane = execution.lane
        (self._background if lane == BACKGROUND else self._lanes[lane]).submit(execution)

    def failure(self) -> str:
        return ""

    def run_inline(self, execution: Execution) -> None:
        assert self._inline is not None
        self._inline.run(execution)

    def adopt_thread(self) -> None:
        if self._inline is not None:
            self._inline.enter_thread()
