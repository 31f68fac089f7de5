"""Sentences about exceptions of any kind."""

from __future__ import annotations

import io
import itertools

import pytest
import torch

from tnxctl.protocol.errors import FailedPrecondition
from tnxd.error_text import cause, first_line, sentence
from tnxd.models.formats import ignore_warnings_about_torch_itself


def raised(*chain: BaseException) -> BaseException:
    """An error that was raised from the next, and so on."""
    for error, why in itertools.pairwise(chain):
        error.__cause__ = why
    return chain[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError"),
        (FailedPrecondition("net/1: no"), "net/1: no"),
        (raised(ValueError("a"), KeyError("b"), OSError("c")), "ValueError: a: OSError: c"),
        (raised(ValueError("a: OSError: c"), OSError("c")), "ValueError: a: OSError: c"),
        (raised(ValueError("a"), FailedPrecondition("in words")), "ValueError: a: in words"),
        (ValueError("\ud800"), "ValueError: ?"),
    ],
)
def test_a_sentence_ends_with_the_cause(error: BaseException, said: str) -> None:
    assert sentence(error) == said


def test_a_cause_is_not_what_was_handled_meanwhile() -> None:
    error = ValueError("outer")
    error.__context__ = KeyError("inner")
    assert cause(error) == "ValueError: outer"


def test_causes_in_a_circle() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert "one" in sentence(one)


class Fails(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.sum() > 0, "positive numbers,\nplease"
        return x.view(3, -1)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.ones(4), "RuntimeError: shape '[3, -1]' is invalid for input of size 4"),
        (-torch.ones(3), "AssertionError: positive numbers, please"),
    ],
)
def test_the_end_of_a_torchscript_error(x: torch.Tensor, said: str) -> None:
    ignore_warnings_about_torch_itself()
    with pytest.raises(Exception, match="TorchScript interpreter") as caught:
        torch.jit.script(Fails())(x)
    assert sentence(caught.value) == said


def test_the_end_of_an_error_of_a_traced_module() -> None:
    ignore_warnings_about_torch_itself()
    traced = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="original code") as caught:
        torch.jit.load(io.BytesIO(traced.save_to_buffer()))(torch.zeros(1, 3))
    assert sentence(caught.value).startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")


OPERATOR = (
    "the operator mylib::twice is not registered: the library that has it belongs into imports of model.toml, as in "
    'imports = ["mylib"]'
)


@pytest.mark.parametrize(
    "text",
    [
        "\nUnknown builtin op: mylib::twice.\nCould not find any similar ops\n",
        "We failed to resolve torch.ops.mylib.twice.default to an operator. If it's a custom op",
        "'_OpNamespace' 'mylib' object has no attribute 'twice'",
        "No such operator mylib::twice",
    ],
)
def test_an_operator_that_is_missing_is_named(text: str) -> None:
    assert sentence(RuntimeError(text)) == OPERATOR


def test_torch_itself_says_so() -> None:
    with pytest.raises(AttributeError) as caught:
        torch.ops.mylib.twice  # noqa: B018
    assert sentence(caught.value) == OPERATOR


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_an_error_that_cannot_be_shown() -> None:
    assert first_line(Unprintable()) == "(its message cannot be shown)"
    assert (
        sentence(raised(ValueError("a"), Unprintable())) == "ValueError: a: Unprintable: (its message cannot be shown)"
    )


@pytest.mark.timeout(10)
def test_of_a_long_text_only_the_begin_and_the_end_are_searched() -> None:
    """It would hold the GIL for half a minute."""
    text = "a tensor: " + "0.5, " * 20_000_000
    assert sentence(RuntimeError(text)) == f"RuntimeError: {text[:200]}"
    assert sentence(RuntimeError(f"{text}\nUnknown builtin op: mylib::twice.")) == OPERATOR
