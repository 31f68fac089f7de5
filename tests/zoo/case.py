"""Declarations: a network, what it is asked, and what has to become of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

NETWORKS = Path(__file__).parent / "networks"

BATCHED = "batched"
"""Served, and requests share forwards."""
UNBATCHED = "unbatched"
"""Served one request at a time, with a note that says why."""
REFUSED = "refused"
"""Not served, with a sentence that names what is wrong."""
CAUGHT = "caught"
"""Served, and what is wrong with it was found while it was."""

PT2, CORE, SCRIPT, FACTORY, ONNX = "pt2", "core", "script", "factory", "onnx"
"""Formats: a plain export, one after run_decompositions, TorchScript, safetensors and a factory, ONNX."""
PROGRAMS = (PT2, CORE)
TORCH = (PT2, CORE, SCRIPT, FACTORY)
EVERY = (*TORCH, ONNX)

Sizes = Mapping[str, int]
Draw = Callable[[tuple[int, ...], torch.Generator, Sizes], torch.Tensor]


# --- values --------------------------------------------------------------------------------------------------


def normal(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def positive(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    return torch.rand(shape, generator=generator) + 0.5


def spiky(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """Normal values; in one of eight requests, the first is 1000."""
    x = torch.randn(shape, generator=generator)
    if int(torch.randint(0, 8, (), generator=generator)) == 0:
        x.view(-1)[0] = 1000
    return x


def wild(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """Some of the values are infinite, or not numbers."""
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    for first, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0)):
        flat[first :: 2 * flat.numel() // 3 + 1] = value
    return x


def numbers(low: int, high: int, dtype: torch.dtype = torch.int64) -> Draw:
    """Integers from low up to high."""

    def draw(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    return draw


def indices(of: str) -> Draw:
    """Positions along an axis."""

    def draw(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
        return torch.randint(0, sizes[of], shape, generator=generator)

    return draw


def lengths(of: str) -> Draw:
    """Lengths from 1 to that of an axis."""

    def draw(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
        return torch.randint(1, sizes[of] + 1, shape, generator=generator)

    return draw


def mask(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """1 for the first few of a row, then 0."""
    counts = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    return (torch.arange(shape[1]) < counts).long()


def truth(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    return torch.rand(shape, generator=generator) > 0.4


def distribution(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    return torch.randn(shape, generator=generator).softmax(-1)


def positive_definite(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    return x @ x.mT + torch.eye(shape[-1])


def boxes(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    low = torch.rand((shape[0], 2), generator=generator) * 4
    return torch.cat([low, low + 0.5 + torch.rand((shape[0], 2), generator=generator) * 2], 1)


def with_end(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """Ids with one 42 in each row."""
    ids = torch.randint(1, 42, shape, generator=generator)
    ends = torch.randint(0, shape[1], (shape[0], 1), generator=generator)
    return ids.scatter(1, ends, 42)


def offsets(shape: tuple[int, ...], generator: torch.Generator, sizes: Sizes) -> torch.Tensor:
    """Offsets at which bags begin."""
    inner = torch.randperm(sizes["ids"] - 1, generator=generator)[: shape[0] - 1] + 1
    return torch.cat([torch.zeros(1, dtype=torch.int64), inner.sort().values])


def cast(draw: Draw, dtype: torch.dtype) -> Draw:
    return lambda shape, generator, sizes: draw(shape, generator, sizes).to(dtype)


# --- cases ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """Attributes: shape: a word is a length that varies; axes of one word have one length. draw: makes values."""

    name: str
    shape: tuple[int | str, ...]
    draw: Draw = normal


ROWS = Input("x", ("rows", 8))


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        network: its class in one of the files under networks/; made without arguments.
        may: what may become of it. naming: a pattern that a refusal has to contain; noted: one that a note of what is
            not batched has to contain.
        formats: it can be had in. quick: those that `make test` looks at, too.
        inputs: of a request. rows: numbers of rows that requests have. over: more than a batch may have; 0: none.
        sizes: of words other than the first of the first input: what lengths there are.
        toml: more lines for model.toml. example: an example.npz lies beside the model.
        asked: once more with max_batch_size in model.toml, which has to be refused with figures.
        shared: once more with state = "shared", which has to be served in order.
        chained: each answer is what the network makes of it, plus the first row of one other request.
        remembers: plain torch, too, has to have a network of its own for each request.
        noise: how far an answer may be off, relative to the largest value; None: by datatype.
        alike: requests get equal answers, so that others' answers cannot be told apart.
        scripted: TorchScript by script, not by trace.
        evident: a program, or ONNX, says itself that axis 0 counts no rows: nobody needs a note.
        heavy: requests are few.
        auto: torch.export finds out itself which axes vary how.
        cured: once caught, its answers are right.
        outputs: shapes of outputs by name where two runs do not show them.
        nest: makes arguments of the network of a flat list of them.
    """

    name: str
    network: type[nn.Module]
    inputs: tuple[Input, ...] = (ROWS,)
    may: tuple[str, ...] = (BATCHED,)
    formats: tuple[str, ...] = TORCH
    quick: tuple[str, ...] = ()
    naming: str = ""
    noted: str = r"(?i)axis 0|batch|row"
    rows: tuple[int, ...] = (1, 2, 3)
    over: int = 70
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    toml: str = ""
    example: bool = False
    asked: bool = False
    shared: bool = False
    chained: bool = False
    remembers: bool = False
    noise: float | None = None
    alike: bool = False
    scripted: bool = False
    evident: bool = False
    heavy: bool = False
    auto: bool = False
    cured: bool = True
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    nest: Callable[..., tuple[Any, ...]] = lambda *flat: flat

    @property
    def file(self) -> Path:
        """File of its network."""
        return NETWORKS / f"{self.network.__module__.rpartition('.')[2]}.py"

    def make(self) -> nn.Module:
        """The network with the weights that all its exhibits have."""
        with torch.random.fork_rng():
            torch.manual_seed(11)
            network = self.network().eval()
            if any(isinstance(weight, nn.UninitializedParameter) for weight in network.parameters()):
                network(*self.draw(0, 2))
            return network.requires_grad_(False)

    def fresh(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """The same as if it had never been called: its file is executed anew, since that may remember, too."""
        namespace: dict[str, Any] = {"__name__": f"fresh_{self.file.stem}"}
        exec(_code(self.file), namespace)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            network: nn.Module = namespace[self.network.__name__]().eval()
        network.load_state_dict(dict(weights))
        return network.requires_grad_(False)

    def draw(self, seed: int, rows: int) -> tuple[torch.Tensor, ...]:
        """The inputs of one request."""
        generator = torch.Generator().manual_seed(seed)
        first = self.inputs[0].shape[0] if self.inputs[0].shape else ""
        sizes = {word: among[seed % len(among)] for word, among in self.sizes.items()}
        if isinstance(first, str) and first not in sizes:
            sizes[first] = rows
        return tuple(
            given.draw(tuple(sizes[axis] if isinstance(axis, str) else axis for axis in given.shape), generator, sizes)
            for given in self.inputs
        )


_codes: dict[Path, CodeType] = {}


def _code(path: Path) -> CodeType:
    if path not in _codes:
        _codes[path] = compile(path.read_text(), path, "exec")
    return _codes[path]


@dataclass(frozen=True)
class Exhibit:
    """A case in one format. Attributes: variant: "", "asked" or "shared", see `Case`."""

    case: Case
    format: str
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the model."""
        return "-".join(filter(None, (self.case.name, self.format, self.variant)))

    @property
    def may(self) -> tuple[str, ...]:
        """Outcomes that are allowed."""
        return {"asked": (REFUSED,), "shared": (UNBATCHED,)}.get(self.variant, self.case.may)

    @property
    def naming(self) -> str:
        """A pattern that the sentence of a refusal has to contain."""
        return r"\d.*\d" if self.variant == "asked" else self.case.naming


def exhibits(cases: Sequence[Case], *, quick: bool = False) -> list[Any]:
    """Parameters for tests: every exhibit, marked `zoo`; or those that are quick."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    parameters = []
    for case in cases:
        assert set(case.quick) <= set(case.formats), case.name
        assert re.fullmatch(r"[a-z0-9-]{1,40}", case.name), case.name
        for format in case.formats:
            if quick and format not in case.quick:
                continue
            marks = () if quick else pytest.mark.zoo
            variants = [
                "",
                *(["asked"] if case.asked and format in (PT2, FACTORY) else []),
                *(["shared"] if case.shared else []),
            ]
            for variant in variants:
                exhibit = Exhibit(case, format, variant)
                parameters.append(pytest.param(exhibit, id=exhibit.name, marks=marks))
    return parameters
