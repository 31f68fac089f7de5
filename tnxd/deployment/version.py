"""Versions of models: what was loaded, and the state that it is in. No torch, no I/O."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from tnxd.events import event
from tnxd.executors.execution import STATES, LoadReport
from tnxd.models.catalog import Source
from tnxd.models.model import Model, model_key

log = logging.getLogger(__name__)

# States of a version; the daemon itself is STARTING, READY or DRAINING, too.
UNLOADED = "unloaded"
STARTING = "starting"
READY = "ready"
DRAINING = "draining"
EVICTED = "evicted"
FAILED = "failed"


class Version:
    """One version of one model, with one content: files that change become another Version.

    Attributes:
        source: where it comes from. generation: see `Model`.
        state: READY, UNLOADED, DRAINING, EVICTED or FAILED.
        loading: whether it is being loaded, or about to be. An evicted version stays EVICTED meanwhile: its traffic
            waits for it.
        model: what serves, or served last; None before the first time.
        error: why it failed; of a version that serves, why newer files of the same version do not.
        nbytes: weights and buffers on each of its devices. load_s: seconds to load and warm up.
        last_used: a number that grows with every request to any model.
        came_back: when it was last loaded for a request after it had been evicted, by the monotonic clock.
        notes: what an operator should know. trials: what loading it showed, by device.
        mixes: why its requests run alone, though loading it did not show that they must; else "".
        given_up: why no variant of its network runs, though loading it found one; else "".
        unserved: why a pipeline that is READY cannot be served now: a step is not there; else "".
    """

    __slots__ = (
        "came_back",
        "error",
        "generation",
        "given_up",
        "last_used",
        "load_s",
        "loading",
        "mixes",
        "model",
        "nbytes",
        "notes",
        "source",
        "state",
        "trials",
        "unserved",
    )

    def __init__(self, source: Source, generation: int = 0) -> None:
        self.source = source
        self.generation = generation
        self.state = UNLOADED
        self.loading = False
        self.model: Model | None = None
        self.error = ""
        self.nbytes = source.nbytes
        self.load_s = 0.0
        self.last_used = 0
        self.notes: tuple[str, ...] = ()
        self.trials: Mapping[str, LoadReport] = {}
        self.mixes = ""
        self.given_up = ""
        self.unserved = ""
        self.came_back = float("-inf")

    @property
    def number(self) -> str:
        """The version number, as it is written."""
        return self.source.version

    @property
    def title(self) -> str:
        """NAME@VERSION."""
        return f"{self.source.name}@{self.source.version}"

    @property
    def key(self) -> str:
        """The key of its model, now or once it is loaded."""
        return model_key(self.source.name, self.source.version, self.generation)

    @property
    def kind(self) -> str:
        """The most careful state among its devices, see `STATES`; "" before it was loaded."""
        return max((trial.state for trial in self.trials.values()), key=STATES.index, default="")

    def end_batches(self, key: str, why: str) -> None:
        """Have each request run alone, and whole, from now on, if it is still the model of that key that serves.

        Args:
            why: how requests to that model change each other's answers in a batch.
        """
        if self.model is None or self.model.key != key or not self.model.max_batch_size:
            return
        self.mixes = why
        self.model = self.model.singly()
        self.notes = (*self.notes, f"no batches any more: {why}")
        about = event("batches_given_up", self.title, reason=why)
        log.error("%s: its requests run alone from now on: %s", self.title, why, extra=about)

    @property
    def variant(self) -> str:
        """Name of the variant of the network that runs, on one device at least; "" if there is none."""
        return next((trial.variant for trial in self.trials.values() if trial.variant), "")

    def give_up_variant(self, key: str, why: str) -> bool:
        """Note that the network runs as it is from now on, if it is still the model of that key that serves.

        Args:
            why: how the variant answered otherwise.

        Returns:
            Whether there was a variant.
        """
        if self.model is None or self.model.key != key or not self.variant:
            return False
        self.given_up = why
        self.trials = {name: trial._replace(variant="") for name, trial in self.trials.items()}
        self.notes = (*self.notes, f"optimize: the network runs as it is now, since {why}")
        about = event("variant_given_up", self.title, reason=why)
        log.error("%s: the network runs as it is from now on: %s", self.title, why, extra=about)
        return True

    @property
    def servable(self) -> bool:
        """Whether requests may be sent to it; an evicted version is loaded for them."""
        return self.state in (READY, EVICTED)
