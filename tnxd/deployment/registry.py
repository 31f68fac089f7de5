"""The registry of models: names, versions, and the version that a request gets. No torch, no I/O.

Owned by the serving loop's thread. `tnxd.deployment.reconciler` changes it; the server asks `find` for every request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import accumulate
from zlib import crc32

from tnxctl.protocol.errors import FailedPrecondition, NotFound, TensorNextError, Unavailable
from tnxctl.protocol.wire import check_name, check_version, excerpt, split_title
from tnxd.deployment.version import FAILED, READY, UNLOADED, Version
from tnxd.models.catalog import Catalog, Entry

LOADING_RETRY_S = 0.1
"""Seconds until a client should ask again for a version that is being loaded."""


class _Split:
    """A split of a name's traffic among several versions."""

    def __init__(self, shares: list[tuple[Version, float]]) -> None:
        self._versions = [version for version, _ in shares]
        total = sum(weight for _, weight in shares)
        self._bounds = [bound / total for bound in accumulate(weight for _, weight in shares)]

    def choose(self, key: bytes) -> Version:
        """Choose a version: the same for the same key. A version whose share grows keeps the keys that it has."""
        place = bisect_right(self._bounds, crc32(key) / 2**32)
        return self._versions[min(place, len(self._versions) - 1)]


class Deployment:
    """Deployment of one name: its versions, and the split of requests that name no version.

    Attributes:
        entry: what the catalog said last.
        versions: by number, from the oldest to the newest.
        weights: explicit shares; empty: the newest version takes all that is not the shadow.
        shadow: number of the version that gets copies; "": none.
        pinned: versions that somebody asked for by number: they stay whatever the catalog wants.
        implied: the weights only keep traffic from versions that were asked for by number.
        restore: the traffic is to become that of the entry, once all that it needs is loaded.
    """

    def __init__(self, entry: Entry, generations: dict[str, int]) -> None:
        self.entry = entry
        self.versions: dict[str, Version] = {}
        self.weights: dict[str, float] = dict(entry.weights)
        self.shadow = entry.shadow
        self.pinned: set[str] = set()
        self.implied = False
        self.restore = False
        self._generations = generations

    @property
    def name(self) -> str:
        return self.entry.name

    def shares(self) -> list[tuple[Version, float]]:
        """The versions that get requests that name none, and how much, relative to the sum."""
        servable = [version for version in self.versions.values() if version.servable]
        weighted = [(version, self.weights.get(version.number, 0.0)) for version in servable]
        weighted = [(version, weight) for version, weight in weighted if weight > 0]
        if weighted:
            return weighted
        answering = [version for version in servable if version.number != self.shadow] or servable
        return [(version, 1.0) for version in answering[-1:]]

    def traffic(self, version: Version) -> float:
        """The share of one version, 0 to 1."""
        shares = self.shares()
        return sum(weight for other, weight in shares if other is version) / (sum(w for _, w in shares) or 1.0)

    def route(self, weights: Mapping[str, float], shadow: str) -> None:
        """Split the traffic: see `weights` and `shadow`."""
        self.weights, self.shadow, self.implied, self.restore = dict(weights), shadow, False, False

    def hold(self, weights: Mapping[str, float], *, implied: bool) -> None:
        """Set weights if there are none, so that a newer version does not take the traffic by default.

        Args:
            implied: they last until `release`, or until somebody splits the traffic.
        """
        if not self.weights:
            self.weights, self.implied = dict(weights), implied

    def release(self) -> None:
        """Undo an implied `hold`."""
        if self.implied:
            self.weights, self.implied = {}, False

    def withdraw(self, number: str) -> None:
        """Take a version out of the split of the traffic, and let it go if the catalog does not want it."""
        self.pinned.discard(number)
        self.weights.pop(number, None)
        if self.shadow == number:
            self.shadow = ""

    def generation(self, number: str) -> int:
        """The generation for contents of a version that nothing else is left of."""
        return self._generations.get(number, 0)

    def next_generation(self, number: str) -> int:
        """The generation for contents of a version that come beside others of the same number; see `Model`."""
        self._generations[number] = self._generations.get(number, 0) + 1
        return self._generations[number]

    def put(self, version: Version) -> None:
        """Add a version, or new contents of one, in the order of the numbers."""
        versions = {**self.versions, version.number: version}
        self.versions = dict(sorted(versions.items(), key=lambda item: (len(item[0]), item[0])))

    def version(self, number: str) -> Version:
        """The version of that number. Raises NotFound, InvalidArgument."""
        version = self.versions.get(number)
        if version is None:
            check_version(number)
            known = ", ".join(self.versions) or "none"
            raise NotFound(f"model {self.name!r} has no version {excerpt(number)}; there are {known}")
        return version


class Registry:
    """All deployments.

    Attributes:
        deployments: by name. default: the name for requests that give none: the configured one, else the first that
            can be served.
        shadow_of: the version that gets copies of its batches, by the version that answers.
        evictions: how often versions were unloaded to make room for others, by title.
        failures: what could not become a deployment, by name or path, and why.
        before_change, on_change: called after any change, one after the other; the first may still change versions.
    """

    def __init__(self, default: str = "") -> None:
        self.default = default
        self._configured_default = default
        self.deployments: dict[str, Deployment] = {}
        self.shadow_of: dict[Version, Version] = {}
        self.evictions: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.before_change: Callable[[], None] = lambda: None
        self.on_change: Callable[[], None] = lambda: None
        self._targets: dict[str, Version | _Split] = {}
        self._clock = 0
        self._generations: dict[str, dict[str, int]] = {}

    def announce(self, catalog: Catalog) -> None:
        """Register all names before they are loaded: a client that asks meanwhile is not told that there is none."""
        self.failures = dict(catalog.failures)
        for entry in catalog.entries.values():
            deployment = self.register(entry)
            for number in entry.wanted:
                deployment.versions[number].loading = True
        self.rebuild()

    def register(self, entry: Entry) -> Deployment:
        """Register an entry. Returns its deployment, which may be new, with a Version for each of its sources."""
        deployment = self.deployments.get(entry.name)
        if deployment is None:
            deployment = self.deployments[entry.name] = Deployment(entry, self.generations(entry.name))
        elif entry.weights != deployment.entry.weights or entry.shadow != deployment.entry.shadow:
            deployment.restore = True
        deployment.entry = entry
        self.failures.pop(entry.name, None)
        for number, source in entry.sources.items():
            known = deployment.versions.get(number)
            if known is None or (known.state in (UNLOADED, FAILED) and known.source.stamp != source.stamp):
                deployment.put(Version(source, deployment.generation(number)))
        for number, version in list(deployment.versions.items()):
            if number not in entry.sources and version.state in (UNLOADED, FAILED):
                del deployment.versions[number]
        return deployment

    def __iter__(self) -> Iterator[tuple[Deployment, Version]]:
        for deployment in self.deployments.values():
            for version in deployment.versions.values():
                yield deployment, version

    def __contains__(self, model: str) -> bool:
        """Whether `find` finds a version for NAME or NAME@VERSION."""
        return model in self._targets

    def find(self, model: str, client: bytes, route_key: str) -> Version:
        """The version for a request.

        Args:
            model: NAME, NAME@VERSION, or "" for the default model.
            client, route_key: while traffic is split, requests with the same key, or else of the same client, get the
                same version.

        Raises:
            NotFound: no such model or version.
            FailedPrecondition: it could not be loaded, or was unloaded.
            Unavailable: it is being loaded.
        """
        target = self._targets.get(model)
        if target is None:
            raise self.why_not(model)
        if target.__class__ is _Split:
            target = target.choose(route_key.encode("utf-8", "replace") or client)
        self._clock += 1
        target.last_used = self._clock  # type: ignore[union-attr]
        return target  # type: ignore[return-value]

    def asked(self, model: str, client: bytes, route_key: str) -> Version | None:
        """The version that a request is for, whether it can be served or not; None: nobody knows such a model."""
        target = self._targets.get(model)
        if isinstance(target, _Split):
            return target.choose(route_key.encode("utf-8", "replace") or client)
        if target is None:
            try:
                return self.describe(model)[1]
            except TensorNextError:
                return None
        return target

    def describe(self, model: str) -> tuple[Deployment, Version]:
        """The version that `find` would find, in whatever state, and of several the one with the largest share.

        Raises:
            InvalidArgument: it can be the name of none.
            NotFound: no such model or version.
            FailedPrecondition: it is there, but cannot be served.
        """
        if not model and not self.default:
            raise NotFound("there is no model: publish one in the model repository, then tnxctl reload")
        name, number = split_title(model or self.default)
        deployment = self.deployment(name)
        if number:
            failure = self.failures.get(f"{name}@{number}")
            if failure is not None and number not in deployment.versions:
                raise FailedPrecondition(f"model '{name}@{number}' cannot be served: {failure}")
            return deployment, deployment.version(number)
        shares = deployment.shares()
        if shares:
            return deployment, max(shares, key=lambda share: share[1])[0]
        if not deployment.versions:
            raise NotFound(f"model {name!r} has no version")
        return deployment, list(deployment.versions.values())[-1]

    def awaits(self, model: str) -> bool:
        """Whether a load that is not over yet decides which version a name stands for. Raises as `describe` does."""
        if not model:
            return any(version.loading for _, version in self)
        deployment, version = self.describe(model)
        return any(each.loading for each in ([version] if "@" in model else deployment.versions.values()))

    def deployment(self, name: str) -> Deployment:
        """The deployment of that name. Raises NotFound, InvalidArgument."""
        known = self.deployments.get(name)
        if known is None:
            check_name(name)
            failure = self.failures.get(name) or next(
                (why for what, why in self.failures.items() if what.startswith(f"{name}@")), None
            )
            if failure is not None:
                raise FailedPrecondition(f"model {name!r} cannot be served: {failure}")
            raise NotFound(f"no model {excerpt(name)}; there are {', '.join(self.deployments) or 'none'}")
        return known

    def generations(self, name: str) -> dict[str, int]:
        """Generations of a name's versions, by number. They outlive its deployment: a load that hangs does, too."""
        return self._generations.setdefault(name, {})

    def rebuild(self) -> None:
        """Recompute the targets of requests, after any change."""
        self._targets = {}
        self.shadow_of.clear()
        for name, deployment in self.deployments.items():
            shares = deployment.shares()
            shadow = deployment.versions.get(deployment.shadow)
            for version in deployment.versions.values():
                if version.servable:
                    self._targets[version.title] = version
            for version, _ in shares:
                if shadow is not None and shadow is not version and shadow.state == READY:
                    self.shadow_of[version] = shadow
            if shares:
                self._targets[name] = shares[0][0] if len(shares) == 1 else _Split(shares)
        if not self._configured_default:
            first = next(iter(self.deployments), "")
            self.default = next((name for name in self.deployments if name in self._targets), first)
        if self.default in self._targets:
            self._targets[""] = self._targets[self.default]
        self.before_change()
        self.on_change()

    def forget_evictions(self, known: Container[str]) -> None:
        """Forget how often versions that are not there any more were unloaded. Args: known: titles that stay."""
        titles = {version.title for _, version in self}
        for title in [title for title in self.evictions if title not in titles and title not in known]:
            del self.evictions[title]

    def needs(self) -> tuple[int, int]:
        """Most inputs that a version takes, and most axes that one of them has."""
        inputs = [version.model.inputs for _, version in self if version.servable and version.model is not None]
        ranks = [len(spec.shape) for specs in inputs for spec in specs]
        return max(map(len, inputs), default=0), max(ranks, default=0)

    def why_not(self, model: str) -> TensorNextError:
        """The reason why a request for a model cannot be served, when none can."""
        try:
            version = self.describe(model)[1]
        except TensorNextError as error:
            return error
        if version.state == FAILED and not version.loading:
            return FailedPrecondition(f"model {version.title!r} is not loaded: {version.error}")
        if version.loading:
            return Unavailable(f"model {version.title!r} is still being loaded", retry_after_s=LOADING_RETRY_S)
        return FailedPrecondition(f"model {version.title!r} is {version.state}; tnxctl models load {version.title}")
