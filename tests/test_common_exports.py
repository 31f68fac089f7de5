"""The programs of docs/models.md, "Common exports": run as they stand there, served, and held against plain answers."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import serving_daemon
from model_repositories import load_example
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxd.models.tensors import to_array

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")

PACKAGES = {
    "encoder": ("transformers",),
    "pictures": ("timm",),
    "sequences": ("safetensors",),
    "detector": (),
    "iris": ("skl2onnx", "sklearn", "onnxruntime"),
    "wine": ("sklearn", "joblib"),
    "force": ("safetensors",),
}
"""Packages that each model needs to be made and served, by its name in the repository."""


def recipes() -> dict[str, list[tuple[str, str]]]:
    """The blocks of each section, with their languages, by the name of its model."""
    found = re.search(r"^## Common exports\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    sections = re.split(r"^### ", found[1], flags=re.MULTILINE)[1:]
    blocks = [re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for text in sections]
    return {re.findall(r"models/(\w+)/1", each[-1][1])[0]: each for each in blocks}


def missing(name: str) -> str:
    """The packages of a model that are not installed."""
    return ", ".join(package for package in PACKAGES[name] if importlib.util.find_spec(package) is None)


def run(blocks: list[tuple[str, str]]) -> dict[str, Any]:
    """Run the programs of a section. A block that begins with the path of a file becomes that file.

    Weights are the same each time: of some random ones an output is so near 0 that its rounding shows.
    """
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for language, text in blocks:
        path = re.match(r"# (models/\S+)\n", text)
        if path is not None:
            Path(path[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(path[1]).write_text(text)
        else:
            assert language == "python"
            exec(text, names)
    return names


pytestmark = pytest.mark.timeout(240)  # the daemon looks for faster variants of all of them


@dataclass(frozen=True)
class Served:
    """A daemon with all that could be made here. Attributes: networks: by the name of the model."""

    tnx: Client
    networks: dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("exports")
    (folder / "models").mkdir()
    networks = {}
    path, modules = list(sys.path), set(sys.modules)
    with chdir(folder):
        for name, blocks in recipes().items():
            if missing(name):
                continue
            without: AbstractContextManager[object] = nullcontext()
            if name == "pictures" and importlib.util.find_spec("torchvision") is None:
                without = load_example("resnet", "export").stand_ins("torchvision", "yaml")
            with without:
                networks[name] = run(blocks)["net"]
    sys.path[:] = path
    for module in {"sequences", "force"} - modules:
        sys.modules.pop(module, None)
    with (
        serving_daemon(folder / "log", "--model-repository", str(folder / "models")) as daemon,
        Client(daemon.endpoint, timeout=60.0) as tnx,
    ):
        yield Served(tnx, networks)


def floats(*shape: int) -> Array:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def ids(rows: int, length: int) -> dict[str, Array]:
    mask = np.ones((rows, length), np.int64)
    mask[-1, length // 2 :] = 0
    return {"input_ids": np.random.default_rng(7).integers(0, 1000, (rows, length)), "attention_mask": mask}


INPUTS: dict[str, list[dict[str, Array]]] = {
    "encoder": [ids(1, 4), ids(3, 17)],
    "pictures": [{"x": floats(2, 3, 224, 224)}],
    "sequences": [
        {"x": floats(1, 1, 16), "lengths": np.array([1])},
        {"x": floats(3, 40, 16), "lengths": np.array([40, 1, 13])},
    ],
    "detector": [{"picture": floats(3, 64, 64)}, {"picture": floats(3, 16, 24)}],
    "iris": [{"X": np.abs(floats(5, 4))}],
    "wine": [{"x": np.abs(floats(5, 13))}],
    "force": [{"positions": floats(4, 3)}],
}


def plain(name: str, net: Any, inputs: dict[str, Array]) -> list[Array]:
    """The answers of the network itself, in the order of the outputs."""
    if name == "iris":
        return [net.predict(inputs["X"]), net.predict_proba(inputs["X"])]
    if name == "wine":
        return [net.predict_proba(inputs["x"])]
    answer = net(*map(torch.from_numpy, inputs.values()))
    tensors = answer.values() if isinstance(answer, dict) else (answer,)
    return [to_array(tensor.detach()) for tensor in tensors]


def test_there_is_a_test_for_every_section() -> None:
    assert list(recipes()) == list(PACKAGES) == list(INPUTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_a_common_export_answers_as_its_network(name: str, request: pytest.FixtureRequest) -> None:
    if missing(name):
        pytest.skip(f"not installed: {missing(name)}")
    served: Served = request.getfixturevalue("served")
    info = served.tnx.metadata(name)
    assert (info.status, info.error) == ("ready", "")
    for inputs in INPUTS[name]:
        result = served.tnx.predict(inputs, model=name)
        expected = plain(name, served.networks[name], inputs)
        assert len(result.outputs) == len(expected)
        for output, wanted in zip(result.outputs.values(), expected, strict=True):
            np.testing.assert_allclose(output, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_the_page_says_of_them(request: pytest.FixtureRequest) -> None:
    served: Served = request.getfixturevalue("served")
    infos = {info.name: info for info in served.tnx.models()}
    assert infos["detector"].max_batch_size == 0
    assert [spec.shape for spec in infos["detector"].outputs] == [(-1, 4), (-1,)]
    assert infos["sequences"].max_batch_size == 64
    assert any("differentiates" in note for note in infos["force"].notes)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_an_export_fixes_the_steps_of_an_lstm() -> None:
    """As the page says: where torch keeps them free, a program will do."""
    steps = torch.export.Dim("steps", min=1, max=100)
    net = torch.nn.Sequential(torch.nn.LSTM(4, 4, batch_first=True)).eval()
    with pytest.raises(Exception, match="specialized"):
        torch.export.export(net, (torch.zeros(2, 9, 4),), dynamic_shapes=({1: steps},))
