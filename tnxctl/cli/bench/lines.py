"""Steps of a benchmark as text for people, and as a document for machines."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tnxctl.cli import exits, text
from tnxctl.cli.bench.recording import PERCENTILES, UNSENT, Step, grown
from tnxctl.durations import spell
from tnxctl.protocol.errors import DeadlineExceeded, TensorNextError, from_code

if TYPE_CHECKING:
    from tnxctl.cli.bench.runs import Search
    from tnxctl.results import Result

_HEADER = (
    "LOAD",
    "REQUESTS",
    "RESULTS/s",
    "P50 ms",
    "P90 ms",
    "P99 ms",
    "P99.9 ms",
    "MAX ms",
    "LATE ms",
    "ROWS",
    "CLIENT µs",
    "ERRORS",
)
_ALIGN = "<" + ">" * (len(_HEADER) - 2) + "<"
_WIDTHS = [max(len(name), least) for name, least in zip(_HEADER, (14, 8, 9, 8, 8, 8, 8, 8, 7, 5, 9, 6), strict=True)]
_OWN = (UNSENT, "LOST")  # no codes of the daemon's
_MUCH = 0.5  # of the p99: a client that sends so late is part of what is measured


class Table:
    """The table of steps, line by line as they come.

    Args:
        search: whose bound has a column; None: of a sweep.
    """

    def __init__(self, search: Search | None) -> None:
        self._search = search
        self._header, self._widths, self._align = list(_HEADER), list(_WIDTHS), _ALIGN
        if search is not None:
            self._header.insert(-1, f"UNDER {spell(search.bound_us / 1e6)}")
            self._widths.insert(-1, len(self._header[-2]))
            self._align = f"{_ALIGN[:-1]}>{_ALIGN[-1]}"

    def head(self) -> str:
        return text.heading(text.line(text.pad(self._header, self._widths, self._align)))

    def row(self, step: Step) -> str:
        """The line of a step."""
        cells = [
            step.load.title,
            str(step.requests),
            f"{step.results_per_s:.1f}",
            *(_ms(step.latency_us.get(name)) for name in PERCENTILES),
            _ms(step.late_us.get("p99")),
            f"{step.rows:.1f}",
            f"{step.client_cpu_us:.1f}",
            errors_text(step.errors) or "-",
        ]
        if self._search is not None:
            cells.insert(-1, "yes" if self._search.keeps(step) else "no")
        return text.line(text.pad(cells, self._widths, self._align))


def heading(probe: Result, seconds: float, warm_up: float, about: str) -> str:
    """The line above the table: model, place and settings of the measurement."""
    model = text.clean(f"{probe.model} version {probe.version} on {probe.device}")
    warmed = f" after {spell(warm_up)} of warm-up" if warm_up else ""
    return f"{model}, {about}; {spell(seconds)} for each line{warmed}"


def errors_text(errors: Counter[str]) -> str:
    return ", ".join(f"{text.clean(code)} {count}" for code, count in errors.most_common())


def stages(steps: Sequence[Step]) -> Iterator[str]:
    """A table of where the time goes, and which stage grew against the first step."""
    shown = [step for step in steps if step.stages_us]
    if not shown:
        return
    names = list(shown[0].stages_us)
    rows = []
    for step in shown:
        growth = grown(step, shown[0])
        most = "-" if growth is None else f"{growth[0]} +{growth[1]:.0f}"
        rows.append((step.load.title, *(f"{step.stages_us[name]:.1f}" for name in names), most))
    header = ("MEAN µs", *(name.upper() for name in names), "GREW MOST")
    yield ""
    yield from text.table(header, rows, "<" + ">" * len(names) + "<", text.terminal_width(sys.stdout))


def remarks(steps: Sequence[Step]) -> Iterator[str]:
    """Remarks on the numbers: messages of errors, and where the client was the limit."""
    messages = {code: message for step in steps for code, message in step.messages.items()}
    for code, message in messages.items():
        yield f"{text.clean(code)}: {text.clean(message)}"
    late = list(dict.fromkeys(step.load.title for step in steps if is_client_bound(step)))
    if late:
        yield (
            f"At {', '.join(late)} this client sent late, or not at all: part of the figures there is its own doing, "
            f"or that of other programs on its machine"
        )


def is_client_bound(step: Step) -> bool:
    """Whether the client limited what was measured, rather than the daemon."""
    late, p99 = step.late_us.get("p99"), step.latency_us.get("p99")
    return UNSENT in step.errors or (late is not None and p99 is not None and late > _MUCH * p99)


def answer(search: Search) -> str:
    """The result of a search, as a sentence."""
    bound = spell(search.bound_us / 1e6)
    so_far = "" if search.over else " so far"
    if search.best is None:
        lowest = "" if search.too_high is None else f": {search.too_high:g}/s is too high"
        return f"No rate was found whose p99 stays under {bound}{so_far}{lowest}"
    step = search.best
    above = "no higher one was tried" if search.too_high is None else f"{search.too_high:g}/s is too high"
    return f"{step.load.rate:g}/s is the highest rate{so_far} whose p99 stays under {bound}; {above}"


def shortfall(steps: Sequence[Step], end: BaseException | None, expected: bool) -> str:
    """One sentence for standard error about a run that did not go as planned; "" if it did.

    Args:
        expected: whether errors belong to what is measured, as in a search.
    """
    requests, errors = sum(step.requests for step in steps), sum((step.errors for step in steps), Counter[str]())
    failures = f"{errors.total()} of {requests} requests failed: {errors_text(errors)}" if errors else ""
    unknown = sum(step.unknown for step in steps)
    if unknown:
        failures = f"{failures or 'no request failed'}; of {unknown} under way the outcome is not known"
    if isinstance(end, KeyboardInterrupt):
        how = "terminated" if exits.of_interrupt(end) is exits.Exit.TERMINATED else "interrupted"
        return f"{how} after {requests} requests; {failures or 'no request failed'}"
    if end is not None:
        return str(end)
    return "" if expected else failures


def exit_code(steps: Sequence[Step], end: BaseException | None, expected: bool) -> exits.Exit:
    """The exit code of a run; see `shortfall`."""
    if isinstance(end, KeyboardInterrupt):
        return exits.of_interrupt(end)
    if isinstance(end, TensorNextError):
        return exits.of_error(end)
    codes = {code for step in steps for code in step.errors}
    failures = [DeadlineExceeded("") if code in _OWN else from_code(code, "") for code in codes]
    return exits.Exit.OK if expected else exits.of_run(sum(step.answered for step in steps), failures)


def document(
    probe: Result, settings: dict[str, Any], steps: Sequence[Step], end: BaseException | None, search: Search | None
) -> dict[str, Any]:
    """The run for --json. Names of times and rates end in their units; infinite ones are null."""
    found: dict[str, Any] = {
        "model": probe.model,
        "version": probe.version,
        "settings": settings,
        **steps_document(steps, end),
    }
    if search is not None:
        found["search"] = {
            "p99_under_us": search.bound_us,
            "finished": search.over,
            "rate_per_s": None if search.best is None else search.best.load.rate,
            "too_high_per_s": search.too_high,
        }
    return found


def steps_document(steps: Sequence[Step], end: BaseException | None) -> dict[str, Any]:
    """Steps for --json, and what ended them."""
    found: dict[str, Any] = {
        "interrupted": isinstance(end, KeyboardInterrupt),
        "steps": [_step_document(step, steps[0]) for step in steps],
    }
    if isinstance(end, TensorNextError):
        found["error"] = {"code": end.code, "message": end.message, "exit_code": exits.of_error(end)}
    return found


def _step_document(step: Step, first: Step) -> dict[str, Any]:
    growth = grown(step, first)
    return {
        "name": step.load.title,
        "concurrency": step.load.concurrency or None,
        "rate_per_s": step.load.rate or None,
        "requests": step.requests,
        "answered": step.answered,
        "failed": step.failed,
        "unknown": step.unknown,
        "errors": [
            {"code": code, "count": count, "message": step.messages[code]} for code, count in step.errors.most_common()
        ],
        "devices": dict(step.devices),
        "seconds": step.seconds,
        "results_per_s": step.results_per_s,
        "latency_us": step.latency_us,
        "p99_of_all_us": step.p99_of_all_us,
        "late_us": step.late_us,
        "client_is_limit": is_client_bound(step),
        "batch_size_mean": step.rows,
        "stage_means_us": step.stages_us,
        "grew_most": None if growth is None else {"stage": growth[0], "by_us": growth[1]},
        "client_cpu_us": step.client_cpu_us,
    }


def _ms(micros: float | None) -> str:
    return "-" if micros is None else f"{micros / 1e3:.3f}"
