"""Files that disagree: a sentence with file and key, and the rest goes on serving."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from format_tools import tensors
from tnxctl import Client
from tnxctl.protocol.wire import ModelInfo
from zoo import keeper
from zoo.case import NETWORKS
from zoo.networks import structures

TOML = (
    'factory = "structures:Doubles"\n{more}\n'
    + tensors("x", "FP32", [-1, 8])
    + tensors("output", "FP32", [-1, 8], "outputs")
)

DOUBLES = structures.Doubles().eval().requires_grad_(False)
WEIGHTS = {name: weight.clone() for name, weight in DOUBLES.state_dict().items()}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
GOOD = np.ones((2, 8), np.float32)

Spoil = Callable[[Path], None]
"""Makes a good version's directory a bad one."""


def example(**arrays: object) -> Spoil:
    return lambda folder: np.savez(folder / "example.npz", **arrays)  # type: ignore[arg-type]


def toml(more: str, was: str = "", becomes: str = "") -> Spoil:
    """Lines at the top of model.toml, and something else in it."""

    def spoil(folder: Path) -> None:
        (folder.parent / "model.toml").write_text(
            TOML.replace(was, becomes).format(more=more) if was else TOML.format(more=more)
        )

    return spoil


def manifest(edit: Callable[[list[str]], list[str]]) -> Spoil:
    """A SHA256SUMS that is right but for an edit."""

    def spoil(folder: Path) -> None:
        lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in sorted(folder.iterdir())]
        (folder / "SHA256SUMS").write_text("\n".join(edit(lines)) + "\n")

    return spoil


def index(edit: Callable[[dict[str, str]], object] = lambda places: None, *, files: bool = True) -> Spoil:
    """Shards, with an index that is right but for an edit. Args: files: whether the shards are there."""

    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        names = list(WEIGHTS)
        places = {name: FIRST if name in names[:2] else SECOND for name in names}
        for file in (FIRST, SECOND) if files else ():
            weights = {name: WEIGHTS[name] for name, place in places.items() if place == file}
            safetensors.torch.save_file(weights, folder / file)
        edit(places)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return spoil


def text(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def weights(**changed: torch.Tensor) -> Spoil:
    def spoil(folder: Path) -> None:
        named = {name.replace("_", "."): tensor for name, tensor in changed.items()}
        safetensors.torch.save_file({**WEIGHTS, **named}, folder / "model.safetensors")

    return spoil


def both(*spoils: Spoil) -> Spoil:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


BAD: dict[str, tuple[Spoil, str]] = {
    # The example beside the model.
    "example-shape": (example(x=np.ones((2, 9), np.float32)), r"example\.npz.*x.*9"),
    "example-rank": (example(x=np.ones((2, 8, 1), np.float32)), r"example\.npz.*x"),
    "example-datatype": (example(x=np.ones((2, 8), np.float64)), r"example\.npz.*x.*FP(32|64)"),
    "example-name": (example(y=np.ones((2, 8), np.float32)), r"example\.npz.*[xy]"),
    "example-extra": (
        example(x=np.ones((2, 8), np.float32), z=np.ones(1, np.float32)),
        r"example\.npz.*z",
    ),
    "example-empty": (example(), r"example\.npz.*x"),
    "example-pickle": (example(x=np.array([object()])), r"example\.npz"),
    "example-text": (text("example.npz", "not an archive"), r"example\.npz"),
    "example-cut": (
        both(
            example(x=np.ones((2, 8), np.float32)),
            lambda folder: (folder / "example.npz").write_bytes((folder / "example.npz").read_bytes()[:-30]) and None,
        ),
        r"example\.npz",
    ),
    # model.toml against the model, which only a run can tell.
    "toml-output-datatype": (
        toml("", '"output"\ndatatype = "FP32"', '"output"\ndatatype = "FP64"'),
        "output.*(FP64|float)",
    ),
    "toml-output-shape": (toml("", "shape = [-1, 8]\n", "shape = [-1, 7]\n"), "x|output"),
    "toml-output-name": (toml("", '"output"', '"logits"'), ""),
    "toml-input-width": (
        toml("", '"FP32"\nshape = [-1, 8]\n[[out', '"FP32"\nshape = [-1, 4]\n[[out'),
        "toml-input-width",
    ),
    "toml-state": (toml('state = "perhaps"'), r"model\.toml: state.*perhaps|model\.toml: state"),
    "toml-imports": (toml('imports = ["no such library"]'), r"model\.toml: imports"),
    "toml-imports-number": (toml("imports = 3"), r"model\.toml: imports"),
    "toml-audit": (toml("audit = 2.0"), r"model\.toml: audit"),
    "toml-unknown": (toml("colour = 3"), r"model\.toml: colour"),
    # The manifest.
    "manifest-missing": (manifest(lambda lines: lines[1:]), r"model\.safetensors|SHA256SUMS"),
    "manifest-extra": (manifest(lambda lines: [*lines, f"{'0' * 64}  nothing.bin"]), r"nothing\.bin"),
    "manifest-wrong": (
        manifest(lambda lines: ["0" + line[1:] if line[0] != "0" else "1" + line[1:] for line in lines]),
        "",
    ),
    # Shards.
    "shards-gone": (index(files=False), FIRST.replace(".", r"\.")),
    "shards-unnamed": (index(lambda places: places.popitem()), r"layers\.1\.weight|layers\.1\.bias"),
    "shards-elsewhere": (index(lambda places: places.update({"layers.0.bias": SECOND})), r"layers\.0\.bias"),
    "shards-outside": (
        index(lambda places: places.update({"layers.0.bias": "../../whole/1/model.safetensors"})),
        r"index\.json",
    ),
    "shards-extra": (index(lambda places: places.update({"layers.9.bias": FIRST})), r"layers\.9\.bias"),
    "shards-no-json": (both(index(), text(INDEX, "{")), r"index\.json"),
    "shards-no-map": (both(index(), text(INDEX, '{"weight_map": []}')), r"index\.json"),
    # Weights.
    "weights-shape": (weights(layers_0_bias=torch.ones(9)), r"layers\.0\.bias.*9"),
    "weights-missing": (
        lambda folder: safetensors.torch.save_file({"layers.0.bias": torch.ones(8)}, folder / "model.safetensors"),
        r"layers\.0\.weight",
    ),
    "weights-text": (text("model.safetensors", "not weights"), r"model\.safetensors"),
}
"""Name -> what is done to a good version, and a pattern that the sentence has to contain."""

FINE: dict[str, Spoil] = {
    "example-fits": example(x=np.ones((3, 8), np.float32)),
    "example-one-row": example(x=np.ones((1, 8), np.float32)),
    "manifest-right": manifest(lambda lines: lines),
    "shards-right": index(),
    "weights-half": weights(layers_0_bias=torch.zeros(8, dtype=torch.float16)),
}
"""Inputs that look like those and are fine."""


@pytest.fixture(scope="module")
def tnx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("bad")
    root = folder / "models"
    everything = {name: spoil for name, (spoil, _) in BAD.items()} | FINE
    for name, spoil in {"whole": lambda folder: None, **everything}.items():
        version = root / name / "1"
        version.mkdir(parents=True)
        toml("")(version)
        (version / "structures.py").write_bytes((NETWORKS / "structures.py").read_bytes())
        safetensors.torch.save_file(WEIGHTS, version / "model.safetensors")
        spoil(version)
    with keeper.serve(folder, root, keeper.settings()) as (_, clients):
        yield clients[0]


def info(tnx: Client, name: str) -> ModelInfo:
    return next(each for each in tnx.models() if each.name == name)


@pytest.mark.parametrize("name", BAD)
def test_files_that_disagree_are_refused_by_name(tnx: Client, name: str) -> None:
    model, (_, naming) = info(tnx, name), BAD[name]
    if name == "toml-output-name":  # a single tensor has no name of its own
        assert list(tnx.predict(GOOD, model=name).outputs) == ["logits"]
        return
    assert model.status == "failed", model
    assert name in model.error
    assert "\n" not in model.error
    assert re.search(naming, model.error), model.error


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_like_it_is_served(tnx: Client, name: str) -> None:
    assert info(tnx, name).error == ""
    assert tnx.predict(GOOD, model=name).output.shape == (2, 8)


def test_the_rest_goes_on_serving(tnx: Client) -> None:
    answer = tnx.predict(GOOD, model="whole").output
    np.testing.assert_allclose(answer, DOUBLES(torch.from_numpy(GOOD)).numpy(), rtol=1e-5, atol=1e-6)
