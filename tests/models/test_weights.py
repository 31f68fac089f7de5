"""Weights in several files, and keys that differ from those of the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from format_tools import ask, open_model, refused, source, tensors

NETWORK = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
        self.register_buffer("inv_freq", torch.full((2,), 7.0))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + self.inv_freq

make = Net
"""
TOML = 'factory = "code:make"\n' + tensors("x", "FP32", [-1, 2]) + tensors("y", "FP32", [-1, 2], "outputs")
KEYS = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("bias", "weight")] + ["inv_freq"]
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def weights(prefix: str = "") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {key: (2, 2) if key.endswith("weight") else (2,) for key in KEYS}
    return {prefix + key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}


X = np.array([[1.0, 2.0]], np.float32)


def expected(zero: str = "") -> Any:
    """The network's answer to X. Args: zero: a key that is something else: inv_freq as it was made."""
    found = weights()
    if zero:
        found[zero] = torch.full((2,), 7.0)
    x = torch.from_numpy(X)
    for layer in range(3):
        x = torch.nn.functional.linear(x, found[f"layers.{layer}.weight"], found[f"layers.{layer}.bias"])
    return (x + found["inv_freq"]).numpy()


def save(root: Path, found: dict[str, torch.Tensor]) -> Path:
    version = root / "net/1"
    version.mkdir(parents=True)
    safetensors.torch.save_file(found, version / "model.safetensors")
    (version / "code.py").write_text(NETWORK)
    return version


def save_shards(root: Path) -> tuple[Path, dict[str, str]]:
    """The weights in three files. Returns: where, and the map of the index."""
    version = root / "net/1"
    version.mkdir(parents=True)
    (version / "code.py").write_text(NETWORK)
    places = {key: SHARDS[index % 3] for index, key in enumerate(KEYS)}
    for shard in SHARDS:
        mine = {key: value for key, value in weights().items() if places[key] == shard}
        safetensors.torch.save_file(mine, version / shard)
    write_index(version, places)
    return version, places


def write_index(version: Path, places: dict[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    (version / "model.safetensors.index.json").write_text(text)


# --- several files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o644, 0o444])
def test_weights_in_several_files(tmp_path: Path, mode: int) -> None:
    version, _ = save_shards(tmp_path)
    for shard in SHARDS:
        (version / shard).chmod(mode)
    (version / "model.safetensors.index.json").chmod(0o444)
    model = open_model(tmp_path, TOML)
    assert model.format == "safetensors"
    assert source(tmp_path).nbytes == sum(path.stat().st_size for path in version.iterdir() if path.suffix != ".py")
    module = model.factory()
    np.testing.assert_allclose(ask(model, module, X)["y"], expected(), rtol=1e-6)
    mapped = "model-0000" in Path("/proc/self/maps").read_text()
    assert mapped == (mode == 0o444)  # what may be written over is copied
    del module


def test_a_changed_shard_is_another_content(tmp_path: Path) -> None:
    version, _ = save_shards(tmp_path)
    (tmp_path / "net/model.toml").write_text(TOML)
    before = source(tmp_path).stamp
    (version / SHARDS[1]).write_bytes((version / SHARDS[1]).read_bytes())
    assert source(tmp_path).stamp != before


INDEX = "net/1/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({KEYS[0]: "other.safetensors"}, f"{INDEX}: weight_map: 'layers.0.bias' is in 'other.safetensors', which is m"),
        ({KEYS[0]: "../x"}, f"{INDEX}: weight_map: 'layers.0.bias' is in '../x', which leads out of the version"),
        ({KEYS[0]: "/etc/passwd"}, f"{INDEX}: weight_map: 'layers.0.bias' is in '/etc/passwd', which leads out of"),
        ({KEYS[0]: SHARDS[1]}, f"net/1/{SHARDS[1]}: 'layers.0.bias' is not in it, and {INDEX} says so"),
        ({"more": SHARDS[2]}, f"net/1/{SHARDS[2]}: 'more' is not in it, and {INDEX} says so"),
        ({KEYS[1]: None}, f"net/1/{SHARDS[1]}: 'layers.0.weight' is in it, and {INDEX} does not list it"),
        (
            {key: None for index, key in enumerate(KEYS) if index % 3 == 0},
            f"{INDEX}: weight_map: nothing is in {SHARDS[0]}, which is there",
        ),
        (dict.fromkeys(KEYS), f"{INDEX}: weight_map: it lists no weights"),
    ],
)
def test_an_index_that_disagrees_with_the_files(tmp_path: Path, changes: dict[str, str | None], said: str) -> None:
    version, places = save_shards(tmp_path)
    changed = {**places, **changes}
    write_index(version, {key: place for key, place in changed.items() if place is not None})
    assert refused(tmp_path, TOML).startswith(said)


def test_a_key_in_two_files(tmp_path: Path) -> None:
    version, _ = save_shards(tmp_path)
    second = safetensors.torch.load_file(version / SHARDS[1])
    safetensors.torch.save_file({**second, KEYS[0]: torch.zeros(2)}, version / SHARDS[1])
    assert refused(tmp_path, TOML) == (
        f"net/1/{SHARDS[1]}: 'layers.0.bias' is in it, and {INDEX} says that it is in {SHARDS[0]}"
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}", "\xff"])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    version, _ = save_shards(tmp_path)
    (version / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert refused(tmp_path, TOML).startswith(f"{INDEX}: not an index of safetensors: ")


def test_a_missing_and_a_damaged_shard(tmp_path: Path) -> None:
    version, _ = save_shards(tmp_path)
    path = version / SHARDS[2]
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(tmp_path, TOML).startswith(f"net/1/{SHARDS[2]}: damaged or incomplete: ")
    path.unlink()
    assert f"is in '{SHARDS[2]}', which is missing" in refused(tmp_path, TOML)


def test_one_file_beside_an_index(tmp_path: Path) -> None:
    version, _ = save_shards(tmp_path)
    safetensors.torch.save_file(weights(), version / "model.safetensors")
    assert "model.safetensors and model.safetensors.index.json is" in refused(tmp_path, TOML)


# --- keys ----------------------------------------------------------------------------------------------------


def test_keys_on_both_sides_are_named(tmp_path: Path) -> None:
    found = weights()
    found["other"] = found.pop("inv_freq")
    save(tmp_path, found)
    assert refused(tmp_path, TOML) == (
        "net/1/model.safetensors: 'inv_freq' is missing, which the network of net/1/code.py has; 'other' is not in the "
        "network of net/1/code.py"
    )


def test_a_prefix_too_much(tmp_path: Path) -> None:
    save(tmp_path, {**weights("module."), "extra": torch.zeros(1)})
    said = refused(tmp_path, TOML)
    assert said.endswith("; its keys begin with 'module.': strip_prefix = \"module.\" under [weights] in model.toml")
    assert "'extra', 'module.inv_freq', 'module.layers.0.bias' and 5 more are not in the network" in said
    text = TOML + '[weights]\nstrip_prefix = "module."\n'
    assert refused(tmp_path, text).endswith("'extra' is not in the network of net/1/code.py")
    model = open_model(tmp_path, text + 'ignore = ["ext*"]\n')
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected(), rtol=1e-6)


def test_a_prefix_too_few(tmp_path: Path) -> None:
    save(tmp_path, {key.removeprefix("layers."): value for key, value in weights().items() if key != "inv_freq"})
    said = refused(tmp_path, TOML)
    assert said.endswith(
        "those of the network begin with 'layers.': add_prefix = \"layers.\" under [weights] in model.toml"
    )
    model = open_model(tmp_path, TOML + '[weights]\nadd_prefix = "layers."\nignore = ["inv_freq"]\n')
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected("inv_freq"), rtol=1e-6)


def test_keys_that_become_the_same(tmp_path: Path) -> None:
    save(tmp_path, {**weights(), "module.inv_freq": torch.zeros(2)})
    said = refused(tmp_path, TOML + '[weights]\nstrip_prefix = "module."\n')
    assert said == "net/1/model.safetensors: weights.strip_prefix makes 'inv_freq' of two keys"


def test_keys_of_a_file_that_has_a_network(tmp_path: Path) -> None:
    (tmp_path / "net/1").mkdir(parents=True)
    (tmp_path / "net/1/model.pt2").write_bytes(b"")
    assert refused(tmp_path, '[weights]\nignore = ["a"]\n').startswith("net/model.toml: weights: net/1/model.pt2 has a")


LAZY = NETWORK.replace("torch.nn.Linear(2, 2)", "torch.nn.LazyLinear(2)")


def test_a_network_that_learns_its_shapes_from_the_weights(tmp_path: Path) -> None:
    version = save(tmp_path, weights())
    (version / "code.py").write_text(LAZY)
    model = open_model(tmp_path, TOML)
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], expected(), rtol=1e-6)


def test_a_weight_that_nothing_gives_a_shape(tmp_path: Path) -> None:
    version = save(tmp_path, {key: weight for key, weight in weights().items() if key != "layers.1.weight"})
    (version / "code.py").write_text(LAZY)
    said = refused(tmp_path, TOML + '[weights]\nignore = ["layers.1.weight"]\n')
    assert said.endswith(
        "code.py: 'layers.1.weight' has no shape yet, and is not among the weights of net/1/model.safetensors"
    )


HOLDS = """
import functools, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.listed = [self.layer.weight]
        self.call = functools.partial(torch.nn.functional.linear, bias=self.layer.bias)
        self.view = self.layer.weight.detach()[:1]
        self.array = self.layer.weight.detach().numpy()
    def forward(self, x):
        array = torch.from_numpy(self.array)
        return self.call(x, self.listed[0]) + x @ self.view.T + x @ array

make = Net
"""


def test_weights_that_a_network_holds_in_other_places_too(tmp_path: Path) -> None:
    found = {"layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "layer.bias": torch.tensor([5.0, 6.0])}
    (save(tmp_path, found) / "code.py").write_text(HOLDS)
    model = open_model(tmp_path, TOML)
    weight, x = found["layer.weight"], torch.from_numpy(X)
    wanted = torch.nn.functional.linear(x, weight, found["layer.bias"]) + x @ weight[:1].T + x @ weight
    np.testing.assert_allclose(ask(model, model.factory(), X)["y"], wanted.numpy(), rtol=1e-6)
