"""Models and their versions as lines of text: a table of all, and the details of one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import click

from tnxctl.cli import graph, metadata, text

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ModelInfo

_STATES = {
    "pure": "none: nothing that it holds changes",
    "scratch": "none: what a request writes is gone before the next",
    "shared": "shared by all requests, which run one at a time",
}
"""State that a version keeps from one request to the next, see `tnxctl.protocol.wire.ModelInfo`."""


def table(infos: Sequence[ModelInfo], width: int | None) -> list[str]:
    """A line for each version and for each further tensor; on a narrow terminal, tensors are on lines of their own."""
    rows = []
    for info in infos:
        first, last = _state(info), (text.memory(info.memory_mb), text.traffic(info))
        tensors = list(zip_longest(map(text.tensor, info.inputs), map(text.tensor, info.outputs), fillvalue=""))
        rows.append((*first, *(tensors[0] if tensors else ("", "")), *last))
        rows.extend(("", "", "", "", *more, "", "") for more in tensors[1:])
    header = ("NAME", "VERSION", "STATE", "DEVICES", "INPUTS", "OUTPUTS", "MEMORY", "TRAFFIC")
    lines = text.table(header, rows, "<<<<<<>>", None)
    if width is None or max(len(click.unstyle(line)) for line in lines) <= width:
        return lines
    return _folded(infos, width)


def _folded(infos: Sequence[ModelInfo], width: int) -> list[str]:
    rows = [(*_state(info), text.memory(info.memory_mb), text.traffic(info)) for info in infos]
    header = ("NAME", "VERSION", "STATE", "DEVICES", "MEMORY", "TRAFFIC")
    head, *body = text.table(header, rows, "<<<<>>", width, ("DEVICES", "NAME"))
    lines = [head, text.heading("  INPUTS -> OUTPUTS")]
    for line, info in zip(body, infos, strict=True):
        lines.append(line)
        if info.inputs or info.outputs:
            inputs, outputs = (", ".join(map(text.tensor, specs)) for specs in (info.inputs, info.outputs))
            lines.append(text.shorten(text.clean(f"  {inputs} -> {outputs}"), width))
    return lines


def _state(info: ModelInfo) -> tuple[str, str, str, str]:
    name = f"{info.name} (default)" if info.default else info.name
    return name, info.version, info.status, ",".join(info.devices) or "-"


def details(info: ModelInfo, others: Sequence[ModelInfo]) -> Iterator[str]:
    """Details of a version. Args: others: the other versions of its model."""
    yield metadata.state(info)
    yield from text.remarks([info])
    settings = {
        "format": text.clean(info.format),
        "traffic": text.traffic(info),
        "memory": text.memory(info.memory_mb) + (" on each device" if info.memory_mb and len(info.devices) > 1 else ""),
        "requests": str(info.requests),
        "state": _state_in_words(info),
        "audit": f"{info.audited} computed again, {info.audit_differences} differed" if info.audited else "",
        "loading": f"took {text.duration(info.load_s)}" if info.load_s else "",
        "versions": ", ".join(f"{text.title(other)} {text.clean(other.status)}" for other in others),
    }
    yield from (f"{key:10}{value}" for key, value in settings.items() if value)
    yield ""
    if info.pipeline:
        yield from graph.lines(info, info.pipeline, text.terminal_width(sys.stdout))
        yield ""
    yield from metadata.signature(info)


def _state_in_words(info: ModelInfo) -> str:
    if info.format == "python" and info.state == "pure":  # nobody looks into the objects of a model.py
        return "none that shows: no answer depends on earlier requests"
    return _STATES.get(info.state, text.clean(info.state))
