"""Serving loops under a rising load, in simulated time: how many deadlines are met when there is too much to do."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np

from policies import Scheduled
from simulation import Loop, Noise, replay
from traces import CPU, Job, Machine, Trace

MODEL = "wide"
"""Five linear layers of 768 columns."""

CAPACITY = 8_920.0
"""Requests per second that a daemon with this model did in a closed loop, on two cores with its client."""

MULTIPLES = (0.6, 0.8, 1.0, 1.5, 2.0, 4.0)

_DEADLINE_US = 50_000.0

# One forward with one thread as measured, times 0.69: fitted so that the loop, asked by a closed loop, does CAPACITY.
_WIDE = {1: 200, 2: 380, 4: 690, 8: 1_030, 16: 1_400, 32: 2_600, 64: 4_350}

# The proportions are about those of the CPU time of the methods of `tnxd.serving.server.Server`. The height is chosen:
# at twice the load that can be served it comes to 47 us per message. The kernel counted 39 and 46 us for the loop's
# thread in two such runs, half of that in long runs of refusals, when the caches hold what they need. At twice the load
# the loop is just busy all the time with it, so that the result depends on it far more than on all else.
_COSTS = Loop(
    receive_us=13.5,
    admit_us=18.0,
    refuse_us=28.5,
    answer_us=13.5,
    give_up_us=12.0,
    turn_us=150.0,
    inline_limit_us=1_000.0,
    cores=1.65,  # of two: a client takes 0.3 to 0.35 of one, whatever it sends
    beside_us=6.5,  # of ZeroMQ's thread
    lane_share=0.5,  # fitted; under twice the load a batch of 64 rows takes 11 ms with it, and took 11 to 12
    from_arrival=False,
)

RECEIPT, ARRIVAL, CHEAP = "from receipt", "from arrival", "+ cheap refusals"
LANES_FIRST, CORRECTED = "+ lanes first", "+ corrections"

LOOPS = {
    RECEIPT: _COSTS,
    ARRIVAL: replace(_COSTS, from_arrival=True),
    CHEAP: replace(_COSTS, from_arrival=True, refuse_us=(_COSTS.refuse_us - _COSTS.receive_us) / 2),
}
LOOPS[LANES_FIRST] = LOOPS[CORRECTED] = replace(LOOPS[CHEAP], lanes_first=True)
"""Loops by what is said of them: since when a deadline counts; then that to receive and refuse a request takes half;
then that lanes get their next batch before more is taken in; then that predictions are corrected by how requests fared.
"""


class Load(msgspec.Struct, frozen=True):
    """One load on one loop.

    Attributes:
        multiple: of CAPACITY. requests: offered in all.
        in_time_per_s: results within the deadline, by the client's clock. of_capacity: the same as a share.
        of_admitted: share of those that were taken in that were in time; None if none was.
        refused, given_up: shares of all, turned away on arrival, and after they had been taken in.
        unread_ms: p50 and p99 of how long messages waited to be taken in.
        batch_rows: on average.
    """

    loop: str
    multiple: float
    requests: int
    in_time_per_s: float
    of_capacity: float
    of_admitted: float | None
    refused: float
    given_up: float
    unread_ms: tuple[float, float]
    batch_rows: float


def offered(rate: float, seconds: float, seed: int) -> Trace:
    """Single rows of the model at random times, each with a deadline, on one CPU lane beside the loop."""
    machine = Machine({CPU: 1}, {MODEL: 64}, {(CPU, MODEL): _WIDE})
    gaps_us = np.random.default_rng(seed).exponential(1e6 / rate, max(int(rate * seconds), 1))
    jobs = [Job(float(at), float(at) + _DEADLINE_US, MODEL) for at in np.cumsum(gaps_us)]
    return Trace(MODEL, "single rows, Poisson, 50 ms each", machine, jobs)


def measure(name: str, multiple: float, seed: int, seconds: float = 2.0) -> Load:
    """Replay a load through the daemon's scheduler, in a loop of that name."""
    loop = LOOPS[name]
    trace = offered(multiple * CAPACITY, seconds, seed)
    noise = Noise(trace.machine, seed)
    scheduled = Scheduled(
        trace.machine, trace.jobs, noise, inline_limit_us=loop.inline_limit_us, corrects=name == CORRECTED
    )
    outcome = replay(trace, scheduled, noise, loop)
    count, in_time = len(trace.jobs), int(outcome.in_time.sum())
    admitted = count - outcome.refused
    half, most = np.percentile(outcome.unread_us, (50, 99)) / 1e3
    return Load(
        loop=name,
        multiple=multiple,
        requests=count,
        in_time_per_s=in_time / seconds,
        of_capacity=in_time / seconds / CAPACITY,
        of_admitted=in_time / admitted if admitted else None,
        refused=outcome.refused / count,
        given_up=outcome.given_up / count,
        unread_ms=(float(half), float(most)),
        batch_rows=outcome.rows_per_batch,
    )


def heading() -> str:
    return (
        f"The model {MODEL} at multiples of {CAPACITY:,.0f}/s, a deadline of {_DEADLINE_US / 1e3:.0f} ms\n\n"
        f"{'deadlines count':<22}{'load':>6}{'in time/s':>11}{'of capacity':>13}{'of admitted':>13}{'refused':>9}"
        f"{'given up':>10}{'unread p50, p99 ms':>21}{'rows':>7}"
    )


def line(load: Load) -> str:
    of_admitted = "-" if load.of_admitted is None else f"{100 * load.of_admitted:.1f}"
    unread = ", ".join(f"{wait:.1f}" for wait in load.unread_ms)
    return (
        f"{load.loop:<22}{load.multiple:>6g}{load.in_time_per_s:>11,.0f}{100 * load.of_capacity:>13.1f}"
        f"{of_admitted:>13}{100 * load.refused:>9.1f}{100 * load.given_up:>10.1f}{unread:>21}{load.batch_rows:>7.1f}"
    )
