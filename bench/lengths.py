"""Texts of all lengths in simulated time: closed loops through the daemon's scheduler, by how they share batches.

`schedule.py --ragged` prints it.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

import msgspec
import numpy as np

from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Batch, Device
from tnxd.scheduling.request import Request
from tnxd.scheduling.scheduler import Scheduler

EQUAL, PADDED, PACKED, LONGEST = "equal lengths", "padded", "packed", "pad to longest"
WAYS = (EQUAL, PADDED, PACKED, LONGEST)
"""Ways to share batches: texts of equal lengths alone; as the daemon pads, and as it packs; the oldest ones, as many as
a batch takes, padded to the longest of them."""

OUTSTANDING = (8, 64, 256)

_MODEL = "texts"
_ROWS = 64
_LONGEST = 512

# Median and spread of the lengths of sentences in tokens: 29 on average, a hundredth of them over 130.
_MEDIAN, _SPREAD, _LEAST, _MOST = 21.0, 0.8, 3, 160

# Microseconds of all-MiniLM-L6-v2 over the tokens of a batch, on one thread while nothing else ran.
_MINILM = {1: 7_500, 8: 8_300, 32: 10_900, 100: 21_000, 160: 34_000, 16_384: 3_400_000}


def texts(seed: int) -> Iterator[int]:
    """Lengths of texts, without an end: lognormal, as those of sentences are."""
    chance = np.random.default_rng(seed)
    while True:
        drawn = np.exp(np.log(_MEDIAN) + _SPREAD * chance.standard_normal(1000))
        yield from np.clip(np.rint(drawn), _LEAST, _MOST).astype(int).tolist()


def cpu_us(tokens: int) -> float:
    """Microseconds of a batch on a CPU: all-MiniLM-L6-v2 on one thread."""
    return float(np.interp(tokens, list(_MINILM), list(_MINILM.values())))


def gpu_us(tokens: int) -> float:
    """Microseconds of a batch on a GPU as it is assumed: as good as nothing up to 2,000 tokens, then each the same."""
    return 2_000.0 + max(tokens - 2_000, 0)


MACHINES: dict[str, Callable[[int], float]] = {"CPU": cpu_us, "assumed GPU": gpu_us}


class Fared(msgspec.Struct, frozen=True):
    """Outcome of one loop.

    Attributes:
        machine, way, outstanding: key of `MACHINES`, one of `WAYS`, requests that wait for an answer at a time.
        per_s: texts in a second. p50_ms, p99_ms: of their latencies. rows: of a batch, on average.
    """

    machine: str
    way: str
    outstanding: int
    per_s: float
    p50_ms: float
    p99_ms: float
    rows: float


class _Text(Request, kw_only=True):
    came: float


def measure(machine: str, way: str, outstanding: int, seed: int, done: int = 4_000) -> Fared:
    """Keep so many texts outstanding until as many are done, and a tenth of them before that."""
    if way == LONGEST:
        return _summary(machine, way, outstanding, _to_the_longest(MACHINES[machine], outstanding, seed), done)
    return _summary(machine, way, outstanding, _scheduled(MACHINES[machine], way, outstanding, seed), done)


def _summary(
    machine: str, way: str, outstanding: int, batches: Iterator[tuple[float, list[float]]], done: int
) -> Fared:
    skipped, latencies, sizes, began, now = 0, [], [], 0.0, 0.0
    for now, came in batches:
        if skipped < done // 10:
            skipped += len(came)
            began = now
            continue
        latencies += [now - one for one in came]
        sizes.append(len(came))
        if len(latencies) >= done:
            break
    p50, p99 = np.percentile(latencies, (50, 99))
    rate = len(latencies) / (now - began) * 1e6
    return Fared(machine, way, outstanding, float(rate), float(p50) / 1e3, float(p99) / 1e3, float(np.mean(sizes)))


def _to_the_longest(cost: Callable[[int], float], outstanding: int, seed: int) -> Iterator[tuple[float, list[float]]]:
    """Ends of batches in microseconds, and when their texts came."""
    lengths = texts(seed)
    waiting = deque((0.0, next(lengths)) for _ in range(outstanding))
    now = 0.0
    while True:
        batch = [waiting.popleft() for _ in range(min(_ROWS, len(waiting)))]
        now += cost(len(batch) * max(length for _, length in batch))
        waiting += [(now, next(lengths)) for _ in batch]
        yield now, [came for came, _ in batch]


def request(way: str, length: int, *, client: str = "client", now_us: float = 0.0) -> Request:
    """A text of so many tokens, as the daemon would queue it."""
    if way == EQUAL:
        return _Text(_MODEL, _ROWS, group=(length,), client=client, came=now_us)
    if way == PACKED:
        return _Text(_MODEL, 2_048, length, client=client, came=now_us)
    return _Text(_MODEL, _ROWS * _LONGEST, length, client=client, length=length, most_rows=_ROWS, came=now_us)


def scheduler(way: str, cost: Callable[[int], float]) -> Scheduler:
    """The daemon's scheduler for one lane, after a warm-up."""
    made = Scheduler([Device("cpu", "cpu", 1, set())], CostModel(), max_requests=1 << 20, max_bytes=1 << 40)
    sizes = [(rows, 1 << power) for rows in (1, 4, 16) for power in range(10) if rows << power <= 1024]
    if way == EQUAL:
        made.models.add("cpu", _MODEL, group=(1,), costs=[(rows, cost(rows)) for rows in (1, 2, 4, 8, 16, 32, 64)])
    else:
        made.models.add(
            "cpu",
            _MODEL,
            costs=[(rows * length, cost(rows * length)) for rows, length in sizes],
            padded=[(rows, length, cost(rows * length)) for rows, length in sizes] if way == PADDED else None,
        )
    return made


def tokens(way: str, batch: Batch) -> int:
    """Tokens of a batch that are computed."""
    if way == EQUAL:
        return batch.rows * batch.requests[0].group[0]
    return batch.rows


def _scheduled(
    cost: Callable[[int], float], way: str, outstanding: int, seed: int
) -> Iterator[tuple[float, list[float]]]:
    made, lengths = scheduler(way, cost), texts(seed)
    now = 0.0
    running: list[tuple[float, int, Batch]] = []
    serial = count()
    missing = outstanding
    while True:
        for _ in range(missing):
            made.add(request(way, next(lengths), now_us=now), int(now * 1e3))
        batches, _ = made.next_batches(int(now * 1e3))
        for batch in batches:
            heapq.heappush(running, (now + cost(tokens(way, batch)), next(serial), batch))
        began = now
        now, _, batch = heapq.heappop(running)
        made.finished(batch, now - began, int(now * 1e3))
        missing = len(batch.requests)
        yield now, [one.came for one in batch.requests if isinstance(one, _Text)]


def heading() -> str:
    """First lines of the table."""
    return (
        "Texts of all lengths, lognormal, 29 tokens on average; closed loops, one lane\n\n"
        f"{'machine':<13}{'outstanding':>11}  {'share batches':<16}{'texts/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'rows':>7}"
        f"{'gain':>7}"
    )


def line(one: Fared, base: Fared) -> str:
    """One line of it. Args: base: what the gain is over."""
    return (
        f"{one.machine:<13}{one.outstanding:>11}  {one.way:<16}{one.per_s:>9.1f}{one.p50_ms:>9.1f}{one.p99_ms:>9.1f}"
        f"{one.rows:>7.1f}{one.per_s / base.per_s:>7.2f}"
    )
