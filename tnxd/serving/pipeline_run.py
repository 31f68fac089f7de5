"""State of one request for a pipeline that is under way: which of its steps are done, and what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal
from tnxctl.protocol.strings import nbytes_of
from tnxctl.protocol.wire import StepTiming
from tnxd.deployment.version import Version
from tnxd.models.pipelines import Node, Source
from tnxd.serving.pending import Pending, StepRequest
from tnxd.serving.pipeline_preparation import Fitted
from tnxd.serving.step_errors import of_step


class Stage(NamedTuple):
    """Report about a step that is done. An execution would keep the tensors of all requests of its batch alive.

    Attributes:
        timing: as the reply has it. reason: why it ran where it did.
        finished_ns: when, of `time.perf_counter_ns`. latency_us: of the forward.
    """

    timing: StepTiming
    reason: str
    finished_ns: int
    latency_us: float


class Run:
    """A request for a pipeline between its start and its end.

    Attributes:
        whole: the request. fitted: what it runs. versions: of the steps.
        after_us: for each step, what those behind it will take at least.
        inputs: of the whole. results: outputs of each step that is done, as long as somebody needs them.
        missing: for each step, how many of those before it are not done. uses: how many may still take its outputs.
        outstanding: steps that wait or run. stages: those that are done.
        held, most_held: bytes of `results`, now and at most so far. counted: for how many of them room was found.
    """

    __slots__ = (
        "after_us",
        "counted",
        "fitted",
        "held",
        "inputs",
        "missing",
        "most_held",
        "outstanding",
        "results",
        "stages",
        "uses",
        "versions",
        "whole",
    )

    def __init__(self, whole: Pending, fitted: Fitted, versions: Sequence[Version], after_us: Sequence[float]) -> None:
        wiring = fitted.wiring
        self.whole = whole
        self.fitted = fitted
        self.versions = versions
        self.after_us = after_us
        self.inputs = whole.arrays
        self.results: list[tuple[Array, ...]] = [()] * len(versions)
        self.missing = [len(node.before) for node in wiring.nodes]
        self.uses = list(wiring.uses)
        self.outstanding: set[StepRequest] = set()
        self.stages: list[Stage | None] = [None] * len(versions)
        self.held = self.most_held = 0
        self.counted = fitted.expected_nbytes(whole.rows)

    def keep(self, place: int, outputs: tuple[Array, ...]) -> None:
        """Keep the outputs of a step until nobody needs them any more."""
        self.results[place] = outputs
        self.held += sum(map(nbytes_of, outputs))
        self.most_held = max(self.most_held, self.held)

    def expect(self) -> None:
        """Expect of the next request that its results take as much."""
        self.fitted.row_nbytes = self.most_held / max(self.whole.rows, 1)

    def used(self, place: int) -> None:
        """The outputs of a step were taken, once of as often as they are needed."""
        self.uses[place] -= 1
        if not self.uses[place]:
            self.held -= sum(map(nbytes_of, self.results[place]))
            self.results[place] = ()

    def tensor(self, source: Source) -> Array:
        """Array that a source stands for."""
        array = self.inputs[source.place] if source.step < 0 else self.results[source.step][source.place]
        assert array is not None  # a pipeline has no input that may be left out
        return array

    def needed(self) -> set[str]:
        """Keys of all models that it needs until it ends."""
        return {self.whole.model, *(node.model.key for node in self.fitted.wiring.nodes)}


def check_rows(node: Node, request: StepRequest, outputs: tuple[Array, ...]) -> None:
    """Check that a step has as many rows as it got. Raises Internal: it has others."""
    for place, inputs in node.keeps:
        came = [array.shape[0] for array in [request.arrays[at] for at in inputs] if array is not None]
        rows = outputs[place].shape[0]
        if rows not in came:
            spec = node.model.outputs[place]
            raise Internal(
                of_step(
                    node.name,
                    f"output {spec.name!r} has {rows} rows, its inputs have {came[0]}; where that is meant, "
                    f"pipeline.toml says changes_rows = true",
                )
            )
