"""OpenMP: how threads of a team wait for work, and where they run, which it reads from the environment when loaded."""

from __future__ import annotations

import logging
import os

from tnxd.events import event

log = logging.getLogger(__name__)

_SPIN_COUNT = "GOMP_SPINCOUNT"
_POLICY = "OMP_WAIT_POLICY"

# By default a thread of a team polls for some 2 ms after a forward before it sleeps, on a core that the next batch or
# the serving thread may want. With this many rounds there is none of that, and a forward takes as long as before.
_ROUNDS = "10000"

_BINDING = "OMP_PROC_BIND"
_PLACING = (_BINDING, "OMP_PLACES", "GOMP_CPU_AFFINITY")


def settle() -> None:
    """Settle how OpenMP's threads wait, unless the operator has, and let them run on all cores of the process.

    To be called before torch is imported.
    """
    if _SPIN_COUNT not in os.environ and _POLICY not in os.environ:
        os.environ[_SPIN_COUNT] = _ROUNDS
    _unbind()


def _unbind() -> None:
    """Have OpenMP bind no thread to a core.

    It would bind the thread that loads it and each that begins a team, which are the lanes, all to the first core. The
    threads that they start, such as lanes and those of models, would begin there, and the others be idle.
    """
    if os.environ.get(_BINDING, "").strip().lower() == "false":
        return
    names = [name for name in _PLACING if os.environ.get(name)]
    os.environ[_BINDING] = "false"
    if names:
        log.warning(
            "%s would bind all lanes to the same core: it is not used; taskset or CPUAffinity= choose cores",
            ", ".join(names),
            extra=event("binding_unused", names=names),
        )
