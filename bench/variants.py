"""`python bench/variants.py`: forwards of networks of real size as they are, in other datatypes, and as other programs.

No daemon takes part: the modules are those that a daemon would run. All of a network take turns, on one thread and on
torch's default number of threads, and the least time of each counts. The first column is plain torch in float32, which
all others are relative to; below them stand geometric means over the networks.

The files that variants are made of come from the daemon's cache, or are put there: the first run compiles for minutes.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import torch

import options
import real_networks
from processes import BenchError
from tnxctl.protocol.errors import TensorNextError
from tnxd.models import repository
from tnxd.models.formats import artifacts, opening
from tnxd.models.model import Model
from tnxd.models.variants import Workshop

_PLAIN = "float32"
_DTYPES = (_PLAIN, "bfloat16")
_COMPILING_S = 600.0

Forward = Callable[[], object]


def modules(root: Path, name: str, cache: Path | None, threads: int) -> dict[str, torch.nn.Module]:
    """Modules that may run for a network, by names as "bfloat16 inductor". Says on stderr which cannot be made."""
    found = {}
    for dtype in _DTYPES:
        folder = root / dtype
        folder.mkdir()
        real_networks.publish(folder, [name], "auto", "" if dtype == _PLAIN else dtype)
        model = opened(folder, name)
        found[dtype] = model.factory()
        for variant in model.variants:
            try:
                if variant.missing:
                    raise BenchError(variant.missing)
                made = variant.make(model.factory, Workshop(torch.device("cpu"), cache, _COMPILING_S, threads))
                found[f"{dtype} {variant.name}"] = made.eval()
            except (TensorNextError, BenchError) as error:
                print(f"{name}, {dtype} {variant.name}: {error}", file=sys.stderr)
    return found


def opened(folder: Path, name: str) -> Model:
    """The only model of a repository, as a daemon opens it."""
    catalog = repository.scan(folder, opening.open_model)
    return catalog.entries[name].sources["1"].open(0)


def least(forwards: Sequence[Forward], rounds: int) -> list[float]:
    """Least milliseconds of each of several forwards, which take turns."""
    best = [math.inf] * len(forwards)
    for forward in forwards:
        forward()
    for _ in range(rounds):
        for index, forward in enumerate(forwards):
            start = time.perf_counter()
            forward()
            best[index] = min(best[index], time.perf_counter() - start)
    return [seconds * 1e3 for seconds in best]


def forwards(found: dict[str, torch.nn.Module], network: real_networks.Network, rows: int) -> list[Forward]:
    """Forwards of modules with so many rows of the network's example."""
    arrays = network.example().values()
    inputs = [torch.from_numpy(array).expand(rows, *array.shape[1:]).contiguous() for array in arrays]
    return [functools.partial(module, *inputs) for module in found.values()]


@options.command()
@click.option("--network", "names", type=click.Choice(list(real_networks.NETWORKS)), multiple=True, help="Only these.")
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True, help="Turns of each.")
@options.measuring()
def main(names: Sequence[str], rounds: int) -> None:
    """Time forwards of networks of real size as they are, in bfloat16, and by the variants of `optimize`."""
    team = torch.get_num_threads()
    cache = artifacts.directory("auto")
    gains: dict[tuple[int, str, str], list[float]] = {}
    for name in names or real_networks.NETWORKS:
        network = real_networks.NETWORKS[name]
        with tempfile.TemporaryDirectory() as root, torch.inference_mode():
            found = modules(Path(root), name, cache, team)
            print(f"\n{network.title}: threads, rows, {', '.join(found)}")
            for threads in sorted({1, team}):
                torch.set_num_threads(threads)
                for size, rows in {"1 row": 1, "8 rows": 8, "the largest batch": network.max_batch}.items():
                    times = dict(zip(found, least(forwards(found, network, rows), rounds), strict=True))
                    plain, *others = times.values()
                    print(f"{threads:>2} {rows:>3} {plain:>8.2f} ms", *(f"{ms / plain:>6.2f}" for ms in others))
                    for dtype in _DTYPES:
                        best = min(ms for label, ms in times.items() if label.split()[0] == dtype)
                        gains.setdefault((threads, size, dtype), []).append(plain / best)
    print("\nGeometric means of what the fastest program in a datatype gains:")
    for (threads, size, dtype), each in gains.items():
        print(f"{dtype}, {threads} threads, {size}: {statistics.geometric_mean(each):.2f}")


if __name__ == "__main__":
    main()
