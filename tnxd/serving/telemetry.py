"""Counts what the daemon did. Written by the serving thread alone."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from tnxctl.protocol.histograms import Histogram
from tnxctl.protocol.wire import MODEL_NAME, excerpt
from tnxd.serving.histogram_counts import HistogramCounts, as_array

TOLD_EVERY_S = 10.0
"""Errors are told in the log no more often than this."""

# Turns that become a histogram at a time, if nobody asks before. Some 40 microseconds, and most of them whatever the
# number: with each look at the connections, that showed in the 99th percentile.
_TURNS = 2048

_MOST_KINDS = 1000
_MOST_NAMES = 5
_TITLE_MARKS = str.maketrans("#", "@")


class Telemetry:
    """Totals since the start.

    Attributes:
        requests: predict requests, and other messages that were refused. replies: results sent.
        resent: predict requests that had been sent before, as their headers say.
        errors: error replies by code. untold: those that the log has not told yet, by code and model.
        told: fields of what `tell_errors` has put into words last, for the log.
        abandoned: requests taken out of the queue because their client was gone.
        started: when it was, in seconds since 1970.
        turns_s: seconds that the last turns of the serving loop took, of which `fold_turns` makes a histogram.
    """

    def __init__(self) -> None:
        self.started = time.time()
        self._started = time.monotonic()
        self.requests = 0
        self.replies = 0
        self.resent = 0
        self.errors: Counter[str] = Counter()
        self.untold: Counter[tuple[str, str]] = Counter()
        self.told: dict[str, Any] = {}
        self.abandoned = 0
        self._counted_from = self._started
        self._told_at = -TOLD_EVERY_S
        self.turns_s: list[float] = []
        self._turn_counts = HistogramCounts(1)

    def count_error(self, code: str, model: str) -> None:
        """An error was sent. Args: model: its name, title or key, or whatever a client called it; "": none."""
        self.errors[code] += 1
        kind = (code, model)
        if kind not in self.untold and len(self.untold) >= _MOST_KINDS:
            kind = (code, "")  # clients choose names
        self.untold[kind] += 1

    def tell_errors(self, now: float, *, at_once: bool = False) -> str:
        """Words for the errors since they were last told; "" if there are none, or it is too early to tell.

        Args:
            now: by the monotonic clock. at_once: there will be no later.
        """
        if not self.untold:
            self._counted_from = now
            return ""
        if now - self._told_at < TOLD_EVERY_S and not at_once:
            return ""
        codes: dict[str, Counter[str]] = {}
        for (code, model), count in self.untold.items():
            codes.setdefault(code, Counter())[model.translate(_TITLE_MARKS).partition("@")[0]] += count
        told = "; ".join(f"{code} {names.total()}{_by_model(names)}" for code, names in sorted(codes.items()))
        seconds = max(now - self._counted_from, 0.0)
        self.told = {"seconds": round(seconds, 3), "codes": {code: names.total() for code, names in codes.items()}}
        self.untold.clear()
        self._told_at = self._counted_from = now
        return f"errors sent within {seconds:.1f} s: {told}"

    def fold_turns(self, at_least: int = _TURNS) -> None:
        """Put the turns that have gathered into the histogram, if they are so many. To be called at times."""
        if len(self.turns_s) >= at_least:
            self._turn_counts.add(as_array(self.turns_s, 1) * 1e6)
            self.turns_s.clear()

    def turns(self) -> Histogram:
        """Turns of the serving loop, by their length in microseconds."""
        self.fold_turns(1)
        return self._turn_counts.histogram(0)

    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started


def _by_model(names: Counter[str]) -> str:
    """The counts of the models that have most, in parentheses. What names none is only in the total."""
    named = Counter({name: count for name, count in names.items() if name})
    told = [
        f"{name if MODEL_NAME.fullmatch(name) else excerpt(name)} {count}"
        for name, count in named.most_common(_MOST_NAMES)
    ]
    rest = named.total() - sum(count for _, count in named.most_common(_MOST_NAMES))
    return f" ({', '.join([*told, *([f'others {rest}'] if rest else [])])})" if told else ""
