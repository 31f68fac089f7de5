"""Side effects of forwards on the process: settings that a model changes in every forward."""

from __future__ import annotations

import random
from collections import Counter
from types import TracebackType

import numpy as np
import torch

from tnxd.models.process_state import random_state
from tnxd.models.process_state.setter_calls import SEED, recorded
from tnxd.models.process_state.snapshot import SETTINGS, Snapshot

_HARMFUL = tuple(setting for setting in SETTINGS if not setting.harmless)


class SideEffectDetector:
    """Side effects of several forwards of one model; the process is restored after each.

    The first forward may change what a library sets up at its first use. A setting that changes again, though it was
    restored, is changed by the model itself.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._descriptions: dict[str, str] = {}
        self._begins: dict[tuple[str, int], int] = {}
        self._seeds: set[str] = set()
        self._sets: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._snapshot = Snapshot(_HARMFUL)
        self._torch = torch.initial_seed(), torch.get_rng_state()
        # Else a forward that seeds a generator and draws would find it as the last one left it.
        random.random()
        np.random.random()
        self._generators = random_state.hashes()
        self._set: set[str] = set()
        self._recording = recorded(self._set)
        self._recording.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recording.__exit__(None, None, None)
        self._sets.update(self._set)
        for setting, description, _ in self._snapshot.restore():
            self._times[setting.name] += 1
            self._descriptions[setting.name] = description  # the latest: libraries set things up at first
        del self._snapshot
        seed, state = self._torch
        if torch.initial_seed() != seed:
            self._times[SEED] += 1
            torch.set_rng_state(state)
        for name, end in random_state.hashes().items():
            begin = self._generators[name]
            # Two forwards that begin differently and end the same have set the generator.
            if end != begin and self._begins.setdefault((name, end), begin) != begin:
                self._seeds.add(name)

    def complaint(self) -> str:
        """Sentence about the settings that a forward changes, or sets, every time; "" if there are none."""
        lasting = [*(name for name, times in self._times.items() if times > 1), *sorted(self._seeds)]
        brief = [name for name, times in self._sets.items() if times > 1 and name not in lasting]
        told = []
        if lasting:
            names = ", ".join(self._descriptions.get(name, name) for name in lasting)
            told.append(f"changes {names}, for all models of the process")
        if brief:
            told.append(f"sets {', '.join(sorted(brief))}, if only for a while: other models run meanwhile")
        return f"a forward {'; and '.join(told)}" if told else ""
