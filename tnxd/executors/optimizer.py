"""Optimizer: looks for the variant of a module that a device is to run, and says what it tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tnxctl.protocol.errors import TensorNextError, Unavailable
from tnxctl.protocol.wire import MIB
from tnxd.config import Config
from tnxd.error_text import sentence
from tnxd.executors.host import free_memory
from tnxd.executors.lane import Lane
from tnxd.executors.runner import Runner
from tnxd.executors.trial.optimization import GAIN, WORTH_US, Outcome, Pair, compare
from tnxd.executors.trial.verdict import Verdict
from tnxd.executors.trial.warmup import Warmed, run_example
from tnxd.models.formats import artifacts
from tnxd.models.process_state.restoration import settings_restored
from tnxd.models.variants import AUTO, Build, Variant, Workshop

_OF_A_LOAD = 0.7
"""Part of the time of a load after which nothing more is tried: what was found still has to be warmed up."""


_LOOKS = 5

_COPIES = 4
"""Times the weights that a conversion may take: built, exported and converted in the child, and once more here. Where
that is more than the free memory, the kernel would end the child, or the daemon."""


Race = Callable[[Verdict, torch.nn.Module], Pair | None]
"""Runs the smallest batch by the module of a verdict and by a variant, each with a team; None: there is none."""


class Attempt(NamedTuple):
    """A variant that was looked at.

    Attributes:
        module: it; None where it is of no use, and `why` says why not. outcome: of the comparison.
    """

    name: str
    module: torch.nn.Module | None = None
    outcome: Outcome | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.outcome is None:
            return f"{self.name}: {self.why}"
        sizes = ", ".join(f"{rows}: {part:.2f}" for rows, part in self.outcome.parts.items())
        return f"{self.name} {self.outcome.part:.2f} (by rows {sizes})" + (f", {self.why}" if self.why else "")


class Optimizer:
    """Optimizer of the modules of one device.

    Args:
        kind: of the device.
        seconds: that it may take for a model, in all; 0: nothing is tried.
        load_seconds: that a load may take with all that belongs to it.
        cache: directory for what was compiled; None: nothing is kept.
        threads: of a team that batches may have on the device; 1: there are none.
    """

    def __init__(self, kind: str, seconds: float, load_seconds: float, cache: Path | None, threads: int = 1) -> None:
        self._kind = kind
        self._seconds = seconds
        self._load_seconds = load_seconds
        self._cache = cache
        self._threads = threads

    def is_worth_it(self, verdict: Verdict, warmed: Warmed) -> bool:
        """Whether variants of a module are to be tried, which has been warmed up."""
        model = verdict.model
        return (
            bool(self._seconds)
            and any(self._kind in variant.kinds for variant in model.variants)
            and verdict.pristine
            and bool(verdict.known and verdict.telling and warmed.costs)  # else no answer tells a variant from another
            and (model.optimize != AUTO or warmed.costs[0][1] >= WORTH_US)  # and looked at again in `attempts`
        )

    def attempts(
        self, lane: Lane, verdict: Verdict, warmed: Warmed, build: Build, race: Race, nbytes: int, began: float
    ) -> list[Attempt]:
        """Try the variants of a module that the lane has a call for. Blocks, for `seconds` at most.

        Args:
            warmed: what the warm-up found about the module. race: has a lane that serves run it beside a variant.
            nbytes: of the weights.
            began: when the load began, of `time.monotonic`: no attempt makes it too long.

        Returns:
            What became of each; those that may be used first, and the fastest of them before others.
        """
        if verdict.model.optimize == AUTO and not lane.call(lambda runner: _takes_long(runner, verdict)):
            return []
        found: list[Attempt] = []
        free = free_memory()
        if free and _COPIES * nbytes > free:
            return [Attempt("all", why=f"{nbytes // MIB} MiB of weights, {free // MIB} MiB of memory are free")]
        until = min(time.monotonic() + self._seconds, began + _OF_A_LOAD * self._load_seconds)
        for variant in verdict.model.variants:
            if self._kind in variant.kinds:
                if any(attempt.name == variant.beside and attempt.module is not None for attempt in found):
                    found.append(Attempt(variant.name, why=f"not tried, since {variant.beside} gains"))
                    continue
                found.append(self._attempt(variant, lane, verdict, warmed, build, race, until))
        return sorted(found, key=_order)

    def _attempt(
        self,
        variant: Variant,
        lane: Lane,
        verdict: Verdict,
        warmed: Warmed,
        build: Build,
        race: Race,
        until: float,
    ) -> Attempt:
        forced = verdict.model.optimize == variant.name
        if variant.missing:
            return Attempt(variant.name, why=variant.missing)
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise Unavailable("no time was left for it")
            module = self._made(variant, build, lane.runner.torch_device, left)
            outcome = lane.call(lambda runner: _compare(runner, module, verdict, warmed))
            together = race(verdict, module)
        except TensorNextError as error:
            return Attempt(variant.name, why=error.message)
        except Exception as error:  # whatever others' compilers stumble over
            return Attempt(variant.name, why=sentence(error))
        if together is not None:
            outcome = outcome.with_team(together, always=verdict.model.threads > 1)
        useful = forced or outcome.part <= GAIN
        return Attempt(variant.name, module if useful else None, outcome, "" if useful else "too little")

    def _made(self, variant: Variant, build: Build, device: torch.device, seconds: float) -> torch.nn.Module:
        with settings_restored("making a variant of it"), torch.no_grad():
            module = variant.make(build, Workshop(device, self._cache, seconds, self._threads))
        return module.requires_grad_(False).eval()


def _order(attempt: Attempt) -> tuple[bool, float]:
    return attempt.module is None, 0.0 if attempt.outcome is None or attempt.module is None else attempt.outcome.part


def _takes_long(runner: Runner, verdict: Verdict) -> bool:
    """Whether the smallest batch takes so long that variants are worth it, however often it is tried."""
    assert verdict.make is not None
    item = verdict.make(1, 0)
    with settings_restored("a forward"):
        return all(run_example(runner, verdict.model, item).run_us >= WORTH_US for _ in range(_LOOKS))


def _compare(runner: Runner, module: torch.nn.Module, verdict: Verdict, warmed: Warmed) -> Outcome:
    most_rows = warmed.safe_rows or warmed.most_rows or verdict.model.max_batch_size
    with settings_restored("a forward"):
        return compare(runner.calls[verdict.model.key], module, verdict, runner.torch_device, most_rows)


def notes(attempts: Sequence[Attempt], taken: Attempt | None) -> tuple[str, ...]:
    """Sentences for an operator: what runs, what each variant gained, why one was left out."""
    if not attempts:
        return ()
    if taken is None:
        first = "optimize: the network runs as it is"
    else:
        assert taken.outcome is not None
        first = f"optimize: {taken.name} runs, in {taken.outcome.part:.2f} of the time"
    return (f"{first}; tried were {'; '.join(map(str, attempts))}",)


def optimizer_for(kind: str, config: Config, threads: int = 1) -> Optimizer:
    """The optimizer of a device of a kind. Args: threads: see `Optimizer`."""
    cache = artifacts.directory(config.cache_directory)
    return Optimizer(kind, config.optimize_s, config.load_timeout_s, cache, threads)
