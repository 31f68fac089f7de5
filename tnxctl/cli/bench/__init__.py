"""`tnxctl bench`: latency and throughput of a model, under one load after the other.

loops.py      requests, the connection, the loops        recording.py  what a loop saw, and its numbers
runs.py       a sweep over loads, a search for a rate    lines.py      text and documents
replay.py     a recording sent again                     picture.py    a picture, by matplotlib
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from tnxctl import durations
from tnxctl.cli import options, output, sources, tensorfiles
from tnxctl.cli.options import Duration
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.cli.bench.lines import Table
    from tnxctl.cli.bench.recording import Step
    from tnxctl.cli.bench.runs import Search, Sweep
    from tnxctl.protocol.datatypes import Array

DEFAULT_SWEEP = (1, 2, 4, 8, 16, 32, 64)

# As in tnxctl.session and runs.py, whose import would make --help slow; a test compares them.
MOST_OUTSTANDING = 65_536
HIGHEST_RATE = 1_000_000

_LONGEST_S = 3_600.0


class _OrNone(Duration):
    """A span of time that may be 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return 0.0 if durations.read(str(value)) == 0 else super().convert(value, param, ctx)


def _numbers(
    kind: type[int] | type[float], most: int
) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...]]:
    """Callback of an option that takes positive numbers with commas between."""

    def convert(_ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Any, ...]:
        if value is None:
            return ()
        found = []
        for item in value.split(","):
            try:
                number = kind(item)
            except ValueError:
                raise click.BadParameter(
                    f"{item!r} is no number: numbers with commas between, as in 1,8,64", param=param
                ) from None
            if not 0 < number <= most:  # which NaN is not
                raise click.BadParameter(f"{item!r} is not above 0 and up to {most}.", param=param)
            found.append(number)
        return tuple(found)

    return convert


@click.command("bench", short_help="Measure latency and throughput of a model.")
@options.common
@options.request(
    no_device="a GPU if there is one",
    missed="One that misses it is an error.",
    tensors="Tensors to send, as for tnxctl predict.  [default: random ones by the model's signature]",
    cast="Convert the tensors of --input, as for tnxctl predict.",
)
@click.option(
    "--concurrency",
    metavar="N,N,...",
    callback=_numbers(int, MOST_OUTSTANDING),
    help=f"Closed loops: so many requests outstanding, each measured.  [default: {','.join(map(str, DEFAULT_SWEEP))}]",
)
@click.option(
    "--rate",
    "rates",
    metavar="N,N,...",
    callback=_numbers(float, HIGHEST_RATE),
    help="Open loops: requests per second, at random times, each rate measured.",
)
@click.option(
    "--p99-under",
    "bound",
    type=Duration(),
    metavar="DURATION",
    help="Search for the highest rate whose p99 stays under this: 10ms, 500us.",
)
@click.option("--rows", type=click.IntRange(min=0), help="Rows of the random input.  [default: 1]")
@options.duration("--seconds", default="2s", help="Length of each measurement.", most=_LONGEST_S)
@click.option(
    "--warm-up",
    type=_OrNone(most=_LONGEST_S),
    default="500ms",
    show_default=True,
    metavar="DURATION",
    help="The same load before each measurement, which does not count; 0: none.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of random inputs and times."
)
@click.option("--plot", "plot_path", type=click.Path(), metavar="FILE.png", help="Draw it, too (needs matplotlib).")
@click.pass_context
def command(
    ctx: click.Context,
    endpoint: str,
    timeout: float,
    as_json: bool,
    model: str,
    concurrency: tuple[int, ...],
    rates: tuple[float, ...],
    bound: float | None,
    input_path: str | None,
    cast: bool,
    rows: int | None,
    device: str,
    deadline: float | None,
    priority: int | None,
    seconds: float,
    warm_up: float,
    seed: int,
    plot_path: str | None,
) -> None:
    """Measure latency and throughput of a model in a running daemon, and where the time goes.

    A closed loop keeps a number of requests outstanding: each answer sends the next request. An open loop sends at
    random times at a rate, whatever the daemon does, and counts latency from when a request was due: a pause costs all
    that were due in it. LATE is the p99 of how late this client sent them. A search doubles the rate until its p99 is
    above the bound, then halves what lies between. A rate is too high if it was so twice, or three times where this
    client itself was late. A request without a result counts as later than any bound.

    RESULTS/s is what was computed, ROWS the rows per batch. The second table has the mean of each stage of the daemon.
    OUTSIDE is the rest of the latency: network, kernels, ZeroMQ, this client. GREW MOST is the stage that grew most
    against the first line. Among the errors, LOST had no answer within --timeout, and UNSENT this client did not come
    to send.

    The load is made in this process, by one thread on one connection. CLIENT is its CPU time for each request: some
    20 µs with many outstanding, 100 and more where it sleeps and wakes up for each. A daemon on the same machine has to
    do without that time, and it bounds the rate that one client reaches. This client sends what it is told to: unlike
    tnxctl.Client it holds nothing back that the daemon would refuse. Of fewer than 100 requests the p99 is the slowest.

    Ctrl-C, or SIGTERM, ends it with what was measured so far. Errors are a failure, as for tnxctl predict, except in a
    search.

    \b
    Examples:
      tnxctl bench
      tnxctl bench --model resnet@2 --concurrency 1,4,16 --rows 8 --device cuda:0
      tnxctl bench --model digits --input scans.npy --rate 100,1000,5000
      tnxctl bench --rate 2000 --deadline 20ms --priority 0 --seconds 10
      tnxctl bench --p99-under 10ms
      tnxctl bench --rate 100,1000,5000 --plot latency.png
      tnxctl bench --p99-under 5ms --json | jq .search.rate_per_s
    """
    _check_use(concurrency, rates, bound, input_path, cast, rows, plot_path)
    source = None if input_path is None else sources.read(input_path)

    from tnxctl.cli import inputs
    from tnxctl.cli.bench import lines, picture, runs
    from tnxctl.cli.bench.recording import Load
    from tnxctl.cli.workload import Options
    from tnxctl.client import Client

    with ExitStack() as stack:
        write = None
        if plot_path is not None:
            picture.check(plot_path)
            write = stack.enter_context(tensorfiles.writable(plot_path))
        with Client(endpoint, timeout=timeout) as client:
            signature = inputs.known(client.metadata(model))
        tensors: dict[str, Array]
        if source is None:
            tensors = inputs.random_inputs(signature, batch_size=rows, input_dim=None, seed=seed, rows_option="--rows")
        else:
            tensors = source.fitted(signature, cast) if cast or source.needs_model else source.tensors
        request = Options(
            model=model,
            prefer_gpu=True,
            min_gpu_memory_mb=0.0,
            device=device,
            deadline=deadline,
            priority=priority,
            route_key="",
        )
        bench = runs.Bench(endpoint, timeout, tensors, request, seconds, warm_up, seed)
        probe = bench.probe()
        search = None if bound is None else runs.Search(bench, bound * 1e6)
        loads = [*(Load(count) for count in concurrency), *(Load(rate=rate) for rate in rates)]
        run = search or runs.Sweep(bench, loads or [Load(count) for count in DEFAULT_SWEEP])
        about = _about(tensors, deadline, priority)
        table = None if as_json else lines.Table(search)
        if table is not None:
            click.echo(f"{lines.heading(probe, seconds, warm_up, about)}\n\n{table.head()}")
        steps, end = _take(run, table)
        if isinstance(end, TensorNextError) and not steps:
            raise end
        if write is not None:
            title = f"{probe.model} version {probe.version} on {probe.device}, {about}"
            write(picture.draw(steps, title, None if search is None else search.bound_us))
    if as_json:
        settings = {
            "endpoint": endpoint,
            "inputs": {name: array.shape for name, array in tensors.items()},
            "device": device,
            "deadline_s": deadline,
            "priority": priority,
            "seconds": seconds,
            "warm_up_s": warm_up,
            "timeout_s": timeout,
        }
        output.write_json(lines.document(probe, settings, steps, end, search))
    else:
        click.echo("\n".join([*lines.stages(steps), *_closing(steps, search)]))
    sentence = lines.shortfall(steps, end, search is not None)
    if sentence:
        output.complain(sentence)
    ctx.exit(lines.exit_code(steps, end, search is not None))


def _take(run: Sweep | Search, table: Table | None) -> tuple[list[Step], KeyboardInterrupt | TensorNextError | None]:
    """The steps of a run that measured anything, shown as they come, and the interrupt or error that ended it."""
    steps: list[Step] = []
    try:
        for step in run:
            if step.requests:
                steps.append(step)
                if table is not None:
                    click.echo(table.row(step))
            if step.ended is not None:
                return steps, step.ended
    except KeyboardInterrupt as interrupt:  # between two steps
        return steps, interrupt
    return steps, None


def _closing(steps: list[Step], search: Search | None) -> list[str]:
    """Remarks below the tables."""
    from tnxctl.cli.bench import lines

    said = [*lines.remarks(steps), *([] if search is None else [lines.answer(search)])]
    return ["", *said] if said else []


def _about(tensors: dict[str, Array], deadline: float | None, priority: int | None) -> str:
    """A request, in words."""
    from tnxctl.cli import text
    from tnxctl.durations import spell

    shapes = ", ".join(f"{text.tensor_name(text.clean(name))} {text.shape(a.shape)}" for name, a in tensors.items())
    of_time = "" if deadline is None else f", deadline {spell(deadline)}"
    return f"{shapes}{of_time}{'' if priority is None else f', priority {priority}'}"


def _check_use(
    concurrency: tuple[int, ...],
    rates: tuple[float, ...],
    bound: float | None,
    input_path: str | None,
    cast: bool,
    rows: int | None,
    plot_path: str | None,
) -> None:
    """Refuse options that contradict each other, before anything is read or sent.

    Raises:
        click.UsageError: they do.
    """
    if bound is not None and (concurrency or rates):
        raise click.UsageError("--p99-under searches for a rate: it goes with neither --rate nor --concurrency")
    if input_path is not None and rows is not None:
        raise click.UsageError("--rows shapes random input: it does not go with --input")
    options.check_cast(input_path, cast)
    if plot_path is not None and not plot_path.endswith(".png"):
        raise click.UsageError(f"--plot {plot_path}: the name does not end in .png")
