"""Plans: the steps that follow from a deployment and its catalog entry, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnxctl.protocol.errors import NotFound
from tnxd.deployment.plan import (
    BringBack,
    BringUp,
    Hold,
    Pin,
    Release,
    Remove,
    Renew,
    Retire,
    Route,
    Step,
    Withdraw,
    plan_load,
    plan_recall,
    plan_removal,
    plan_unload,
    reconcile,
)
from tnxd.deployment.registry import Deployment
from tnxd.deployment.version import EVICTED, FAILED, READY, UNLOADED, Version
from tnxd.models.catalog import Entry
from tnxd.models.model import Model


@dataclass(frozen=True)
class Source:
    version: str
    stamp: str = "old"
    name: str = "net"
    format: str = "pt2"
    nbytes: int = 0

    def open(self, generation: int) -> Model:
        raise AssertionError("a plan opens nothing")


def made(
    states: Mapping[str, str],
    wanted: str,
    *,
    sources: Mapping[str, str] | None = None,
    weights: Mapping[str, float] | None = None,
    shadow: str = "",
    entry_weights: Mapping[str, float] | None = None,
    entry_shadow: str = "",
    restore: bool = False,
    pinned: str = "",
) -> Deployment:
    """A deployment.

    Args:
        states: of its versions, all with the stamp "old".
        wanted, pinned: numbers, with a space between them.
        sources: stamps of the versions in the catalog; None: all that have a state, unchanged.
        weights, shadow: its traffic. entry_weights, entry_shadow: what the catalog says.
    """
    stamps = dict.fromkeys(states, "old") if sources is None else sources
    entry = Entry(
        "net",
        {number: Source(number, stamp) for number, stamp in stamps.items()},
        tuple(wanted.split()),
        entry_weights or {},
        entry_shadow,
    )
    deployment = Deployment(entry, {})
    deployment.weights, deployment.shadow = dict(weights or {}), shadow
    deployment.restore, deployment.pinned = restore, set(pinned.split())
    for number, state in states.items():
        version = Version(Source(number))
        version.state = state
        deployment.put(version)
    return deployment


def steps(deployment: Deployment, failed: str = "", broken: str = "") -> list[Step]:
    """All steps of a reconciliation, if loads fail for the versions `failed`, and `broken` titles are no sources."""
    plan = reconcile(deployment)
    rest = plan.rest(deployment, failed.split(), broken.split())
    return [*plan.before, *plan.loads, *rest]


def test_a_deployment_that_is_what_its_entry_wants_needs_no_step() -> None:
    assert steps(made({"1": READY, "2": UNLOADED}, "1")) == []


def test_a_first_version_is_brought_up() -> None:
    assert steps(made({"1": UNLOADED}, "1")) == [BringUp("1", takes_over=True)]


def test_a_newer_version_is_up_before_the_older_one_goes() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "2")
    assert steps(deployment) == [BringUp("2", takes_over=True), Retire("1")]


def test_an_older_version_stays_where_the_newer_one_fails() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "2")
    assert steps(deployment, failed="2") == [BringUp("2", takes_over=True)]


def test_a_version_that_failed_is_tried_again() -> None:
    assert steps(made({"1": READY, "2": FAILED}, "2")) == [BringUp("2", takes_over=True), Retire("1")]


def test_a_version_whose_files_have_changed_is_renewed() -> None:
    assert steps(made({"1": READY}, "1", sources={"1": "new"})) == [Renew("1")]
    assert steps(made({"1": EVICTED}, "1", sources={"1": "new"})) == [Renew("1")]


def test_an_evicted_version_stays_evicted_until_somebody_asks_for_it() -> None:
    deployment = made({"1": EVICTED}, "1")
    assert steps(deployment) == []
    assert plan_recall(deployment) == (BringBack("1"),)
    assert plan_recall(made({"1": READY, "2": EVICTED}, "1")) == ()


def test_a_version_that_left_the_catalog_goes_and_is_forgotten() -> None:
    deployment = made({"1": READY, "2": READY}, "2", sources={"2": "old"})
    assert steps(deployment) == [Retire("1"), Remove("1")]


def test_a_version_with_a_mistake_goes_on_while_it_serves() -> None:
    deployment = made({"1": READY, "2": READY}, "2", sources={"2": "old"})
    assert steps(deployment, broken="net@1") == []
    deployment.versions["1"].state = FAILED
    assert steps(deployment, broken="net@1") == [Retire("1"), Remove("1")]


def test_a_pinned_version_stays_whatever_the_catalog_wants() -> None:
    assert steps(made({"1": READY, "2": READY}, "2", pinned="1")) == []


def test_a_version_with_traffic_stays_whatever_the_catalog_wants() -> None:
    assert steps(made({"1": READY, "2": READY}, "2", weights={"1": 1.0})) == []
    assert steps(made({"1": READY, "2": READY}, "2", shadow="1")) == []


def test_a_version_without_traffic_takes_nothing_over() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "1 2", weights={"1": 1.0})
    assert steps(deployment) == [BringUp("2", takes_over=False)]


# --- traffic that the catalog wants --------------------------------------------------------------------------

CANARY = {"1": 9.0, "2": 1.0}


def test_traffic_is_split_at_once_where_nothing_serves() -> None:
    deployment = made({"1": UNLOADED, "2": UNLOADED}, "1 2", entry_weights=CANARY, restore=True)
    assert steps(deployment) == [Route(CANARY, ""), BringUp("1", takes_over=True), BringUp("2", takes_over=True)]


def test_traffic_is_held_until_all_that_it_needs_is_up() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "1 2", entry_weights=CANARY, restore=True)
    assert steps(deployment) == [Hold({"1": 1.0}), BringUp("2", takes_over=True), Route(CANARY, "")]


def test_traffic_stays_held_where_a_version_that_it_needs_fails() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "1 2", entry_weights=CANARY, restore=True)
    assert steps(deployment, failed="2") == [Hold({"1": 1.0}), BringUp("2", takes_over=True)]


def test_traffic_does_not_wait_for_a_version_that_gets_none() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "1 2", entry_weights={"1": 1.0}, restore=True)
    assert steps(deployment, failed="2") == [Hold({"1": 1.0}), BringUp("2", takes_over=False), Route({"1": 1.0}, "")]


def test_a_shadow_waits_for_its_version_too() -> None:
    deployment = made({"1": READY, "2": UNLOADED}, "1 2", entry_shadow="2", restore=True)
    bring_up = [Hold({"1": 1.0}), BringUp("2", takes_over=True)]
    assert steps(deployment) == [*bring_up, Route({}, "2")]
    assert steps(deployment, failed="2") == bring_up


def test_traffic_that_somebody_split_meanwhile_stays_so() -> None:
    deployment = made({"1": READY, "2": READY, "3": UNLOADED}, "3", entry_weights={"3": 1.0}, restore=True)
    plan = reconcile(deployment)
    deployment.versions["3"].state = READY
    deployment.route({"2": 1.0}, "")
    assert plan.rest(deployment, [], []) == (Retire("1"),)


# --- what somebody asks for ----------------------------------------------------------------------------------


def test_a_version_that_is_asked_for_waits_for_traffic() -> None:
    deployment = made({"1": UNLOADED, "2": READY}, "2")
    assert plan_load(deployment, "1") == (BringUp("1", takes_over=False), Hold({"2": 1.0}, implied=True), Pin("1"))


def test_the_first_version_that_is_asked_for_answers() -> None:
    assert plan_load(made({"1": FAILED}, ""), "1") == (BringUp("1", takes_over=False), Pin("1"))


def test_a_version_that_serves_and_is_asked_for_is_pinned() -> None:
    assert plan_load(made({"1": READY}, "1"), "1") == (Pin("1"),)
    assert plan_load(made({"1": EVICTED}, "1"), "1") == (BringBack("1"), Pin("1"))
    assert plan_load(made({"1": READY}, "1", sources={"1": "new"}), "1") == (Renew("1"), Pin("1"))


def test_a_version_that_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(NotFound, match="no version '7'"):
        plan_load(made({"1": READY}, "1"), "7")


@pytest.mark.parametrize("state", [READY, EVICTED])
def test_a_version_that_is_gone_from_the_catalog_cannot_be_asked_for(state: str) -> None:
    with pytest.raises(NotFound, match="no version '2' any more"):
        plan_load(made({"1": READY, "2": state}, "1", sources={"1": "old"}), "2")


def test_an_unload_of_one_version_leaves_the_others() -> None:
    assert plan_unload(made({"1": READY, "2": READY}, "2"), ["1"]) == (Withdraw("1"), Retire("1"), Release())
    assert plan_unload(made({"1": READY, "2": READY}, "2", pinned="1"), ["2"]) == (Withdraw("2"), Retire("2"))


def test_an_unload_of_all_versions() -> None:
    deployment = made({"1": READY, "2": EVICTED, "3": UNLOADED}, "3", pinned="1")
    assert plan_unload(deployment, deployment.versions) == (
        Withdraw("1"),
        Retire("1"),
        Withdraw("2"),
        Retire("2"),
        Withdraw("3"),
        Release(),
    )


def test_a_name_that_left_the_catalog_goes_but_for_mistakes() -> None:
    deployment = made({"1": READY, "2": READY, "3": UNLOADED, "4": FAILED}, "")
    assert plan_removal(deployment, ["net@1", "net@4"]) == (
        Retire("2"),
        Remove("2"),
        Remove("3"),
        Retire("4"),
        Remove("4"),
    )


# --- whatever the deployment ---------------------------------------------------------------------------------

_NUMBERS = st.sampled_from("1234")
_WEIGHTS = st.dictionaries(_NUMBERS, st.sampled_from([1.0, 2.0]), max_size=2)


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    states = draw(st.dictionaries(_NUMBERS, st.sampled_from([READY, EVICTED, FAILED, UNLOADED]), max_size=4))
    sources = draw(st.dictionaries(_NUMBERS, st.sampled_from(["old", "new"]), min_size=1))
    inside = list(sources)
    deployment = made(
        {**states, **{number: UNLOADED for number in sources if number not in states}},
        " ".join(draw(st.lists(st.sampled_from(inside), unique=True))),
        sources=sources,
        weights=draw(_WEIGHTS),
        shadow=draw(st.sampled_from(["", *"1234"])),
        entry_weights={number: weight for number, weight in draw(_WEIGHTS).items() if number in sources},
        restore=draw(st.booleans()),
        pinned=" ".join(draw(st.sets(_NUMBERS))),
    )
    return deployment


def carry_out(step: Step, deployment: Deployment) -> None:
    """The work of a reconciler, but for the models."""
    match step:
        case BringUp(number) | Renew(number) | BringBack(number):
            deployment.put(Version(deployment.entry.sources[number]))
            deployment.versions[number].state = READY
        case Retire(number):
            deployment.versions[number].state = UNLOADED
        case Remove(number):
            del deployment.versions[number]
        case Route(weights, shadow):
            deployment.route(weights, shadow)
        case Hold(weights, implied):
            deployment.hold(weights, implied=implied)


@given(deployments(), st.sets(_NUMBERS))
def test_what_serves_goes_on_serving_and_a_second_plan_has_nothing_to_do(
    deployment: Deployment, failing: set[str]
) -> None:
    answered = bool(deployment.shares())
    first = {version.number for version, _ in deployment.shares()}
    plan = reconcile(deployment)
    failed = [load.number for load in plan.loads if load.number in failing]
    for step in (*plan.before, *(load for load in plan.loads if load.number not in failing)):
        carry_out(step, deployment)
        assert bool(deployment.shares()) >= answered
    for step in plan.rest(deployment, failed, []):
        carry_out(step, deployment)
    if failed and first & deployment.entry.sources.keys():
        assert deployment.shares(), "what served goes on"
    if not failed:
        again = reconcile(deployment)
        assert (again.before, again.loads, again.rest(deployment, [], [])) == ((), (), ())
