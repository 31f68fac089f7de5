"""Indices of exported programs: within their bounds, whatever comes, and said when they were not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.models.formats.indices import keep_within


class Looks(torch.nn.Module):
    """Calls a function with tables, x [rows, 2] and indices [rows, length]."""

    def __init__(self, look: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.look = look
        self.register_buffer("table", torch.arange(20.0).reshape(5, 4))
        self.register_buffer("places", torch.tensor([0, 4]))

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.look(self, x, k),)


def exported(look: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> ExportedProgram:
    rows, length = Dim("rows", min=1, max=16), Dim.AUTO
    return torch.export.export(
        Looks(look).eval(),
        (torch.zeros(2, 6), torch.zeros(2, 3, dtype=torch.int64)),
        dynamic_shapes=({0: rows}, {0: rows, 1: length}),
        strict=False,
    )


def ran(program: ExportedProgram, *k: int) -> tuple[torch.Tensor, ...]:
    """Outputs of the graph for one row."""
    held = {**program.state_dict, **program.constants}
    own = [held[spec.target] for spec in program.graph_signature.input_specs if spec.target is not None]
    found: tuple[torch.Tensor, ...] = program.graph_module(*own, torch.arange(6.0)[None], torch.tensor([k]))
    return found


@pytest.mark.parametrize(
    ("look", "last", "from_end"),
    [
        (lambda net, x, k: torch.nn.functional.embedding(k, net.table), 4, 0),
        (lambda net, x, k: net.table[k], 4, -5),
        (lambda net, x, k: net.table.index_select(0, k[:, 0]), 4, 0),
        (lambda net, x, k: x.gather(1, k), 5, 0),
        (lambda net, x, k: torch.nn.functional.one_hot(k, 7), 6, 0),
        (lambda net, x, k: torch.zeros_like(x).scatter_(1, k, 1.0), 5, 0),
        (lambda net, x, k: x[torch.arange(x.shape[0]), k[:, 0]], 5, -6),
    ],
)
def test_an_index_out_of_range_is_said_and_all_others_are_as_before(look: Any, last: int, from_end: int) -> None:
    program = exported(look)
    assert keep_within(program)
    for index in (0, last, from_end):
        expected = look(Looks(look), torch.arange(6.0)[None], torch.tensor([[index, 0, 0, 0]]))
        found, whole = ran(program, index, 0, 0, 0)
        assert whole
        torch.testing.assert_close(found, expected)
    for index in (last + 1, from_end - 1, 2**62, -(2**63)):
        assert not ran(program, index, 0, 0, 0)[-1]


def test_a_place_that_a_long_request_alone_leads_to_is_held_too() -> None:
    program = exported(lambda net, x, k: net.table[torch.arange(k.shape[1]) * 2])
    assert keep_within(program)
    assert ran(program, 0, 0, 0)[-1]
    assert not ran(program, 0, 0, 0, 0)[-1]


def test_what_no_request_can_change_costs_nothing() -> None:
    program = exported(lambda net, x, k: net.table[net.places].sum() + x + k.sum())
    before = len(program.graph_module.graph.nodes)
    assert not keep_within(program)
    assert len(program.graph_module.graph.nodes) == before


@pytest.mark.parametrize(
    ("look", "why"),
    [
        (lambda net, x, k: net.table.take(k), "it uses take"),
        (
            lambda net, x, k: net.table[:2].repeat_interleave(net.places + 1, 0, output_size=6),
            "it uses repeat_interleave",
        ),
        (lambda net, x, k: torch.div(k, k - 5, rounding_mode="trunc"), "a division by 0"),
        (lambda net, x, k: k // (k - 5), "a division by 0"),
        (lambda net, x, k: 7 % k, "a division by 0"),
        (lambda net, x, k: torch.fmod(k, k - 5), "a division by 0"),
        (lambda net, x, k: torch.cond(x.sum() > 1, lambda z: z // (z - 5), torch.neg, (k,)), "a division by 0"),
        (lambda net, x, k: x * (7 // (k.shape[1] - 1)), "a division by 0"),
        (lambda net, x, k: x[:, k[0, 0].item()], "by a number in a tensor"),
        (lambda net, x, k: torch.select_scatter(x, x[:, 0], 1, k[0, 0].item()), "by a number in a tensor"),
        (lambda net, x, k: x.as_strided((2,), (1,), k[0, 0].item()), "by a number in a tensor"),
        (lambda net, x, k: torch.cond(x.sum() > 1, lambda z: z.gather(1, z.long()), torch.sin, (x,)), "in a branch"),
    ],
)
def test_an_operator_of_which_nobody_would_notice_bad_values_is_refused(look: Any, why: str) -> None:
    with pytest.raises(FailedPrecondition, match=why):
        keep_within(exported(look))


def test_the_same_operator_without_indices_is_taken() -> None:
    assert not keep_within(exported(lambda net, x, k: x.repeat_interleave(2, 1) + k.sum()))


def divides(net: Any, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """By a number, and fractions."""
    third = torch.div(k, 3, rounding_mode="trunc") + k // 5 + k % 7 + 100 // k.shape[1] + x[:, k.shape[1] - 2, None]
    return third + torch.div(x[:, :1], x[:, 1:2], rounding_mode="trunc") + k / (k - 5) + x[:, :1] // x[:, 1:2]


def test_divisions_that_no_0_ends_are_taken() -> None:
    assert not keep_within(exported(divides))
