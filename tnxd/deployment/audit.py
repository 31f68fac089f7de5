"""Audit: one request of a batch now and then is computed again, alone, and compared with what it was answered.

Loading a version proves on two examples that a batch gives each request what it would have got alone, and that no
request leaves anything behind; of a variant, on a few more, that it answers as the network does. The audit goes on
looking, at real traffic, in idle time: it is the network as it is that computes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tnxctl.protocol.errors import ResourceExhausted, TensorNextError, Unavailable
from tnxd.deployment.background import Answered, Background, Copy
from tnxd.deployment.version import Version
from tnxd.events import event
from tnxd.executors.execution import Execution
from tnxd.models.rounding import Difference, difference

log = logging.getLogger(__name__)

# Values that count or choose may differ where a near tie was decided by rounding, and a second computation may fail for
# reasons of its own: that has to happen several times.
_PATIENCE = 3

# Checks after which one of those is forgotten: rounding decides a tie in one of many thousand.
_FORGETS_AFTER = 100


OnDifference = Callable[[Version, str, str], None]
"""Called with a version, the key of the model that was asked, and how an answer of it is another than it should be."""


class Audit:
    """The audit of one version.

    Attributes:
        version: whose. checked: requests that were computed again. differing: those whose answer was another.
        skipped: those that found no moment.
    """

    plain = True

    def __init__(self, version: Version, share: float, on_mixing: OnDifference, on_variant: OnDifference) -> None:
        """Args:
        share: of the batches, more than 0.
        on_mixing: called when batches have to end. on_variant: called when a variant has to go.
        """
        self.version = version
        self.checked = 0
        self.differing = 0
        self.skipped = 0
        self._every = max(round(1 / share), 1)
        self._left = [0, 0]  # batches of one request until the next one is checked; those of several
        self._on_mixing = on_mixing
        self._on_variant = on_variant
        self._doubts = 0

    def offer(self, execution: Execution, background: Background) -> None:
        """Consider an answered batch of this version for the audit."""
        several = len(execution.items) > 1
        left = self._left[several]
        if left:
            self._left[several] = left - 1
            return
        self._left[several] = self._every - 1
        answered = [place for place, outcome in enumerate(execution.outcomes) if isinstance(outcome, tuple)]
        if answered:
            one = _one(execution, answered[self.checked % len(answered)], self.version.variant)
            background.offer(one, self.version, self)

    def skip(self, requests: int) -> None:
        self.skipped += requests

    def compare(self, copy: Copy) -> None:
        model, original = copy.model, copy.original
        (answer,), (again,) = original.outcomes, copy.outcomes
        assert isinstance(answer, tuple)
        if isinstance(again, (ResourceExhausted, Unavailable)):
            return  # which says something about the device
        # The copy may have run on another device than the batch.
        allowed = max((trial.tolerance for trial in self.version.trials.values()), default=0.0)
        self.checked += 1
        found: Difference | None
        if isinstance(again, TensorNextError):
            found = Difference(f"it fails with {again.message}", counted=True)
        else:
            found = difference(model.outputs, answer, again, allowed)
        if found is None:
            if self.checked % _FORGETS_AFTER == 0:
                self._doubts = max(self._doubts - 1, 0)
            return
        self.differing += 1
        self._doubts += 1 if found.counted else _PATIENCE
        company = original.company
        log.error(
            "audit of %s: a request %s%swas computed again, and has another answer: %s",
            *(self.version.title, f"from a batch of {company} " if company > 1 else "", _by(original), found.text),
            extra=event(
                "audit_differs", self.version.title, count=company, variant=original.variant, reason=found.text
            ),
        )
        if self._doubts < _PATIENCE:
            return
        if original.variant:  # if it was for the company, later ones will tell
            self._doubts = 0
            self._on_variant(self.version, model.key, f"{original.variant} answered otherwise: {found.text}")
        elif company > 1:
            self._on_mixing(
                self.version, model.key, f"a request in a batch was answered otherwise than alone: {found.text}"
            )


def _by(original: Answered) -> str:
    return f"that {original.variant} answered " if original.variant else ""


def _one(execution: Execution, place: int, variant: str) -> Answered:
    """One request of a batch, without the memory of the others. Args: variant: that answered, see `Answered`."""
    outcome = execution.outcomes[place]
    assert isinstance(outcome, tuple)
    if len(execution.items) > 1:  # its outputs are views of those of all
        outcome = tuple([array.copy() for array in outcome])
    return Answered(
        execution.model,
        [execution.items[place]],
        [execution.rows[place]],
        execution.group,
        [outcome],
        len(execution.items),
        execution.latency_us,
        variant,
    )
