"""Loading of a model onto the lanes of a device: built, tried, made faster where that is worth it, and warmed up."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch

from tnxctl.protocol.errors import TensorNextError, Unavailable
from tnxd.error_text import first_line, sentence
from tnxd.events import event
from tnxd.executors.execution import SHARED, LoadReport
from tnxd.executors.lane import TURN_S, Lane
from tnxd.executors.optimizer import Attempt, Optimizer
from tnxd.executors.optimizer import notes as optimization_notes
from tnxd.executors.runner import Runner
from tnxd.executors.runner_calls import RunnerCalls
from tnxd.executors.substitute import Substitute
from tnxd.executors.trial.copies import Call
from tnxd.executors.trial.examples import Item, Make
from tnxd.executors.trial.held import Held, memory
from tnxd.executors.trial.isolation import lane_calls, open_with
from tnxd.executors.trial.lane_comparison import lanes_apart, rows_of_a_lane_apart
from tnxd.executors.trial.lengths import padding_apart, warm_up_lengths
from tnxd.executors.trial.optimization import Pair
from tnxd.executors.trial.precision_loss import largest_difference
from tnxd.executors.trial.state import same_chance, stateful
from tnxd.executors.trial.trial import try_out
from tnxd.executors.trial.verdict import Verdict, without_rows
from tnxd.executors.trial.warmup import Warmed, warm_up
from tnxd.executors.trial.widths import Widths, measure_widths, race, wide_costs
from tnxd.lanes import Teams
from tnxd.models.model import Model
from tnxd.models.process_state.restoration import settings_restored

log = logging.getLogger(__name__)


def as_it_is(module: torch.nn.Module) -> torch.nn.Module:
    """Leave a module as it is."""
    return module


class Loading:
    """Loading of one model onto the lanes of a device.

    Args:
        device: its name. calls: of the device; once this is done, they have those of the model.
        serving: a lane that serves, to measure wide batches on.
        lanes, teams, place, arrange, optimizer: as in `tnxd.executors.pool.LanePool`.

    Attributes:
        example: the model and an example of its inputs, with which it was warmed up last; None: it was not.
        make: makes more of them.
        verdict: that holds once it is done.

    Raises:
        Exception: the model cannot be built.
    """

    def __init__(
        self,
        model: Model,
        device: str,
        calls: RunnerCalls,
        serving: Lane,
        *,
        lanes: int,
        teams: Teams,
        place: Callable[[torch.nn.Module], torch.nn.Module],
        arrange: Callable[[torch.nn.Module], torch.nn.Module],
        optimizer: Optimizer | None,
    ) -> None:
        """Build the model."""
        self.example: tuple[Model, Item] | None = None
        self.make: Make | None = None
        self.verdict: Verdict | None = None
        self._began = time.monotonic()
        self._model = model
        self._device = device
        self._calls = calls
        self._serving = serving
        self._lanes = lanes
        self._teams = teams
        self._place = place
        self._arrange = arrange
        self._optimizer = optimizer
        self._notes: list[str] = []
        self._variant = ""
        self._built = [self._build()]
        self._nbytes = _nbytes(self._built[0])

    def _build(self) -> torch.nn.Module:
        with settings_restored("building it") as changes:
            made = self._place(self._model.factory())
        self._notes.extend(changes.note())
        return made

    def run(self, lane: Lane) -> LoadReport:
        """Try the model, give all runners their calls for it, and warm it up. Args: lane: to do that on.

        Raises:
            FailedPrecondition: the calls answer otherwise than the trial did, whatever is done.
            Exception: whatever a forward of the model raises.
        """
        model, notes = self._model, self._notes
        verdict = lane.call(lambda runner: self._tried(runner, self._built[0], model, self._build))
        verdict, module = self._ready(lane, self._built, verdict)
        held = Held(module, model.writes, contents=False) if verdict.pristine else None
        verdict = self._by_length(lane, verdict)
        warmed = lane.call(lambda runner: self._grow(runner, verdict))
        written = held.changed(Held(module, model.writes, contents=False)) if held is not None else []
        del held, module
        if written:
            verdict = verdict.writing(written)
        if not verdict.pristine and written:
            verdict, _ = self._ready(lane, [], verdict)
            warmed = lane.call(lambda runner: self._grow(runner, verdict))
        if warmed.mixes:
            verdict = without_rows(verdict, warmed.mixes)
            warmed = lane.call(lambda runner: self._grow(runner, verdict))
        if model.reference is not None and verdict.telling:
            notes.append(self._rounding(lane, verdict, model.reference))
        if self._optimizer is not None and self._optimizer.is_worth_it(verdict, warmed):
            attempts = self._optimizer.attempts(
                *(lane, verdict, warmed, self._build, self._race), nbytes=self._nbytes, began=self._began
            )
            warmed, said = self._optimized(lane, verdict, warmed, attempts)
            notes.extend(said)
            again = self._by_length(lane, verdict)
            if again is not verdict:  # what runs now is another program
                verdict = again
                warmed = lane.call(lambda runner: self._grow(runner, verdict))
        self.verdict = verdict
        widths = self._widths(verdict, warmed)
        threads = 1 if widths.apart else min(model.threads, self._teams.threads)
        if widths.apart:
            notes.append(f"on one core only: on one and on {self._teams.threads}, {widths.apart}")
        return LoadReport(
            wide_costs(warmed.costs, widths.costs) if threads > 1 else warmed.costs,
            self._nbytes,
            warmed=verdict.make is not None or verdict.kind == SHARED,
            batches=bool(verdict.model.max_batch_size),
            serial=verdict.serial,
            state=verdict.kind,
            random=verdict.state.random,
            tolerance=verdict.tolerance,
            safe_rows=warmed.safe_rows,
            most_rows=warmed.most_rows,
            examples=verdict.model.examples if verdict.model.examples != model.examples else (),
            widths=widths.costs,
            threads=threads,
            notes=(*dict.fromkeys(notes), *verdict.notes),
            joins=verdict.model.joins,
            padded=warmed.padded,
            variant=self._variant,
        )

    def _ready(self, lane: Lane, built: list[torch.nn.Module], verdict: Verdict) -> tuple[Verdict, torch.nn.Module]:
        """Give all lanes their calls for a model, once these answer as the trial did.

        Args:
            built: the module of the trial, if it is there; emptied, so that there are never two without need.

        Raises:
            FailedPrecondition: the calls answer otherwise, whatever is done.
        """

        def opened() -> torch.nn.Module:
            made = self._build()
            lane.call(lambda runner: open_with(made, verdict, runner.torch_device))
            return made

        module = built.pop() if built and verdict.pristine else None
        built.clear()
        if module is None:
            module = opened()
        if verdict.known:  # else nobody would notice that the module's code cannot bear the order
            module = self._arrange(module)
        calls = lane_calls(module, verdict)
        apart = self._apart(lane, calls, verdict)
        if apart and self._arrange is not as_it_is:
            del module, calls
            module = opened()
            calls = lane_calls(module, verdict)
            apart = self._apart(lane, calls, verdict)
        if apart:  # the calls are not as separate as they look
            verdict = verdict.one_at_a_time(apart)
            del module, calls
            module = opened()
            calls = lane_calls(module, verdict)
            apart = self._apart(lane, calls, verdict)
        if apart:
            raise stateful(verdict.state.names, apart)
        mixed = self._mixed(lane, calls, verdict)
        if mixed:
            verdict = without_rows(verdict, f"alone and beside another request, {mixed}")
        self._calls.install(verdict.model.key, calls)
        return verdict, module

    def _rounding(self, lane: Lane, verdict: Verdict, reference: Callable[[], torch.nn.Module]) -> str:
        """A note that says how far the answers are from those in the datatype of the weights."""

        def compare(runner: Runner) -> float | None:
            with settings_restored("a forward"):
                call = runner.calls[verdict.model.key]
                return largest_difference(call, self._place(reference()), verdict, runner.torch_device)

        try:
            largest = lane.call(compare)
        except Exception as error:  # no memory for two of it, for one
            return f"dtype: not compared with the datatype of the weights: {sentence(error)}"
        if largest is None:
            return "dtype: not compared with the datatype of the weights: those give no number for any example"
        if math.isinf(largest):
            return "dtype: some answers are infinite or NaN, which those in the weights' own datatype are not"
        return f"dtype: answers differ by up to {largest:.1%} of the largest value from those in the weights' own"

    def _optimized(
        self, lane: Lane, verdict: Verdict, warmed: Warmed, attempts: list[Attempt]
    ) -> tuple[Warmed, tuple[str, ...]]:
        """Give all lanes the fastest variant of a module that they have, if one gains and lanes can share it.

        Returns:
            The warm-up of what they have then, and notes about what was tried.
        """
        key = verdict.model.key
        before = self._calls.installed(key)
        taken = attempts[0] if attempts and attempts[0].module is not None else None
        if taken is not None:
            assert taken.module is not None
            # A variant of torch holds the network, over its own weights; one of another runtime does not.
            own = getattr(taken.module, "network", None)
            plain = before if own is None else lane_calls(own, verdict)
            device = lane.runner.torch_device
            calls = lane_calls(Substitute(taken.module, before() if own is None else own, device), verdict)
            apart = self._apart(lane, calls, verdict)
            if not apart:
                self._calls.install(key, calls, plain)
                faster = lane.call(lambda runner: self._grow(runner, verdict))
                if not faster.mixes:
                    self._variant = taken.name
                    return faster, optimization_notes(attempts, taken)
                self._calls.install(key, before)
                apart = faster.mixes
            attempts[0] = taken._replace(outcome=None, why=apart)
        return warmed, optimization_notes(attempts, None)

    @staticmethod
    def _mixed(lane: Lane, calls: Callable[[], Call], verdict: Verdict) -> str:
        """The difference between a request's answer by a lane in company and alone, in words; "" if there is none."""
        model = verdict.model
        if verdict.pristine or model.max_batch_size < 2 or not verdict.known:
            return ""
        call = calls()

        def compare(runner: Runner) -> str:
            with settings_restored("a forward"), same_chance():
                return rows_of_a_lane_apart(call, model, runner.torch_device, verdict.telling, verdict.tolerance)

        return lane.call(compare)

    @staticmethod
    def _apart(lane: Lane, calls: Callable[[], Call], verdict: Verdict) -> str:
        """The difference between answers of lanes and of the trial, in words; "" if there is none."""
        if not verdict.known:
            return ""
        pair = calls(), calls()

        def compare(runner: Runner) -> str:
            with settings_restored("a forward"):
                return lanes_apart(pair, verdict.model, runner.torch_device, verdict.known, verdict.tolerance)

        return lane.call(compare)

    @staticmethod
    def _by_length(lane: Lane, verdict: Verdict) -> Verdict:
        """The verdict, once it is known whether padding changes an answer. The runner must have the model."""
        model, make = verdict.model, verdict.make
        if not model.joins or make is None:
            return verdict
        if verdict.state.random:
            return verdict.by_length("nothing can be compared, since answers are drawn at random")

        def compare(runner: Runner) -> str:
            with settings_restored("a forward"):
                return padding_apart(runner, model, make, verdict.tolerance)

        apart = lane.call(compare)
        if not apart:
            return verdict
        log.warning(
            "%s: requests of different lengths do not share batches: %s",
            *(model.key, apart),
            extra=event("lengths_kept_apart", model.key, reason=apart),
        )
        return verdict.by_length(apart)

    @staticmethod
    def _tried(runner: Runner, module: torch.nn.Module, model: Model, build: Callable[[], torch.nn.Module]) -> Verdict:
        with settings_restored("a forward"):  # what a forward changes every time, the trial finds
            return try_out(module, model, runner.torch_device, build)

    def _grow(self, runner: Runner, verdict: Verdict) -> Warmed:
        if verdict.make is None:
            return Warmed([])
        with settings_restored("a forward"):
            run = warm_up_lengths if verdict.model.joins and verdict.model.warm_up != () else warm_up
            allowed = None if verdict.state.random else verdict.tolerance
            warmed = run(runner, verdict.model, verdict.make, self._lanes, allowed)
        if verdict.model.warm_up != ():
            self.example = verdict.model, verdict.make(1, 0)
            self.make = verdict.make
        return warmed

    def _team_of(self, model: Model) -> int:
        """The threads that a batch of a model may have; 1: no lane has a team, or the model asks for one."""
        return min(model.threads or self._teams.threads, self._teams.threads) if self._teams.lanes else 1

    def _race(self, verdict: Verdict, variant: torch.nn.Module) -> Pair | None:
        """Run the smallest batch by a module and by a variant of it, on a lane that may run them wide.

        Returns:
            The least seconds of each; None where there is no team, or its lane is not free.
        """
        threads = self._team_of(verdict.model)
        if threads == 1 or verdict.make is None:
            return None
        call = partial(self._serving.call, within_s=TURN_S)
        with suppress(Unavailable):
            own = lane_calls(variant, verdict)()  # which spares inputs that a forward writes
            return race(call, verdict.model, own, verdict.make(1, 0), threads)
        return None

    def _widths(self, verdict: Verdict, warmed: Warmed) -> Widths:
        """Measure what wide batches gain, on a lane that may run them; nothing where none may, or none is free."""
        model, make, threads = verdict.model, verdict.make, self._team_of(verdict.model)
        if threads == 1 or make is None:
            return Widths()
        allowed = None if verdict.state.random else verdict.tolerance
        call = partial(self._serving.call, within_s=TURN_S)
        try:
            return measure_widths(call, model, make, warmed.costs, threads, allowed)
        except Unavailable as error:  # what serves hangs there: batches that run will tell
            log.warning(
                "%s on %s: not tried on several cores: %s",
                *(model.key, self._device, error),
                extra=event("not_tried_wide", model.key, device=self._device, reason=error.message),
            )
            return Widths()
        except TensorNextError as error:
            return Widths(apart=f"it does not fail, and fails: {first_line(error)}")


def _nbytes(module: torch.nn.Module) -> int:
    """Bytes of parameters and buffers; what two of them share counts once. 0 for a module of another runtime."""
    held = {memory(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(
        tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else tensor.numel() * tensor.itemsize
        for tensor in held.values()
    )
