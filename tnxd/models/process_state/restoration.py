"""Restoration of the process after one step of a model's code: its import, its build, or a forward."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.events import event
from tnxd.models.process_state import monkey_patches
from tnxd.models.process_state.random_state import RandomState
from tnxd.models.process_state.setter_calls import SEED
from tnxd.models.process_state.snapshot import SETTINGS, Snapshot

log = logging.getLogger(__name__)

_HARMLESS = {setting.name for setting in SETTINGS if setting.harmless}


@dataclass
class Changes:
    """Changes of the process by a step.

    Attributes:
        what: the step, as the subject of a sentence.
        names: of the settings, and what has changed of them. lasting: those that could not be restored.
    """

    what: str
    names: list[str] = field(default_factory=list)
    lasting: list[str] = field(default_factory=list)

    def note(self) -> tuple[str, ...]:
        """Sentence for operators, if there is something to say.

        A harmless change that was undone is not worth one: many a library has warnings of its own ignored.
        """
        undone = [name for name in self.names if name not in self.lasting and name not in _HARMLESS]
        told = [f"{', '.join(undone)}: put back"] if undone else []
        if self.lasting:
            told.append(f"{', '.join(self.lasting)}, which could not be put back there")
        return (f"{self.what} changed {'; and '.join(told)}",) if told else ()


@contextmanager
def settings_restored(what: str = "it") -> Iterator[Changes]:
    """Restore after the block what it changes. Whatever it raises, the changes are complete then.

    Args:
        what: the block, as the subject of a sentence.

    Raises:
        FailedPrecondition: it has replaced a function of torch.
    """
    changes = Changes(what)
    earlier = monkey_patches.undo()
    if earlier:
        log.warning(
            "%s: put back",
            monkey_patches.sentence("a model that serves", earlier),
            extra=event("function_replaced", names=list(earlier)),
        )
    snapshot, random_state = Snapshot(), RandomState()
    try:
        yield changes
    finally:
        for _, name, restored in snapshot.restore():
            changes.names.append(name)
            if not restored:
                changes.lasting.append(name)
        if random_state.reseed():
            changes.names.append(SEED)
        replaced = monkey_patches.undo()
    if replaced:
        raise FailedPrecondition(monkey_patches.sentence(what, replaced))
