"""The loop around a Python client: one process per client, in the environment of its server, told what to do by lines.

It is started as `python X_client.py SAMPLES ARGUMENTS...`. SAMPLES is an .npz file: `inputs` [K, N, 256], which take
turns, and the `outputs` [K, N, 128] that they must give. Each line on stdin, {"outstanding": 1, "seconds": 0.5}, is
answered by one `Report` as JSON on stdout. It ends with stdin.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Predict = Callable[[Array], Array]
PredictLater = Callable[[Array], Awaitable[Array]]

_CHECKED = 8  # answers per round that are compared with what they should be, after the clock has stopped
_ERROR_LENGTH = 80


@dataclasses.dataclass
class Report:
    """One round of calls.

    Attributes:
        latency_us: of every call that returned, from arrays to arrays.
        seconds: from the first call to the last return.
        cpu_us: CPU time of this process meanwhile.
        errors: exceptions and how they begin, counted, and "WRONG" for outputs that are not the model's.
    """

    latency_us: list[float]
    seconds: float = 0.0
    cpu_us: float = 0.0
    errors: dict[str, int] = dataclasses.field(default_factory=dict)


class Round:
    """The calls of one round: their inputs in turn, their times, and the last few outputs."""

    def __init__(self, samples: Any, seconds: float) -> None:
        self._inputs, self._expected = samples["inputs"], samples["outputs"]
        self._kept: deque[tuple[int, Array]] = deque(maxlen=_CHECKED)
        self._called = 0
        self._errors: Counter[str] = Counter()
        self.report = Report([])
        self._cpu_before = time.process_time()
        self._begin = time.perf_counter()
        self._end = self._begin + seconds

    def is_over(self) -> bool:
        return time.perf_counter() >= self._end

    def next_input(self) -> tuple[int, Array]:
        number = self._called % len(self._inputs)
        self._called += 1
        return number, self._inputs[number]

    def done(self, number: int, began: float, output: Array) -> None:
        self.report.latency_us.append((time.perf_counter() - began) * 1e6)
        self._kept.append((number, output))

    def failed(self, error: Exception) -> None:
        self._errors[f"{type(error).__name__} {error}"[:_ERROR_LENGTH]] += 1

    def finish(self) -> Report:
        self.report.seconds = time.perf_counter() - self._begin
        self.report.cpu_us = (time.process_time() - self._cpu_before) * 1e6
        for number, output in self._kept:
            expected = self._expected[number]
            if output.shape != expected.shape or not np.allclose(output, expected, rtol=1e-4, atol=1e-4):
                self._errors["WRONG"] += 1
        self.report.errors = dict(self._errors)
        return self.report


def call_one_by_one(round_: Round, predict: Predict) -> Report:
    while not round_.is_over():
        number, array = round_.next_input()
        began = time.perf_counter()
        try:
            output = predict(array)
        except Exception as error:
            round_.failed(error)
        else:
            round_.done(number, began, output)
    return round_.finish()


async def call_at_once(
    make_round: Callable[[], Round], connect: Callable[[], AbstractAsyncContextManager[PredictLater]], outstanding: int
) -> Report:
    """Run as many tasks as calls outstanding, each calling again when its call returns."""

    async def caller(round_: Round, predict: PredictLater) -> None:
        while not round_.is_over():
            number, array = round_.next_input()
            began = time.perf_counter()
            try:
                output = await predict(array)
            except Exception as error:
                round_.failed(error)
            else:
                round_.done(number, began, output)

    async with connect() as predict:
        round_ = make_round()
        await asyncio.gather(*(caller(round_, predict) for _ in range(outstanding)))
        return round_.finish()


def serve(predict: Predict, connect: Callable[[], AbstractAsyncContextManager[PredictLater]]) -> None:
    """Do what the lines on stdin say.

    Args:
        predict: one blocking call, for one outstanding.
        connect: opens an asynchronous client, for many.
    """
    samples = dict(np.load(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        outstanding, seconds = command["outstanding"], command["seconds"]
        gc.disable()
        if outstanding == 1:
            report = call_one_by_one(Round(samples, seconds), predict)
        else:
            report = asyncio.run(call_at_once(functools.partial(Round, samples, seconds), connect, outstanding))
        gc.enable()
        print(json.dumps(dataclasses.asdict(report)), flush=True)
