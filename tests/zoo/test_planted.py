"""The zoo sees it where a mechanism that keeps answers apart is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo import keeper, planted
from zoo.case import FACTORY, PT2, SCRIPT, Case, Exhibit
from zoo.cases import ROWS, SCRATCH, STATE
from zoo.keeper import Keeper

PROGRAM = (str(Path(__file__).with_name("planted.py")),)
CASES = {case.name: case for case in (*STATE, *SCRATCH, *ROWS)}
ROUNDS = 6
"""Rounds of company: two lanes have to be in the same forward at once."""

# Which of them have to be noticed, and the kinds of findings that say so.
CAUGHT_BY = {
    "copies": (
        ("small-output", FACTORY),
        ("large-output", FACTORY),
        ("scratch-attribute", FACTORY),
        ("hooks", FACTORY),
    ),
    "classes": (("buffer-copy", PT2), ("attribute-list", FACTORY), ("module-global", FACTORY)),
    "proof": (("point-cloud", PT2), ("normalized", SCRIPT), ("sequence-first", FACTORY), ("flip", PT2)),
    "audit": (("mixes-beyond", FACTORY),),
}
KINDS = {"copies": {"answer", "error"}, "classes": {"answer", "outcome"}, "proof": {"answer"}, "audit": {"late"}}


def chosen(mechanism: str) -> list[Exhibit]:
    return [Exhibit(CASES[name], format) for name, format in CAUGHT_BY[mechanism]]


@pytest.fixture(scope="module", params=list(CAUGHT_BY))
def without(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Keeper]]:
    """A daemon that lacks a mechanism, and what should notice it."""
    mechanism: str = request.param
    folder = tmp_path_factory.mktemp(mechanism)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_PLANTED", mechanism)
        config = keeper.settings()
        with keeper.keep(folder, keeper.build(folder, chosen(mechanism)), config, PROGRAM) as one:
            yield mechanism, one


@pytest.mark.zoo
@pytest.mark.timeout(300)
def test_a_missing_mechanism_is_noticed(without: tuple[str, Keeper]) -> None:
    mechanism, one = without
    silent = []
    for exhibit in chosen(mechanism):
        kinds = {finding.kind for finding in one.findings(exhibit, ROUNDS)}
        if not kinds & KINDS[mechanism]:
            silent.append((exhibit.name, kinds))
    assert silent == []


def test_the_places_of_all_mechanisms_are_there() -> None:
    """Else a planted bug would be none."""
    assert planted.missing() == []


def test_every_case_that_is_named_is_there() -> None:
    assert all(isinstance(CASES[name], Case) for places in CAUGHT_BY.values() for name, _ in places)
