"""docs/metrics.md and docs/grafana.json against the metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tnxctl.bridge.metrics import METRICS
from tnxctl.bridge.triton_metrics import TRITON_METRICS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "metrics.md").read_text()
BOARD = json.loads((DOCS / "grafana.json").read_text())

KNOWN = {metric.name: metric for metric in (*METRICS, *TRITON_METRICS)}
OF_PROMETHEUS = {"le", "instance", "job"}
"""Labels that Prometheus adds, and that histograms have."""


def board_queries() -> Iterator[str]:
    for panel in BOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["expr"] for each in BOARD["annotations"]["list"])


def board_variables() -> Iterator[str]:
    """Queries of which the board takes the values of a label."""
    for each in BOARD["templating"]["list"]:
        yield from re.findall(r"^label_values\((.*), \w+\)$", each.get("definition", ""))


def page_queries() -> Iterator[str]:
    yield from re.findall(r"\| [^|]* \| `([^`|]*\(.*)` \|", PAGE)
    rules = PAGE[PAGE.index("groups:") :]
    yield from re.findall(r"expr: (?:>\n)?(.*?)\n +(?:for|annotations):", rules, re.DOTALL)


def unknown(query: str) -> set[str]:
    """Metrics of a query that there are not, and labels that none of its metrics has."""
    metrics = set()
    wrong = set()
    for name in re.findall(r"\b(?:tnx|nv)_\w+", query):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        if base in KNOWN and KNOWN[base].kind == "histogram" and base != name:
            metrics.add(base)
        elif name in KNOWN and KNOWN[name].kind != "histogram":
            metrics.add(name)
        elif name != "tnx_up":
            wrong.add(name)
    labels = OF_PROMETHEUS.union(*(KNOWN[name].labels for name in metrics))
    asked = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r", *", group)}
    asked |= set(re.findall(r"(\w+) *(?:=~|!~|!=|=)\"", query))
    return wrong | (asked - labels)


def test_the_table_has_every_metric() -> None:
    rows = [f"| `{each.name}` | {each.kind} | {', '.join(each.labels)} | {each.help} |" for each in KNOWN.values()]
    assert [line for line in PAGE.splitlines() if re.match(r"\| `(tnx|nv)_\w+` \|", line)] == [
        "| `tnx_up` | gauge |  | Whether the daemon answers. |",
        *rows,
    ]


@pytest.mark.parametrize("query", [*board_queries(), *board_variables(), *page_queries()])
def test_a_query_asks_for_what_there_is(query: str) -> None:
    assert unknown(query) == set()


def test_queries_were_found() -> None:
    assert len([*board_queries()]) > 40
    assert len([*board_variables()]) == 2
    assert len([*page_queries()]) == 7 + PAGE.count("- alert:")


@pytest.mark.parametrize("query", ["rate(tnx_gone_total[5m])", "sum by (code) (tnx_rows_total)", "tnx_batch_rows"])
def test_a_wrong_query_is_found(query: str) -> None:
    assert unknown(query)


def test_counters_are_asked_for_their_rate() -> None:
    """And gauges are not: a rate of one says nothing."""
    for query in (*board_queries(), *page_queries()):
        for name, range_ in re.findall(r"\b(tnx_\w+)(?:\{[^}]*\})?(\[)?", query):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            if base in KNOWN and base != "tnx_start_time_seconds":
                assert bool(range_) == (KNOWN[base].kind != "gauge"), query


def test_the_board_shows_all_that_a_daemon_loses() -> None:
    named = "abandoned|cut|dropped|refused|undeliverable"
    lost = {each.name for each in METRICS if re.search(named, each.name) and not each.labels}
    assert len(lost) == 6
    assert lost == set(re.findall("|".join(lost), " ".join(board_queries())))


def test_the_board_has_room_for_its_panels() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_board_takes_the_data_source_that_is_chosen() -> None:
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(BOARD["panels"]))
    assert {*sources} == {"${datasource}"}
