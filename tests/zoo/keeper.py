"""Serves exhibits with a real daemon, asks them with eight clients at once, and says what was wrong."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from conftest import Daemon, serving_daemon
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import FailedPrecondition, TensorNextError
from tnxctl.protocol.wire import ModelInfo
from tnxctl.results import Result
from zoo import building
from zoo.case import BATCHED, CAUGHT, FACTORY, ONNX, REFUSED, SCRIPT, UNBATCHED, Case, Exhibit
from zoo.networks.plain import Perceptron

LIBRARIES = Path(__file__).parent / "libraries"
"""Modules that models import and that are no files of their own."""

CLIENTS = 8
LANES = 3

NOISE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Tolerance of an answer, relative to the largest value in it."""

ROUNDS = 40
"""Rounds of company, in which a mistake that shows while a model serves has to be found. Where the audit finds it, they
are those after which there was a moment for that: on a busy machine there is not after each."""

MOST_ROUNDS = 5 * ROUNDS
"""Rounds of company, whatever the audit has had moments for."""


WITNESS = Exhibit(Case("witness", Perceptron), FACTORY)
"""A model that does nothing odd. It is served beside all others, and looked at in the end."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: "built" (it could not be), "outcome", "naming" (a refusal does not), "note" (there is none), "answer",
            "error", "alarm" (without a reason) or "late" (nothing was noticed).
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Request:
    """Attributes: inputs, expected: of the network in plain torch, alone."""

    inputs: tuple[torch.Tensor, ...]
    expected: dict[str, torch.Tensor]


class Keeper:
    """A daemon with exhibits. Args: clients: of it. unbuilt: what could not be put into its format, and why."""

    def __init__(self, daemon: Daemon, clients: Sequence[Client], unbuilt: Mapping[str, str]) -> None:
        self.daemon = daemon
        self.clients = clients
        self._unbuilt = unbuilt
        self._began = {info.name: info for info in clients[0].models()}

    def examine(self, exhibit: Exhibit, rounds: int = 1) -> list[str]:
        """Defects in the serving of an exhibit; none: []."""
        return [str(finding) for finding in self.findings(exhibit, rounds)]

    def findings(self, exhibit: Exhibit, rounds: int = 1) -> list[Finding]:
        if exhibit.name in self._unbuilt:
            return [Finding("built", self._unbuilt[exhibit.name])]
        info = self._began.get(exhibit.name)
        if info is None:
            return [Finding("outcome", "it is not there")]
        found = list(self._outcome(exhibit, info))
        if info.status != "ready":
            return found
        if exhibit.variant == "shared":
            return found + list(self._in_order(exhibit))
        if CAUGHT in exhibit.may and (info.max_batch_size or UNBATCHED not in exhibit.may):
            return found + list(self._until_caught(exhibit))
        found += self._alone(exhibit)
        for number in range(rounds):
            found += self._together(exhibit, 1000 * (number + 1))
        now = self.info(exhibit)
        if (now.status, now.max_batch_size, now.notes) != (info.status, info.max_batch_size, info.notes):
            found.append(Finding("alarm", f"it was {_state(info)}, and is {_state(now)}"))
        return found

    def info(self, exhibit: Exhibit) -> ModelInfo:
        """Entry of it in `tnxctl models` now."""
        return next(info for info in self.clients[0].models() if info.name == exhibit.name)

    # --- what became of it -------------------------------------------------------------------------------------

    def _outcome(self, exhibit: Exhibit, info: ModelInfo) -> Iterator[Finding]:
        outcome = REFUSED if info.status != "ready" else BATCHED if info.max_batch_size else UNBATCHED
        allowed = {*exhibit.may, BATCHED, UNBATCHED} if CAUGHT in exhibit.may else set(exhibit.may)
        if outcome not in allowed:
            yield Finding("outcome", f"{outcome}, not {' or '.join(exhibit.may)}: {_state(info)}")
        elif outcome == REFUSED:
            if not re.search(exhibit.naming, info.error):
                yield Finding("naming", f"{exhibit.naming!r} is not in {info.error!r}")
            try:
                self.clients[0].predict(self._arrays(exhibit, exhibit.case.draw(1, 1)), model=exhibit.name)
                yield Finding("outcome", "it is refused, and answers")
            except FailedPrecondition:
                pass
            except TensorNextError as error:
                yield Finding("outcome", f"a request got {error.code} {error.message!r}")
        elif outcome == UNBATCHED and exhibit.variant != "shared":
            varies = all(spec.shape[:1] == (-1,) for spec in (*info.inputs, *info.outputs))
            said = exhibit.case.evident and exhibit.format not in (FACTORY, SCRIPT)
            if varies and not said and not re.search(exhibit.case.noted, "\n".join(info.notes)):
                yield Finding("note", f"no note says {exhibit.case.noted!r}: {info.notes}")

    # --- answers -----------------------------------------------------------------------------------------------

    def _requests(self, exhibit: Exhibit, seeds: Iterable[int], rows: Sequence[int]) -> list[Request]:
        case = exhibit.case
        plain = case.make()
        weights = {name: weight.clone() for name, weight in plain.state_dict().items()}
        requests = []
        for seed, count in zip(seeds, rows, strict=True):
            inputs = case.draw(seed, count)
            network = case.fresh(weights) if case.remembers else plain
            requests.append(Request(inputs, building.run(case, network, inputs)))
        return requests

    def _alone(self, exhibit: Exhibit) -> Iterator[Finding]:
        """One client, one request after the other."""
        case = exhibit.case
        rows = [*case.rows, *([case.over] if case.over else []), case.rows[0]]
        requests = self._requests(exhibit, range(len(rows)), rows)
        if not case.alike:
            assert not any(
                _difference(case, first.expected, second.expected) == ""
                for first, second in itertools.pairwise(requests)
            ), "answers that cannot be told apart prove nothing"
        outcomes = [_outcome_of(lambda r=r: self._ask(exhibit, r)) for r in requests]
        yield from self._judge(exhibit, "alone", requests, outcomes)

    def _together(self, exhibit: Exhibit, seed: int) -> Iterator[Finding]:
        """Eight clients at once."""
        requests, outcomes = self._crowd(exhibit, seed)
        yield from self._judge(exhibit, "in company", requests, outcomes)

    def _crowd(self, exhibit: Exhibit, seed: int) -> tuple[list[Request], list[Result | TensorNextError]]:
        case = exhibit.case
        counts = case.rows[:1] if case.heavy else (*case.rows, *case.rows[:1])
        rows = [count for count in counts for _ in range(CLIENTS)]
        if case.over:
            rows.insert(len(rows) // 2, case.over)
        requests = self._requests(exhibit, range(seed, seed + len(rows)), rows)
        futures: list[Future[Result]] = []
        for index, request in enumerate(requests):
            client = self.clients[index % CLIENTS]
            try:
                futures.append(client.submit(self._arrays(exhibit, request.inputs), model=exhibit.name))
            except TensorNextError as error:  # the client's own
                futures.append(Future())
                futures[-1].set_exception(error)
        return requests, [_outcome_of(future.result) for future in futures]

    def _ask(self, exhibit: Exhibit, request: Request) -> Result:
        return self.clients[0].predict(self._arrays(exhibit, request.inputs), model=exhibit.name)

    def _arrays(self, exhibit: Exhibit, inputs: Sequence[torch.Tensor]) -> dict[str, Array]:
        """By the names of the model, which in ONNX are the exporter's; of one that is refused, by the network's."""
        found = [spec.name for spec in self._began[exhibit.name].inputs]
        names = found if exhibit.format == ONNX and found else [given.name for given in exhibit.case.inputs]
        return {name: building.to_numpy(x) for name, x in zip(names, inputs, strict=True)}

    def _judge(
        self, exhibit: Exhibit, how: str, requests: Sequence[Request], outcomes: Sequence[Result | TensorNextError]
    ) -> Iterator[Finding]:
        case = exhibit.case
        wrong, others, failed = [], 0, []
        for index, (request, outcome) in enumerate(zip(requests, outcomes, strict=True)):
            if isinstance(outcome, TensorNextError):
                failed.append(f"{outcome.code} {outcome.message!r}")
                continue
            # ONNX has names of its own: the order counts.
            names = request.expected if exhibit.format == ONNX else outcome.outputs
            pairs = zip(names, outcome.outputs.values(), strict=False)
            got = {name: building.to_torch(array) for name, array in pairs}
            difference = _difference(case, request.expected, got)
            if difference:
                wrong.append(f"request {index}, {outcome.batch_size} rows in its batch, {difference}")
                others += any(_is_near(case, other.expected, got) for other in requests if other is not request)
        if wrong:
            what = f", {others} of them another request's" if others else ""
            yield Finding("answer", f"{how}, {len(wrong)} of {len(requests)} answers are wrong{what}: {wrong[0]}")
        if failed:
            yield Finding("error", f"{how}, {len(failed)} of {len(requests)} requests fail: {failed[0]}")

    def _until_caught(self, exhibit: Exhibit) -> Iterator[Finding]:
        """Ask until `tnxctl models` says that something is wrong, or long enough for all answers to have been right."""
        began = self.info(exhibit)
        wrong: list[Finding] = []
        is_audited, audited, left = "audit" in exhibit.case.toml, began.audited, ROUNDS
        for number in range(MOST_ROUNDS):
            requests, outcomes = self._crowd(exhibit, 1000 * (number + 1))
            wrong += self._judge(exhibit, "in company", requests, outcomes)
            now = self.info(exhibit)
            if (now.status, now.max_batch_size, now.notes, now.error) != (
                began.status,
                began.max_batch_size,
                began.notes,
                began.error,
            ):
                if exhibit.case.cured and now.status == "ready":
                    yield from self._together(exhibit, 1000 * (MOST_ROUNDS + 1))
                return
            left -= now.audited > audited or not is_audited
            audited = now.audited
            if not left:
                break
        if wrong:
            yield Finding("late", f"nothing is said of it after {number + 1} rounds: {_state(began)}: {wrong[0]}")

    def _in_order(self, exhibit: Exhibit) -> Iterator[Finding]:
        """A model that remembers, and may: one request after the other, as plain torch does it from its beginning."""
        case, info = exhibit.case, self._began[exhibit.name]
        if not re.search(r"(?i)state|shared", "\n".join(info.notes)):
            yield Finding("note", f"no note says that it has a state: {info.notes}")
        network = case.fresh(case.make().state_dict())
        requests = []
        for seed in range(6):
            inputs = case.draw(seed, case.rows[seed % len(case.rows)])
            requests.append(Request(inputs, building.run(case, network, inputs)))
        outcomes = [_outcome_of(lambda r=r: self._ask(exhibit, r)) for r in requests]
        yield from self._judge(exhibit, "in order", requests, outcomes)
        if case.chained:
            yield from self._chain(exhibit)

    def _chain(self, exhibit: Exhibit) -> Iterator[Finding]:
        """With eight clients, the order is the daemon's; but each request is before at most one other."""
        before = self._ask(exhibit, self._requests(exhibit, [77], [1])[0])
        del before
        requests, outcomes = self._crowd(exhibit, 5000)
        firsts = [exhibit.case.draw(77, 1)[0][0], *(request.inputs[0][0] for request in requests)]
        used: set[int] = set()
        for request, outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, TensorNextError):
                yield Finding("error", f"in company: {outcome.code} {outcome.message!r}")
                return
            carried = building.to_torch(outcome.output) - request.inputs[0]
            places = [
                index
                for index, first in enumerate(firsts)
                if torch.allclose(carried, first.expand_as(carried), atol=1e-4) and index not in used
            ]
            if not places:
                yield Finding(
                    "answer", "in company, what an answer carries over is no other request's, or another's too"
                )
                return
            used.add(places[0])


def _state(info: ModelInfo) -> str:
    return f"{info.status}, max_batch_size {info.max_batch_size}, notes {list(info.notes)}, error {info.error!r}"


def _outcome_of(ask: Callable[[], Result]) -> Result | TensorNextError:
    try:
        return ask()
    except TensorNextError as error:
        return error


def _difference(case: Case, expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> str:
    """Difference of two answers, in words; "" if not by more than noise."""
    if expected.keys() != got.keys():
        return f"{list(got)}, not {list(expected)}"
    for name, want in expected.items():
        have = got[name]
        if have.dtype != want.dtype:
            return f"{name}: {have.dtype}, not {want.dtype}"
        if have.shape != want.shape:
            return f"{name}: {list(have.shape)}, not {list(want.shape)}"
        if torch.equal(have, want):
            continue
        if not want.dtype.is_floating_point:
            if not bool((have == want).all()):
                return f"{name}: {int((have != want).sum())} of {want.numel()} elements"
            continue
        finite = want[want.isfinite()].abs()
        largest = max(float(finite.max()) if finite.numel() else 0.0, 1e-6)
        noise = case.noise if case.noise is not None else NOISE[want.dtype]
        close = torch.isclose(have.double(), want.double(), rtol=0, atol=noise * largest, equal_nan=True)
        if not bool(close.all()):
            off = (have.double() - want.double()).abs().nan_to_num(torch.inf).max()
            return f"{name}: off by {float(off):.3g} of {largest:.3g}"
    return ""


def _is_near(case: Case, expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> bool:
    """True if an answer is that one, as far as a few thousand of its elements tell."""
    same = expected.keys() == got.keys() and all(want.shape == got[name].shape for name, want in expected.items())
    return same and not _difference(case, *({name: _some(x) for name, x in each.items()} for each in (expected, got)))


def _some(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()[:: max(tensor.numel() // 4096, 1)]


# --- daemons -------------------------------------------------------------------------------------------------


def settings(*, inline: bool = False, more: str = "") -> str:
    """A tnxd.toml: three lanes, or all on the serving thread."""
    return (
        'devices = ["cpu"]\n'
        + more
        + f"[cpu]\nworkers = {LANES}\nthreads = 1\ninline_limit_us = {1e6 if inline else 0}\n"
        + f"[queue]\nmax_delay_us = {1000 if inline else 300}\n"
    )


@dataclass(frozen=True)
class Built:
    """A repository with exhibits. Attributes: unbuilt: what could not be put into its format, and why."""

    repository: Path
    unbuilt: Mapping[str, str]


def build(folder: Path, chosen: Sequence[Exhibit]) -> Built:
    """Put exhibits into a new repository in a folder."""
    repository = folder / "models"
    repository.mkdir(parents=True)
    unbuilt: dict[str, str] = {}
    building.write(WITNESS, repository)
    for exhibit in chosen:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what strangers use though torch would rather not
                building.write(exhibit, repository)
        except Exception as error:  # an exporter's: the others are served
            unbuilt[exhibit.name] = f"{type(error).__name__}: {error}"
            shutil.rmtree(repository / exhibit.name)
    return Built(repository, unbuilt)


@contextmanager
def keep(folder: Path, built: Built, config: str, program: tuple[str, ...] = ("-m", "tnxd")) -> Iterator[Keeper]:
    """Serve exhibits. The daemon has to be alive at the end, and to end when it is told."""
    with serve(folder, built.repository, config, program) as (daemon, clients):
        one = Keeper(daemon, clients, built.unbuilt)
        yield one
        assert one.examine(WITNESS) == [], "a model that does nothing odd suffers from the others"


@contextmanager
def serve(
    folder: Path,
    repository: Path,
    config: str,
    program: tuple[str, ...] = ("-m", "tnxd"),
    python_path: Path = LIBRARIES,
) -> Iterator[tuple[Daemon, list[Client]]]:
    """A daemon with a repository, and eight clients of it. Args: python_path: where it finds more libraries."""
    (folder / "tnxd.toml").write_text(config)
    arguments = ("--config", str(folder / "tnxd.toml"), "--model-repository", str(repository))
    environment = {**os.environ, "PYTHONPATH": str(python_path), "ZOO_PRESENT": "1"}
    with (
        serving_daemon(folder / "log", *arguments, program=program, environment=environment) as daemon,
        ExitStack() as stack,
    ):
        yield daemon, [stack.enter_context(Client(daemon.endpoint, timeout=60.0)) for _ in range(CLIENTS)]
