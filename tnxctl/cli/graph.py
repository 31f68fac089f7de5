"""The graph of a pipeline, drawn in plain text.

A line for each input, step and output. What a line gives goes down in its own column, to those that take it:

    ○ x
    ├─● left
    ╰─│─● right
      ╰─┴─● join
          ╰─○ y
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from tnxctl.cli import text

if TYPE_CHECKING:
    from tnxctl.protocol.wire import ModelInfo, PipelineInfo, PipelineStep

_PLAIN = str.maketrans("○●│─├╰┼┴", "o*|-|`++")
"""What stands for the lines where the output knows no others."""

_END, _STEP = "○", "●"


def lines(info: ModelInfo, pipeline: PipelineInfo, width: int | None) -> Iterator[str]:
    """The graph of a pipeline: its lines, with the model of each step and what feeds it.

    Args:
        width: of the terminal; None: lines may have any length.
    """
    nodes: list[tuple[str, str, list[str], str, str]] = []  # name, mark, who feeds it, and two columns in words
    nodes += [(spec.name, _END, [], f"{spec.datatype} {text.shape(spec.shape)}", "") for spec in info.inputs]
    for step in _ordered(pipeline):
        fed = ", ".join(f"{name} = {source}" for name, source in step.inputs.items())
        nodes.append((step.name, _STEP, [_step(source) for source in step.inputs.values()], step.model, fed))
    specs = {spec.name: spec for spec in info.outputs}
    for name, source in pipeline.outputs.items():
        what = f"{specs[name].datatype} {text.shape(specs[name].shape)}" if name in specs else ""
        nodes.append((name, _END, [_step(source)], what, source))
    # An output may be called like a step, and nothing takes anything from it.
    ends = len(nodes) - len(pipeline.outputs)
    drawn = _drawn([("" if at >= ends else name, mark, fed) for at, (name, mark, fed, _, _) in enumerate(nodes)])
    rows = [(f"{line} {name}", what, fed) for line, (name, _, _, what, fed) in zip(drawn, nodes, strict=True)]
    table = [click.unstyle(line) for line in text.table(("", "", ""), rows, "<<<", width)[1:]]
    plain = not _encodable("".join(table))
    yield from (line.translate(_PLAIN) if plain else line for line in table)


def _step(source: str) -> str:
    """The step, or the input, that a source is about."""
    return source.partition(".")[0]


def _ordered(pipeline: PipelineInfo) -> Sequence[PipelineStep]:
    """Steps, each below those that feed it, else in the order of the description."""
    left = list(pipeline.steps)
    order: list[PipelineStep] = []
    while left:
        waiting = {step.name for step in left}
        ready = (step for step in left if waiting.isdisjoint(_step(source) for source in step.inputs.values()))
        order.append(next(ready, left[0]))  # a daemon tells no circles
        left.remove(order[-1])
    return order


def _drawn(nodes: Sequence[tuple[str, str, Sequence[str]]]) -> Iterator[str]:
    """The lines before the names.

    Args:
        nodes: name, mark, and those above that feed each. What feeds none has the name "".
    """
    last_use = {name: index for index, (_, _, before) in enumerate(nodes) for name in before}
    columns: list[str] = []  # the node whose line goes down in each; "": none
    for index, (name, mark, before) in enumerate(nodes):
        while columns and not columns[-1]:
            columns.pop()
        at = len(columns)
        cells = []
        joined = False
        for column in columns:
            if column in before:
                ends = last_use[column] == index
                cells.append(("┴" if joined else "╰") if ends else ("┼" if joined else "├"))
                joined = True
            elif column:
                cells.append("│")  # what is taken further left goes by
            else:
                cells.append("─" if joined else " ")
            cells.append("─" if joined else " ")
        yield "".join([*cells, mark])
        columns = [column if last_use.get(column, -1) > index else "" for column in columns]
        columns[at:] = [name] if last_use.get(name, -1) > index else []


def _encodable(line: str) -> bool:
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
