"""`python bench/shared_memory.py`: what shared memory gains a client on the same host over ipc:// alone.

A model gives back what it gets. Two clients of one daemon take turns in each round, one of which shares memory. First
the floors: a copy of as many bytes, and a bare ROUTER that sends back what a bare DEALER sends it over ipc://.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import zmq

import passing
from processes import ChildProcess, cpu_ns
from rounds import in_turns
from tnxctl import AsyncClient, Client

PLAIN, SHARED = "ipc", "ipc and shared memory"

_WARM_UP = 20  # requests


def median_us(action: Callable[[], object], seconds: float) -> float:
    """The median of the microseconds that something takes, done again and again for so long."""
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or time.perf_counter() < until:
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken)) * 1e6


def echo(endpoint: str) -> None:
    """Send back what comes, for ever."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(endpoint)
        click.echo("ready")
        while True:
            router.send_multipart(router.recv_multipart(copy=False), copy=False)


def floors(stack: contextlib.ExitStack, folder: Path, kib: Sequence[int], seconds: float) -> None:
    """Print what a copy and a bare echo take."""
    endpoint = f"ipc://{folder}/echo"
    stack.enter_context(ChildProcess("echo", [__file__, "--echo", endpoint])).ready()
    dealer = stack.enter_context(stack.enter_context(zmq.Context()).socket(zmq.DEALER))
    dealer.connect(endpoint)

    def ask(message: Any) -> None:
        dealer.send(message, copy=False)
        dealer.recv(copy=False)

    click.echo("| Bytes | copy, µs | bare echo over ipc, µs |\n|---|---|---|")
    for each in kib:
        source = np.arange(each * 256, dtype=np.float32)
        target = np.empty_like(source)
        copy_us = median_us(lambda source=source, target=target: np.copyto(target, source), seconds / 4)  # type: ignore[misc]
        click.echo(f"| {each} KiB | {copy_us:.0f} | {median_us(lambda source=source: ask(source), seconds):.0f} |")  # type: ignore[misc]


def alone(client: Client, array: Any, seconds: float) -> float:
    """Requests a second of one that waits for each answer."""
    for _ in range(_WARM_UP):
        client.predict(array, model=passing.MODEL)
    count, began = 0, time.perf_counter()
    while time.perf_counter() < began + seconds:
        client.predict(array, model=passing.MODEL)
        count += 1
    return count / (time.perf_counter() - began)


async def together(client: AsyncClient, array: Any, outstanding: int, seconds: float) -> float:
    """Requests a second with so many outstanding."""
    for _ in range(_WARM_UP):
        await client.predict(array, model=passing.MODEL)
    count, began = 0, time.perf_counter()

    async def ask() -> None:
        nonlocal count
        while time.perf_counter() < began + seconds:
            await client.predict(array, model=passing.MODEL)
            count += 1

    await asyncio.gather(*(ask() for _ in range(outstanding)))
    return count / (time.perf_counter() - began)


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--seconds", type=float, default=0.5, show_default=True, help="Of one measurement.")
@click.option("--outstanding", type=int, multiple=True, default=(1, 8), show_default=True)
@click.option("--kib", type=int, multiple=True, default=(4, 64, 256, 1024, 4096), show_default=True)
@click.option("--echo", "endpoint", hidden=True)
def main(rounds: int, seconds: float, outstanding: Sequence[int], kib: Sequence[int], endpoint: str | None) -> None:
    if endpoint is not None:
        echo(endpoint)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shared-memory-")))
        floors(stack, folder, kib, seconds)
        (folder / "tnxd.toml").write_text("[clients]\nshared_memory_mb = 256\n")
        arguments = ["--config", f"{folder}/tnxd.toml", "--bind", f"ipc://{folder}/tnx", "--model", passing.MODEL]
        daemon = stack.enter_context(ChildProcess("tnxd", [passing.__file__, *arguments]))
        daemon.ready()
        click.echo(
            "\n| Bytes | outstanding | by | requests/s | ratio | CPU of both, µs a request |\n|---|---|---|---|---|---|"
        )
        with asyncio.Runner() as runner:
            plain, shared = (
                (
                    Client(f"ipc://{folder}/tnx", shared_memory=each),
                    AsyncClient(f"ipc://{folder}/tnx", shared_memory=each),
                )
                for each in (False, True)
            )
            for each in kib:
                for count in outstanding:
                    compare(runner, {PLAIN: plain, SHARED: shared}, each, count, rounds, seconds, daemon.pid)
            for client, aio in (plain, shared):
                client.close()
                runner.run(aio.close())


def compare(
    runner: asyncio.Runner,
    clients: dict[str, tuple[Client, AsyncClient]],
    kib: int,
    outstanding: int,
    rounds: int,
    seconds: float,
    daemon: int,
) -> None:
    """Measure both in turns, and print what came of it."""
    array = np.arange(kib * 256, dtype=np.float32).reshape(1, -1)
    rates: dict[str, list[float]] = {name: [] for name in clients}
    cpu: dict[str, list[float]] = {name: [] for name in clients}
    for _, name in in_turns(list(clients), rounds):
        client, aio = clients[name]
        before, began = (cpu_ns(daemon) or 0) + time.process_time_ns(), time.perf_counter()
        if outstanding == 1:
            rate = alone(client, array, seconds)
        else:
            rate = runner.run(together(aio, array, outstanding, seconds))
        used = (cpu_ns(daemon) or 0) + time.process_time_ns() - before
        rates[name].append(rate)
        cpu[name].append(used / 1e3 / (rate * (time.perf_counter() - began)))
        assert (client.shares_memory or aio.shares_memory) == (name == SHARED), "no memory is shared"
    for name in clients:
        ratio = np.median(np.divide(rates[name], rates[PLAIN]))
        click.echo(
            f"| {kib} KiB | {outstanding} | {name} | {np.median(rates[name]):,.0f} | {ratio:.2f} "
            f"| {np.median(cpu[name]):.0f} |"
        )


if __name__ == "__main__":
    main()
