"""Graphs of pipelines in plain text."""

from __future__ import annotations

import textwrap

import pytest

from tnxctl.cli import graph
from tnxctl.protocol.wire import ModelInfo, PipelineInfo, PipelineStep, TensorSpec


def drawn(inputs: str, steps: str, outputs: str) -> str:
    """The graph without what is said beside it. Args: steps, outputs: "NAME<SOURCE,SOURCE ..."."""
    pipeline = PipelineInfo(
        steps=tuple(
            PipelineStep(name=name, model="MODEL", inputs={f"in{at}": each for at, each in enumerate(fed.split(","))})
            for name, _, fed in (part.partition("<") for part in steps.split())
        ),
        outputs={name: source for name, _, source in (part.partition("<") for part in outputs.split())},
    )
    taken = tuple(TensorSpec(name, "MODEL", ()) for name in inputs.split())
    given = tuple(TensorSpec(name, "MODEL", ()) for name in pipeline.outputs)
    info = ModelInfo(name="pipe", version="1", status="ready", inputs=taken, outputs=given)
    return "\n".join(line[: line.index("MODEL")].rstrip() for line in graph.lines(info, pipeline, None))


def picture(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


GRAPHS = {
    "row": (
        ("x", "a<x b<a.y c<b.y", "y<c.y"),
        """
        ○ x
        ╰─● a
          ╰─● b
            ╰─● c
              ╰─○ y
        """,
    ),
    "diamond, with an output that is called like a step": (
        ("x", "left<x right<x join<left.y,right.y", "sum<join.sum left<left.y"),
        """
        ○ x
        ├─● left
        ╰─│─● right
          ├─┴─● join
          │   ╰─○ sum
          ╰─○ left
        """,
    ),
    "several inputs, in any order": (
        ("x z", "join<a.y,z a<x b<join.y,x", "p<join.y q<b.y"),
        """
        ○ x
        │ ○ z
        ├─│─● a
        │ ╰─┴─● join
        ╰─────┼─● b
              ╰─│─○ p
                ╰─○ q
        """,
    ),
    "a step that takes two things of another": (
        ("text", "tokenize<text encode<tokenize.ids,tokenize.mask", "e<encode.e"),
        """
        ○ text
        ╰─● tokenize
          ╰─● encode
            ╰─○ e
        """,
    ),
}


@pytest.fixture(autouse=True)
def _unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output that takes every character."""
    monkeypatch.setattr(graph, "_encodable", lambda line: True)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph(name: str) -> None:
    arguments, expected = GRAPHS[name]
    assert drawn(*arguments) == picture(expected)


def test_a_graph_where_the_output_knows_no_such_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_encodable", lambda line: line.isascii())
    assert drawn("x", "left<x right<x join<left.y,right.y", "left<left.y sum<join.sum") == picture(
        """
        o x
        |-* left
        `-|-* right
          |-+-* join
          `---|-o left
              `-o sum
        """
    )
