"""Plans: the steps by which a deployment becomes what the catalog, or an operator, wants.

Reconciliation, decided before it is done: pure functions from a deployment and its catalog entry to steps as data. They
change nothing. The reconciler carries the steps out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tnxctl.protocol.errors import NotFound
from tnxd.deployment.registry import Deployment
from tnxd.deployment.version import EVICTED, UNLOADED


@dataclass(frozen=True)
class BringUp:
    """Load a version that is not loaded. takes_over: requests for the name alone, or copies of them, will reach it."""

    number: str
    takes_over: bool


@dataclass(frozen=True)
class Renew:
    """Load the new contents of a version whose files have changed, in place of those that it serves."""

    number: str


@dataclass(frozen=True)
class BringBack:
    """Load an evicted version again."""

    number: str


@dataclass(frozen=True)
class Retire:
    """Let a version finish what it has, and free it."""

    number: str


@dataclass(frozen=True)
class Remove:
    """Forget a version that is not loaded."""

    number: str


@dataclass(frozen=True)
class Route:
    """Split the traffic: see `Deployment.route`."""

    weights: Mapping[str, float]
    shadow: str

    def reaches(self, number: str) -> bool:
        """Whether requests for the name alone, or copies of them, may get to a version."""
        return not self.weights or number in self.weights or number == self.shadow


@dataclass(frozen=True)
class Hold:
    """Keep the traffic where it is, unless it has been split explicitly: see `Deployment.hold`."""

    weights: Mapping[str, float]
    implied: bool = False


@dataclass(frozen=True)
class Pin:
    """Keep a version loaded, whatever the catalog wants."""

    number: str


@dataclass(frozen=True)
class Withdraw:
    """Take a version's traffic and its pin: see `Deployment.withdraw`."""

    number: str


@dataclass(frozen=True)
class Release:
    """End what `Hold` did for versions that were asked for by number: see `Deployment.release`."""


Step = BringUp | Renew | BringBack | Retire | Remove | Route | Hold | Pin | Withdraw | Release


@dataclass(frozen=True)
class Reconciliation:
    """The plan for one name in the catalog: first all loads, then the traffic, then all unloads.

    Nothing that serves goes before its successor serves, and a load that fails leaves in place what serves.

    Attributes:
        before: the first steps. They keep traffic from what comes up, or give it to the first that does.
        loads: the next steps. Each of them may fail, and the next one is carried out all the same.
        goal: the traffic that the entry wants, once it can be had; None: the traffic stays as it is.
        wanted: numbers of the versions to keep. serving: of those that have traffic before the first step.
    """

    before: tuple[Route | Hold, ...]
    loads: tuple[BringUp | Renew, ...]
    goal: Route | None
    wanted: frozenset[str]
    serving: frozenset[str]

    def rest(
        self,
        deployment: Deployment,
        failed: Collection[str],
        broken: Collection[str],
        held: frozenset[str] = frozenset(),
    ) -> tuple[Step, ...]:
        """The steps after the loads.

        Args:
            deployment: as it is now: somebody may have routed its traffic meanwhile, and that counts.
            failed: numbers of the versions whose load failed.
            broken: NAME@VERSION of versions with mistakes that keep them out of the catalog. What serves goes on: a
                mistake in what is there is no reason to stop.
            held: numbers of versions that a pipeline needs which serves. They stay if they serve.
        """
        steps: list[Step] = []
        sources = deployment.entry.sources.keys()
        routed = {*deployment.weights, deployment.shadow}
        if self.goal is not None and deployment.restore and not any(map(self.goal.reaches, failed)):
            steps.append(self.goal)
            routed = {*self.goal.weights, self.goal.shadow}
        kept = self.wanted | (self.serving if failed else frozenset()) | (routed & sources)
        for number, version in deployment.versions.items():
            state = version.state
            stays = number in kept or (version.servable and (version.title in broken or number in held))
            if not stays and state != UNLOADED:
                steps.append(Retire(number))
                state = UNLOADED
            if number not in sources and state == UNLOADED:
                steps.append(Remove(number))
        return tuple(steps)


def reconcile(deployment: Deployment) -> Reconciliation:
    """Plan how a deployment becomes what its entry wants, which `Registry.register` has put there."""
    entry = deployment.entry
    serving = {version.number: weight for version, weight in deployment.shares()}
    traffic, goal = Route(deployment.weights, deployment.shadow), None
    before: list[Route | Hold] = []
    loads: list[BringUp | Renew] = []
    if deployment.restore:
        traffic = Route(entry.weights, entry.shadow)
        if not serving:
            before.append(traffic)
        else:
            goal = traffic
            if traffic.weights or traffic.shadow:  # what comes up now may get less than all of it, or nothing
                before.append(Hold(serving))
    routed = {*traffic.weights, traffic.shadow}
    wanted = frozenset({*entry.wanted, *deployment.pinned, *routed} & entry.sources.keys())
    for number, version in deployment.versions.items():
        if number not in wanted:
            continue
        if not version.servable:
            loads.append(BringUp(number, traffic.reaches(number)))
        elif version.source.stamp != entry.sources[number].stamp:
            loads.append(Renew(number))
    return Reconciliation(tuple(before), tuple(loads), goal, wanted, frozenset(serving))


def plan_removal(deployment: Deployment, broken: Collection[str]) -> tuple[Step, ...]:
    """Plan how a name goes that is not in the catalog any more. Args: broken: as in `Reconciliation.rest`."""
    steps: list[Step] = []
    for number, version in deployment.versions.items():
        if version.servable and version.title in broken:
            continue
        if version.state != UNLOADED:
            steps.append(Retire(number))
        steps.append(Remove(number))
    return tuple(steps)


def plan_load(deployment: Deployment, number: str) -> tuple[Step, ...]:
    """Plan how a version that is in the catalog is loaded because somebody asked for it by number.

    It stays whatever the catalog wants, and waits until traffic is routed to it, unless it is the first.

    Raises:
        NotFound: it is not in the catalog, though what is loaded of it may serve.
    """
    version = deployment.version(number)
    source = deployment.entry.sources.get(number)
    if source is None:
        raise NotFound(
            f"model {deployment.name!r} has no version {number!r} any more; a reload ends what is loaded of it"
        )
    steps: list[Step] = []
    if version.servable and version.source.stamp != source.stamp:
        steps.append(Renew(number))
    elif version.state == EVICTED:
        steps.append(BringBack(number))
    elif not version.servable:
        steps.append(BringUp(number, takes_over=False))
        serving = {other.number: weight for other, weight in deployment.shares()}
        if serving:
            steps.append(Hold(serving, implied=True))
    return (*steps, Pin(number))


def plan_unload(deployment: Deployment, numbers: Iterable[str]) -> tuple[Step, ...]:
    """Plan how versions go because somebody asked for it."""
    steps: list[Step] = []
    going = set(numbers)
    for number, version in deployment.versions.items():
        if number in going:
            steps.append(Withdraw(number))
            if version.state != UNLOADED:
                steps.append(Retire(number))
    stays = deployment.pinned - going
    if not any(version.servable for number, version in deployment.versions.items() if number in stays):
        steps.append(Release())
    return tuple(steps)


def plan_recall(deployment: Deployment) -> tuple[Step, ...]:
    """Plan how versions that the entry wants come back if they have been evicted."""
    versions = [deployment.versions[number] for number in deployment.entry.wanted]
    return tuple(BringBack(version.number) for version in versions if version.state == EVICTED)
