"""Several daemons: which of them a request goes to, and which are passed over for a while. No socket, no clock.

    Endpoints.choose(model, open, now)      the daemon for a request
    Endpoints.served(index, model, ...)     it has answered: how long it predicts requests to take
    Endpoints.refused(index, model, ...)    it has not: it is passed over for a while
    Endpoints.back_at(model, among)         when the first of some is asked again

A request goes where the fewest of this client's are outstanding, weighed by the time that the daemon last predicted for
one of that model: `predicted_us` of its results, which counts what waits there of all clients. A prediction counts at
once if it is worse than the last one, and in part if it is better; it fades in seconds, so that a daemon that was busy
once gets another try. That is the balancing of Finagle ("peak EWMA"), with the daemon's prediction in place of a
latency measured here. Where nothing tells two of them apart, chance does: many clients shall not all begin with the
first.

A daemon that refuses a request is passed over by others for the same model: for the time that it names, else for a
short one that doubles with each refusal in a row, with a random part. A daemon that cannot serve (it drains, starts,
is silent) is not asked at all in that time; when it is over, one request tries, and the others follow once that one was
served. One without room or without the model is merely the last choice, since its refusal costs little and there may
be no other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import random

from tnxctl.backoff import growing, spread

FIRST_PASS_S = 0.05
LAST_PASS_S = 1.0
"""Time for which a daemon is passed over: doubles from the first to the last with each refusal, until it serves."""

_FADES_IN_S = 2.0  # a prediction is worth a third of itself then
_WEIGHT = 0.3  # of a better prediction
_MAX_MODELS = 256  # for each daemon, of which something is known


class _Standing:
    """Standing of one model at one daemon.

    Attributes:
        wait_s: seconds that a request is predicted to take, as told at `told_at`; 0 while nothing was told.
        refusals: in a row. until: end of the time for which it is passed over.
        is_shut: whether it is not to be asked at all until then.
    """

    __slots__ = ("is_shut", "refusals", "told_at", "until", "wait_s")

    def __init__(self) -> None:
        self.wait_s = 0.0
        self.told_at = 0.0
        self.refusals = 0
        self.until = -math.inf
        self.is_shut = False

    def faded_s(self, now: float) -> float:
        """Seconds that the prediction still says; they fade with time."""
        return self.wait_s * math.exp((self.told_at - now) / _FADES_IN_S) if self.wait_s else 0.0


class Endpoints:
    """The standing of some daemons, by index."""

    def __init__(self, count: int) -> None:
        self._standings: list[dict[str, _Standing]] = [{} for _ in range(count)]

    def choose(self, model: str, among: Iterable[tuple[int, int]], now: float) -> int | None:
        """The daemon for a request to a model; None if none of these is to be asked now.

        Args:
            among: the index of each that may be chosen, and the number of requests outstanding there.
        """
        candidates = []
        for index, outstanding in among:
            standing = self._standings[index].get(model)
            passed_over = standing is not None and now < standing.until
            if standing is None:
                candidates.append((False, outstanding, 0.0, index))
            elif not (passed_over and standing.is_shut):
                candidates.append((passed_over, outstanding, standing.faded_s(now), index))
        if not candidates:
            return None
        unknown_s = min((wait_s for _, _, wait_s, _ in candidates if wait_s), default=1.0)
        index = min(candidates, key=lambda each: (each[0], (each[1] + 1) * (each[2] or unknown_s), random()))[3]
        standing = self._standings[index].get(model)
        if standing is not None and standing.is_shut:  # this request tries it, and the others wait for how that ends
            standing.until = now + self._pass_s(standing)
        return index

    def back_at(self, model: str, among: Iterable[int]) -> float:
        """Time at which the first of some daemons is asked again, if none of them may be asked now."""
        standings = (self._standings[index].get(model) for index in among)
        return min((standing.until for standing in standings if standing is not None), default=math.inf)

    def served(self, index: int, model: str, predicted_s: float, now: float) -> bool:
        """Note that a daemon has answered. Returns whether it had not been asked at all before that.

        Args:
            predicted_s: seconds that the request took by the daemon's prediction when it came; 0: it made none.
        """
        standing = self._standing(index, model)
        was_shut = standing.is_shut
        standing.refusals, standing.until, standing.is_shut = 0, -math.inf, False
        if predicted_s > 0:
            wait_s = standing.faded_s(now)
            standing.wait_s = predicted_s if predicted_s > wait_s else wait_s + _WEIGHT * (predicted_s - wait_s)
            standing.told_at = now
        return was_shut

    def refused(self, index: int, model: str, retry_after_s: float | None, now: float, *, shut: bool) -> None:
        """Note that a daemon has refused a request, or did not answer in time.

        Args:
            retry_after_s: seconds that it has named, if any.
            shut: whether it serves nobody now, for this model.
        """
        standing = self._standing(index, model)
        standing.refusals += 1
        standing.is_shut = shut
        standing.until = now + self._pass_s(standing, retry_after_s or 0.0)

    def _standing(self, index: int, model: str) -> _Standing:
        standings = self._standings[index]
        standing = standings.get(model)
        if standing is None:
            if len(standings) >= _MAX_MODELS:
                del standings[next(iter(standings))]
            standing = standings[model] = _Standing()
        return standing

    def _pass_s(self, standing: _Standing, at_least_s: float = 0.0) -> float:
        return spread(max(growing(FIRST_PASS_S, LAST_PASS_S, standing.refusals), at_least_s))
