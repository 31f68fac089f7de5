"""Events of the code against the table in docs/operations.md: names, fields, and that each line of the log has one."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tnxd.process.json_format import FOREIGN

ROOT = Path(__file__).parent.parent

SOURCES = {path: path.read_text() for path in sorted((ROOT / "tnxd").rglob("*.py"))}

LOGGERS = ("log", "audit")

METHODS = ("debug", "info", "warning", "error", "exception")

OF_ALL = {"time", "level", "event", "message", "logger", "traceback"}
"""Fields that lines of any event may have."""


@dataclass(frozen=True)
class Named:
    """Event that a call names. Attributes: fields: those that stand there. open: whether it may have others."""

    name: str
    fields: frozenset[str]
    open: bool


def documented() -> dict[str, set[str]]:
    """Fields of each event of the table, by name."""
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition("\n### Events\n")[2].partition("\n#")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    return {name.strip(" `"): set(re.findall(r"`(\w+)`", fields)) for name, fields in rows}


def named_events(source: str) -> Iterator[Named]:
    """Events that a source names."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ("event", "machine_event") and node.args and not isinstance(node.args[0], ast.Name):
            first = node.args[0]
            names = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            fields = {keyword.arg for keyword in node.keywords if keyword.arg and keyword.arg != "message"}
            fields |= {"model", "version"} if len(node.args) > 1 else set()
            others = any(keyword.arg is None for keyword in node.keywords)
            for name in names:
                assert isinstance(name, ast.Constant), (
                    f"{ast.unparse(node)}: an event has a name that can be looked for"
                )
                yield Named(name.value, frozenset(fields), others)


def nameless(source: str) -> list[str]:
    """Lines of the log that name no event."""
    return [
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in LOGGERS
        and node.func.attr in METHODS
        and "extra" not in {keyword.arg for keyword in node.keywords}
    ]


@functools.cache  # by a test, and not as this file is imported: each of several processes imports it
def found_events() -> tuple[Named, ...]:
    """Events that the sources name."""
    return tuple(found for source in SOURCES.values() for found in named_events(source))


def test_table_has_the_events_of_the_code_and_no_others() -> None:
    assert documented().keys() == {found.name for found in found_events()} | {FOREIGN}


def test_table_has_the_fields_of_each_event() -> None:
    table = documented()
    for name in {found.name for found in found_events()}:
        calls = [found for found in found_events() if found.name == name]
        fields = set().union(*(found.fields for found in calls))
        assert fields <= table[name], name
        assert fields == table[name] or any(found.open for found in calls), name
        assert not fields & OF_ALL, name


def test_each_line_of_the_log_names_its_event() -> None:
    found = {str(path.relative_to(ROOT)): nameless(source) for path, source in SOURCES.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_names_are_in_snake_case() -> None:
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", found.name) for found in found_events())


def test_planted_lines_are_found() -> None:
    assert nameless('log.info("%s", name)') == ["log.info('%s', name)"]
    assert [*named_events('log.info("x", extra=event("a_b", title, count=3))')] == [
        Named("a_b", frozenset({"model", "version", "count"}), open=False)
    ]
