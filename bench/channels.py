"""`python bench/channels.py`: what a client gains that speaks ZMTP by itself, over one that has libzmq do it.

A model gives back what it gets. Clients of one daemon take turns in each round: `Client` and `AsyncClient`, each by
libzmq and without it, and `AsyncClient` with busy polling. The floor is a plain socket that blocks, and sends the same
bytes again and again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import click
import numpy as np

import passing
import zmtpsocket
from processes import ChildProcess
from rounds import in_turns
from shared_memory import alone, together
from targets import daemon_target, start_daemon
from tnxctl import AsyncClient, Client
from tnxctl.channels import opening

_BUSY_POLL_S = 1e-3

Rate = Callable[[Any, int, float], float]
"""Requests a second with an array, so many outstanding, for so many seconds."""


def through_libzmq(ask: Callable[[], object], *, wanted: bool) -> None:
    """Have a client connect by its first request, through libzmq or not."""
    has_streams, opening.HAS_STREAMS = opening.HAS_STREAMS, not wanted
    try:
        ask()
    finally:
        opening.HAS_STREAMS = has_streams


def plain_socket(endpoint: str) -> Rate:
    """The floor: one request at a time, nothing decoded but where a message ends."""

    def rate(array: Any, outstanding: int, seconds: float) -> float:
        assert outstanding == 1
        header, tensor = passing.workload(array, prefer_gpu=True).request(0)  # as clients do unless told otherwise
        message = zmtpsocket.frame(header, zmtpsocket.MORE) + zmtpsocket.frame(tensor)
        connection, _ = zmtpsocket.connect(endpoint)
        with connection:
            messages, count, began = zmtpsocket.Messages(), 0, time.perf_counter()
            while time.perf_counter() < began + seconds:
                connection.sendall(message)
                while not messages.take(zmtpsocket.read(connection, endpoint)):
                    pass
                count += 1
            return count / (time.perf_counter() - began)

    return rate


class Contenders:
    """Clients of one daemon. Attributes: rates: by name, in the order in which they are told."""

    def __init__(self, stack: contextlib.ExitStack, endpoint: str) -> None:
        runner = stack.enter_context(asyncio.Runner())
        self.rates: dict[str, Rate] = {"plain socket": plain_socket(endpoint)}

        def of_threads(client: Client, array: Any, _: int, seconds: float) -> float:
            return alone(client, array, seconds)

        def of_tasks(client: AsyncClient, array: Any, outstanding: int, seconds: float) -> float:
            return runner.run(together(client, array, outstanding, seconds))

        for libzmq in (True, False):
            client = stack.enter_context(Client(endpoint))
            through_libzmq(client.health, wanted=libzmq)
            self.rates[_name("Client", libzmq)] = partial(of_threads, client)
        for libzmq, busy_poll in ((True, 0.0), (False, 0.0), (False, _BUSY_POLL_S)):
            aio = AsyncClient(endpoint, busy_poll=busy_poll)
            stack.callback(_run, runner, aio.close)
            through_libzmq(partial(_run, runner, aio.health), wanted=libzmq)
            self.rates[_name("AsyncClient", libzmq) + (", busy polling" if busy_poll else "")] = partial(of_tasks, aio)

    def with_outstanding(self, outstanding: int) -> dict[str, Rate]:
        """Those that can have so many outstanding."""
        if outstanding == 1:
            return self.rates
        return {name: rate for name, rate in self.rates.items() if name.startswith("AsyncClient")}


def _run(runner: asyncio.Runner, method: Callable[[], Coroutine[Any, Any, object]]) -> object:
    return runner.run(method())


def _name(kind: str, libzmq: bool) -> str:
    return f"{kind}, {'by libzmq' if libzmq else 'by itself'}"


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one measurement.")
@click.option("--outstanding", type=int, multiple=True, default=(1, 16), show_default=True)
@click.option("--kib", type=int, multiple=True, default=(1, 64, 1024), show_default=True)
def main(rounds: int, seconds: float, outstanding: Sequence[int], kib: Sequence[int]) -> None:
    with contextlib.ExitStack() as stack:
        daemon: ChildProcess = start_daemon(stack, program=[passing.__file__], model=passing.MODEL)
        contenders = Contenders(stack, daemon_target(daemon).endpoint)
        click.echo("| Bytes | outstanding | by | requests/s | µs each | over by libzmq |\n|---|---|---|---|---|---|")
        for each in kib:
            for count in outstanding:
                compare(contenders.with_outstanding(count), each, count, rounds, seconds)


def compare(rates: dict[str, Rate], kib: int, outstanding: int, rounds: int, seconds: float) -> None:
    """Measure all in turns, and print what came of it."""
    array = np.arange(kib * 256, dtype=np.float32).reshape(1, -1)
    found: dict[str, list[float]] = {name: [] for name in rates}
    for _, name in in_turns(list(rates), rounds):
        found[name].append(rates[name](array, outstanding, seconds))
    for name, values in found.items():
        base = found.get(f"{name.partition(',')[0]}, by libzmq", values)
        ratios = np.divide(values, base)
        told = "" if name == "plain socket" else f"{np.median(ratios):.2f} ({ratios.min():.2f}–{ratios.max():.2f})"
        rate = float(np.median(values))
        click.echo(f"| {kib} KiB | {outstanding} | {name} | {rate:,.0f} | {1e6 * outstanding / rate:,.0f} | {told} |")


if __name__ == "__main__":
    main()
