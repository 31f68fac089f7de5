"""`tnxctl predict`: requests to a model, from a file or with random input."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from tnxctl.cli import exits, options, output, sources, tensorfiles
from tnxctl.protocol.errors import TensorNextError

if TYPE_CHECKING:
    from tnxctl.cli.report import Show
    from tnxctl.cli.tally import Tally
    from tnxctl.cli.workload import Run


@click.command("predict", short_help="Ask a model for predictions.")
@options.common_of_several
@options.request(
    no_device="as --prefer-gpu says",
    missed="A request that cannot make it is refused.",
    tensors="Tensors to send: .npy, .npz with one array per input of the model, .json, .csv, .txt, an image (with "
    "Pillow), - for standard input, or JSON itself: '[[1, 2, 3]]', or '{\"ids\": [[1, 2]]}' with the names of inputs.",
    cast="Convert the tensors of --input to the datatypes of the model (numpy makes FP64 by default), even where they "
    "cannot hold the values. Text and images are converted in any case, if their values allow.",
)
@click.option(
    "--prefer-gpu/--no-prefer-gpu",
    default=True,
    show_default=True,
    help="Run on a GPU if one qualifies, else on the CPU. --no-prefer-gpu: always on the CPU.",
)
@click.option(
    "--min-gpu-memory",
    type=options.Finite(min=0),
    default=0.0,
    show_default=True,
    metavar="MIB",
    help="Free memory in MiB that a GPU needs to qualify.",
)
@click.option(
    "--route-key",
    default="",
    metavar="KEY",
    help="While traffic is split between versions, requests with the same KEY get the same version.  "
    "[default: those of one run do]",
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(allow_dash=True),
    help="Where the outputs go: .npy for one, .npz for several, .txt for one of strings, - for standard output (.npy, "
    "or .npz for several).",
)
@click.option("--batch-size", type=click.IntRange(min=0), help="Rows of the random input.  [default: 1]")
@click.option("--input-dim", type=click.IntRange(min=0), help="Length of the last axis of the random input.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random input.")
@click.option("--count", type=click.IntRange(min=1), default=1, show_default=True, help="Requests to send.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests outstanding at a time.",
)
@click.option(
    "--hedge",
    is_flag=True,
    help="With several daemons: send a request that takes longer than 95 % of those before it to a second one as well, "
    "and take the earlier answer. At most 5 % of the requests are.",
)
@click.option(
    "--explain",
    is_flag=True,
    help="Show why each request ran where it did, and its predicted time against the real one.",
)
@click.pass_context
def command(
    ctx: click.Context,
    endpoints: list[str],
    timeout: float,
    as_json: bool,
    model: str,
    prefer_gpu: bool,
    min_gpu_memory: float,
    device: str,
    deadline: float | None,
    priority: int | None,
    route_key: str,
    input_path: str | None,
    cast: bool,
    output_path: str | None,
    batch_size: int | None,
    input_dim: int | None,
    seed: int,
    count: int,
    concurrency: int,
    hedge: bool,
    explain: bool,
) -> None:
    """Ask a model for predictions and show where and how fast they ran.

    Without --input the tool asks for the model's signature and sends random tensors that fit it, the same ones in
    every request. Ctrl-C, or SIGTERM, ends a long run and cancels the requests that still wait at the daemon; the
    summary still comes. Each request that was sent stands in it as answered, failed or unknown.

    JSON and CSV have no datatypes: their numbers become what the model takes. CSV has a row of the input on each line,
    and perhaps a heading. An image is decoded into the layout of the model's input, with the values of the file, as a
    rule 0 to 255; one of another size is refused, and none is scaled or turned.

    A model whose only input is BYTES gets each line of a .txt file, or of standard input, as a string; any other file,
    such as an image, it gets as it is. A CSV file whose first line names inputs has a column for each.

    \b
    Examples:
      tnxctl predict --host 192.168.1.100 --count 5
      tnxctl predict --host gpu-1,gpu-2 --count 1000 --concurrency 16 --hedge
      tnxctl predict --no-prefer-gpu
      tnxctl predict --prefer-gpu --min-gpu-memory 10000.0
      tnxctl predict --device auto --deadline 50ms --explain
      tnxctl predict --batch-size 4 --input-dim 256
      tnxctl predict --model digits --input scans.npy --output scores.npy
      tnxctl predict --model resnet@2 --input cat.npy
      tnxctl predict --model iris --input '[[5.1, 3.5, 1.4, 0.2]]'
      tnxctl predict --model languages --input texts.txt
      tnxctl predict --model digits --input - --output - < scans.npy > scores.npy
      tnxctl predict --count 1000 --concurrency 16
      tnxctl predict --json | jq .round_trip_ms.p50
    """
    if hedge and len(endpoints) < 2:
        raise click.UsageError("--hedge sends copies to another daemon: --host names one")
    _check_use(as_json, input_path, cast, output_path, batch_size, input_dim, count)
    source = None if input_path is None else sources.read(input_path)

    from tnxctl.cli import inputs, report, workload
    from tnxctl.cli.tally import Tally
    from tnxctl.client import Client

    tally = Tally(count, concurrency)
    people = sys.stderr if output_path == tensorfiles.STANDARD else sys.stdout
    with tensorfiles.destination(output_path) as write:
        with Client(endpoints, timeout=timeout, hedge=hedge) as client:
            if source is None:
                signature = inputs.known(client.metadata(model))
                tensors = inputs.random_inputs(signature, batch_size=batch_size, input_dim=input_dim, seed=seed)
            elif cast or source.needs_model:
                tensors = source.fitted(inputs.known(client.metadata(model)), cast)
            else:
                tensors = source.tensors
            settings = workload.Options(
                model=model,
                prefer_gpu=prefer_gpu,
                min_gpu_memory_mb=min_gpu_memory,
                device=device,
                deadline=deadline,
                priority=priority,
                route_key=route_key,
            )
            run = workload.Run(client, workload.Call(tensors, settings), count, concurrency, timeout)
            with report.view(count, None if as_json else people, explain) as show:
                _take(run, tally, show)
        for answer in tally.answers if output_path is not None else ():  # one, or none if interrupted
            if not isinstance(answer.outcome, TensorNextError):
                write(answer.outcome.outputs)
    if as_json:
        sent = {} if client.traffic is None else {"traffic": output.plain(client.traffic)}
        output.write_json({"endpoint": client.endpoint, **sent, **report.document(tally)})
    else:
        click.echo("\n".join(report.summary(tally, explain)), people)
    if tally.interrupt is not None or tally.failed or tally.unknown:
        output.complain(report.shortfall(tally))
    ctx.exit(tally.exit_code())


def _take(run: Run, tally: Tally, show: Show) -> None:
    """Take the answers until they end or the user has enough.

    Raises:
        TensorNextError: the one request that was planned failed, and so did the command.
    """
    started = time.perf_counter()
    try:
        for answer in run:
            if tally.planned == 1 and isinstance(answer.outcome, TensorNextError):
                raise answer.outcome
            tally.add(answer)
            show(answer)
    except KeyboardInterrupt as interrupt:
        tally.interrupt = exits.of_interrupt(interrupt)
    tally.elapsed_s = time.perf_counter() - started
    tally.sent = run.sent


def _check_use(
    as_json: bool,
    input_path: str | None,
    cast: bool,
    output_path: str | None,
    batch_size: int | None,
    input_dim: int | None,
    count: int,
) -> None:
    """Refuse options that contradict each other, before anything is read or sent.

    Raises:
        click.UsageError: they do.
    """
    if input_path is not None and (batch_size is not None or input_dim is not None):
        raise click.UsageError("--batch-size and --input-dim shape random input: they do not go with --input")
    options.check_cast(input_path, cast)
    if output_path is None:
        return
    if count > 1:
        raise click.UsageError("--output holds one answer: it does not go with --count")
    if output_path != tensorfiles.STANDARD:
        if not output_path.endswith(tensorfiles.SUFFIXES):
            raise click.UsageError(f"--output {output_path}: the name does not end in .npy, .npz or .txt")
    elif as_json:
        raise click.UsageError("--json and --output - both want standard output")
    elif sys.stdout is not None and sys.stdout.isatty():
        raise click.UsageError("--output -: tensors are not for a terminal, send standard output to a file or a pipe")
