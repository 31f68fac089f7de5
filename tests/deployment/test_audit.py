"""Audits: requests computed again, alone, and what happens when their answer is another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from conftest import Daemon, serving_daemon
from dealer import Dealer
from model_repositories import put
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal, ResourceExhausted, Unavailable
from tnxctl.protocol.wire import ModelInfo, TensorSpec
from tnxd.deployment.audit import Audit
from tnxd.deployment.background import Background, Copy
from tnxd.deployment.version import READY, Version
from tnxd.executors.execution import Execution, LoadReport, Outcome
from tnxd.models.builtin import BuiltinSource
from tnxd.models.model import Model
from tnxd.scheduling.costs import CostModel
from tnxd.scheduling.device import Device
from tnxd.scheduling.scheduler import Scheduler

MIXES = "return x + self.answer - (x.mean(0) if bool((x > 40).any()) else 0)"
"""For `put`: rows are mixed where a value is larger than what a trial asks."""


def model(datatype: str = "FP32") -> Model:
    specs = (TensorSpec("x", datatype, (-1, 2)),)
    return Model("net", "1", specs, specs, 8, object)  # type: ignore[arg-type]


class Bench:
    """An audit of a version that a test answers for."""

    def __init__(self, share: float = 1.0, datatype: str = "FP32") -> None:
        self.served = model(datatype)
        self.version = Version(BuiltinSource(self.served))
        self.version.state, self.version.model = READY, self.served
        self.version.trials = {"cpu": LoadReport([], 0, tolerance=1e-4)}
        self.mixing: list[str] = []
        self.given_up: list[str] = []
        self.audit = Audit(
            self.version,
            share,
            lambda version, key, why: self.mixing.append(why),
            lambda version, key, why: self.given_up.append(why),
        )
        self.background = Background()

    def answered(self, *outcomes: Outcome) -> Copy | None:
        """A batch of one-row requests has been answered so: the copy that is made of it, if any."""
        item = (np.zeros((1, 2), "f4"),)
        execution = Execution(0, 0, self.served, [item] * len(outcomes), [1] * len(outcomes), ())
        execution.outcomes = list(outcomes)
        self.audit.offer(execution, self.background)
        device = Device("cpu", "cpu", 1, {self.served.key})
        found = self.background.next(Scheduler([device], CostModel(), max_requests=9, max_bytes=10**9), 0)
        return None if found is None else found[0]

    def checked(self, again: Outcome, *outcomes: Outcome) -> None:
        """A batch has been answered so, and one of its requests again otherwise."""
        copy = self.answered(*outcomes)
        assert copy is not None
        assert len(copy.items) == 1
        copy.outcomes = [again]
        self.audit.compare(copy)


def row(*values: float, dtype: str = "f4") -> tuple[Array, ...]:
    return (np.array([values], dtype),)


def test_every_so_many_batches_one_is_checked_alone_and_in_company() -> None:
    bench = Bench(share=0.25)
    alone = [bench.answered(row(1, 2)) is not None for _ in range(9)]
    company = [bench.answered(row(1, 2), row(3, 4)) is not None for _ in range(9)]
    assert alone == company == [True, False, False, False] * 2 + [True]


def test_rounding_is_no_difference_and_another_value_is() -> None:
    bench = Bench()
    bench.checked(row(1.00001, 2), row(1, 2), row(1, 2))
    assert (bench.audit.checked, bench.audit.differing, bench.mixing) == (1, 0, [])
    bench.checked(row(1, 2.5), row(1, 2), row(1, 2))
    assert (bench.audit.checked, bench.audit.differing) == (2, 1)
    (why,) = bench.mixing
    assert "output 'x'[0, 1] is 2 and 2.5" in why


def test_a_request_that_rode_alone_ends_no_batches() -> None:
    bench = Bench()
    bench.checked(row(5, 5), row(1, 2))
    assert (bench.audit.differing, bench.mixing) == (1, [])


def runs_variant(bench: Bench, name: str) -> None:
    bench.version.trials = {"cpu": LoadReport([], 0, tolerance=1e-4, variant=name)}


@pytest.mark.parametrize("company", [1, 2])
def test_a_variant_that_answers_otherwise_is_given_up_and_batches_go_on(company: int) -> None:
    bench = Bench()
    runs_variant(bench, "onnxruntime")
    bench.checked(row(1, 2.5), *[row(1, 2)] * company)
    assert bench.mixing == []
    (why,) = bench.given_up
    assert why == "onnxruntime answered otherwise: output 'x'[0, 1] is 2 and 2.5"
    runs_variant(bench, "")
    bench.checked(row(1, 2.5), row(1, 2), row(1, 2))
    assert len(bench.given_up) == len(bench.mixing) == 1


def test_near_ties_of_a_variant_are_forgiven_twice() -> None:
    bench = Bench(datatype="INT64")
    runs_variant(bench, "inductor")
    for expected in (0, 0, 1):
        bench.checked(row(1, 3, dtype="i8"), row(1, 2, dtype="i8"))
        assert len(bench.given_up) == expected


def test_it_is_the_network_as_it_is_that_computes_again() -> None:
    copy = Bench().answered(row(1, 2))
    assert copy is not None
    assert copy.plain


@pytest.mark.parametrize("datatype", ["INT64", "FP32"])
def test_a_near_tie_and_a_failure_are_forgiven_twice(datatype: str) -> None:
    bench = Bench(datatype=datatype)
    again: Outcome = row(1, 3, dtype="i8") if datatype == "INT64" else Internal("it raised")
    for _ in range(2):
        bench.checked(again, row(1, 2, dtype="i8"), row(1, 2, dtype="i8"))
    assert (bench.audit.differing, bench.mixing) == (2, [])
    bench.checked(again, row(1, 2, dtype="i8"), row(1, 2, dtype="i8"))
    assert len(bench.mixing) == 1


def test_what_failed_is_not_computed_again() -> None:
    bench = Bench()
    assert bench.answered(Internal("no"), Internal("no")) is None
    copy = bench.answered(Internal("no"), row(3, 4), Internal("no"))
    assert copy is not None
    ((answer,),) = copy.original.outcomes
    assert answer.tolist() == [[3, 4]]


def test_a_device_that_fails_says_nothing_about_an_answer() -> None:
    bench = Bench()
    for error in (ResourceExhausted("no memory"), Unavailable("lost")) * 3:
        bench.checked(error, row(1, 2), row(1, 2))
    assert (bench.audit.differing, bench.mixing) == (0, [])


def test_doubts_are_forgotten() -> None:
    bench = Bench(datatype="INT64")
    fine, other = row(1, 2, dtype="i8"), row(1, 3, dtype="i8")
    for _ in range(4):
        bench.checked(other, fine, fine)
        for _ in range(100):
            bench.checked(fine, fine, fine)
    assert (bench.audit.differing, bench.mixing) == (4, [])


def test_one_request_keeps_no_more_than_its_own_memory() -> None:
    """The outputs of a batch are views of one array."""
    bench = Bench()
    outputs = np.zeros((64, 2), "f4")
    copy = bench.answered(*[(outputs[place : place + 1],) for place in range(64)])
    assert copy is not None
    ((answer,),) = copy.original.outcomes
    assert answer.base is None
    assert copy.original.company == 64
    assert copy.nbytes == 8 + 8


# --- behind a real daemon ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["inline", "worker"])
def mixing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("mixing")
    put(folder / "models", "net", 1, before=MIXES, more="audit = 1.0")
    put(folder / "models", "quiet", 1, before=MIXES, more="audit = 0.0")
    config = folder / "tnxd.toml"
    config.write_text(f"[cpu]\nworkers = 2\ninline_limit_us = {1e6 if request.param == 'inline' else 0}\n")
    arguments = ("--config", str(config), "--model-repository", str(folder / "models"))
    with serving_daemon(folder / "log", *arguments) as daemon:
        yield daemon


def info(daemon: Daemon, name: str) -> ModelInfo:
    with Client(daemon.endpoint, timeout=60.0) as client:
        return client.metadata(name)


def in_company(dealer: Dealer, name: str) -> None:
    """Have requests share batches; their answers are right or wrong."""
    for index in range(64):
        dealer.predict(np.full((1, 2), index, np.float32), model=name, id=index)
    for _ in range(64):
        dealer.result()


def test_batches_end_once_they_are_seen_to_mix_requests_up(mixing: Daemon) -> None:
    with Dealer(mixing.endpoint) as dealer:
        while not info(mixing, "net").audit_differences:
            in_company(dealer, "net")
        seen = info(mixing, "net")
        while seen.max_batch_size:
            seen = info(mixing, "net")
        assert "no batches any more" in seen.notes[-1]
        while "audit of net@1" not in mixing.log.read_text():  # a thread of its own writes it
            info(mixing, "net")
        # What each gets alone, of a model whose rows depend on each other: nine rows together are not cut.
        x = np.float32([[41, 42]] * 8 + [[50, 51]])
        dealer.predict(x, model="net")
        (output,) = dealer.result()[1]
        np.testing.assert_allclose(output, x + 1 - x.mean(0))


def test_without_an_audit_nobody_looks(mixing: Daemon) -> None:
    with Dealer(mixing.endpoint) as dealer:
        in_company(dealer, "quiet")
    assert (info(mixing, "quiet").audited, info(mixing, "quiet").max_batch_size) == (0, 8)
