"""The result of `predict`, and what a client counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from tnxctl.protocol.errors import InvalidArgument
from tnxctl.protocol.wire import StepTiming, Timing

if TYPE_CHECKING:
    from tnxctl.protocol.datatypes import Array
else:
    Array = Any  # numpy takes long to import, and whoever looks at signatures at run time needs a name here


class Result(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Outputs of one predict call, and how it was run.

    Attributes:
        outputs: name -> array, in the model's order. They look into the received message, which is nobody else's: they
            may be written to. BF16 comes as `ml_dtypes.bfloat16`, BYTES as objects, each a `bytes`: see `text`.
        model, version: what ran.
        device: where it ran: "cpu", "cuda:0", ...
        reason: why there, in words.
        batch_size: rows in the batch that the request rode in, its own included.
        latency_ms: the forward on the device, for the whole batch.
        gpu_memory_mb: free memory of that GPU in MiB when the batch was done; 0 on a CPU.
        timing: where the time in the daemon went, in microseconds.
        predicted_us: when the request came, the microseconds until it would be done, as the daemon predicted
            them then; 0 if it made no prediction. `actual_us` tells what they were in fact.
        steps: of a pipeline, where the time of each step went; () of any other model.
    """

    outputs: dict[str, Array]
    model: str
    version: str
    device: str
    reason: str
    batch_size: int
    latency_ms: float
    gpu_memory_mb: float
    timing: Timing
    predicted_us: float = 0.0
    steps: tuple[StepTiming, ...] = ()

    @property
    def actual_us(self) -> float:
        """Microseconds from the queueing of the request to the end of its batch: what `predicted_us` foretells."""
        timing = self.timing
        return timing.queue_us + timing.gather_us + timing.h2d_us + timing.compute_us + timing.d2h_us

    @property
    def output(self) -> Array:
        """The only output.

        Raises:
            InvalidArgument: the model has several (or none); the sentence names them.
        """
        if len(self.outputs) == 1:
            return next(iter(self.outputs.values()))
        names = ", ".join(map(repr, self.outputs)) or "none"
        raise InvalidArgument(
            f"model {self.model!r} has {len(self.outputs)} outputs ({names}): take one with .outputs[name]"
        )

    def text(self, name: str | None = None) -> Array:
        """A BYTES output as text: an object array of `str`, of the same shape.

        Args:
            name: of the output; None: the only one.

        Raises:
            InvalidArgument: there is no such output, it has another datatype, or an element is not UTF-8; the sentence
                names it.
        """
        from tnxctl.protocol import strings

        if name is None:
            called, array = "the output", self.output
        elif name in self.outputs:
            called, array = f"output {name!r}", self.outputs[name]
        else:
            raise InvalidArgument(f"model {self.model!r} has no output {name!r}, only {[*self.outputs]}")
        if not array.dtype.hasobject:
            raise InvalidArgument(f"{called} is {array.dtype}, and only BYTES can be text")
        fault = strings.not_text(array)
        if fault:
            raise InvalidArgument(f"{called}: {fault}")
        return strings.as_text(array)


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of what a client of several daemons has sent.

    Attributes:
        endpoints: requests that were sent to each daemon, copies included.
        moved: requests that were sent again, to another daemon or to the same, since one had refused or was lost.
        hedged: requests that were sent to a second daemon as well, since the first took long.
        hedges_won: those of them that the second one answered first.
    """

    endpoints: dict[str, int]
    moved: int
    hedged: int
    hedges_won: int
