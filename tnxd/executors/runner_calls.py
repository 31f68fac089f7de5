"""Calls of the models of a device: one of each for every runner, also for runners and models that come later.

Where a variant runs in the place of a network, there are two: what answers, and the network as it is, by which the
variant can be judged, and which takes over where the variant is given up.
"""

from __future__ import annotations

from collections.abc import Callable

from tnxd.executors.runner import Runner
from tnxd.executors.trial.copies import Call

Maker = Callable[[], Call]
"""Maker of the calls of a model, one for each runner."""


class RunnerCalls:
    """Calls of the models of a device. Any thread may use it.

    Args:
        settle: waits until tensors that the calling thread has made, such as those of a lane's own copy, can be used
            on all lanes.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self._settle = settle
        self._runners: list[Runner] = []
        self._calls: dict[str, Maker] = {}
        self._plain: dict[str, Maker] = {}

    def add(self, runner: Runner) -> None:
        """Give a runner calls of its own for all models, those that come later included."""
        # First known, then given the calls there are; `install` does it the other way round, on another thread.
        self._runners.append(runner)
        calls = {key: call() for key, call in list(self._calls.items())}
        plain_calls = {key: call() for key, call in list(self._plain.items())}
        if calls:
            self._settle()
        runner.calls.update(calls)
        runner.plain_calls.update(plain_calls)

    def remove(self, runner: Runner) -> None:
        """Give a runner no more calls."""
        self._runners.remove(runner)

    def install(self, key: str, call: Maker, plain: Maker | None = None) -> None:
        """Give every runner its call for a model. Args: plain: of the network, if `call` is that of a variant."""
        self._calls[key] = call
        runners = list(self._runners)
        calls = [call() for _ in runners]
        plain_calls = []
        if plain is not None:
            self._plain[key] = plain
            plain_calls = [plain() for _ in runners]
        self._settle()
        for runner, made in zip(runners, calls, strict=True):
            runner.calls[key] = made
        if plain is None:
            self._forget_plain(key)
            return
        for runner, made in zip(runners, plain_calls, strict=True):
            runner.plain_calls[key] = made

    def installed(self, key: str) -> Maker:
        """Maker of the calls for a model."""
        return self._calls[key]

    def give_up_variant(self, key: str) -> None:
        """Give every runner the call of the network as it is, where there is a variant."""
        plain = self._plain.get(key)
        if plain is not None:
            self.install(key, plain)

    def forget(self, key: str) -> None:
        """Take the calls for a model from all runners."""
        self._calls.pop(key, None)
        for runner in list(self._runners):
            runner.calls.pop(key, None)
        self._forget_plain(key)

    def _forget_plain(self, key: str) -> None:
        self._plain.pop(key, None)
        for runner in list(self._runners):
            runner.plain_calls.pop(key, None)
