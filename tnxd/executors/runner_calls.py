"""Calls of the models of a device: one of each for every runner, also for runners and models that come later."""

from __future__ import annotations

from collections.abc import Callable

from tnxd.executors.runner import Runner
from tnxd.executors.trial.copies import Call


class RunnerCalls:
    """Calls of the models of a device. Any thread may use it."""

    def __init__(self) -> None:
        self._runners: list[Runner] = []
        self._calls: dict[str, Callable[[], Call]] = {}

    def add(self, runner: Runner) -> None:
        """Give a runner calls of its own for all models, those that come later included."""
        # First known, then given the calls there are; `install` does it the other way round, on another thread.
        self._runners.append(runner)
        for key, call in list(self._calls.items()):
            runner.calls[key] = call()

    def remove(self, runner: Runner) -> None:
        """Give a runner no more calls."""
        self._runners.remove(runner)

    def install(self, key: str, call: Callable[[], Call]) -> None:
        """Give every runner its call for a model."""
        self._calls[key] = call
        for runner in list(self._runners):
            runner.calls[key] = call()

    def installed(self, key: str) -> Callable[[], Call]:
        """Maker of the calls for a model."""
        return self._calls[key]

    def forget(self, key: str) -> None:
        """Take the calls for a model from all runners."""
        self._calls.pop(key, None)
        for runner in list(self._runners):
            runner.calls.pop(key, None)
