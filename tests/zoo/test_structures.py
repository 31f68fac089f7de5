"""Nested tensors, optional ones, outputs that nobody wants, weights in shards, operators of other libraries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
import zoo_operators

from conftest import Daemon
from format_tools import tensors
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument, TensorNextError
from tnxctl.protocol.wire import Limits, ModelInfo
from zoo import building, keeper
from zoo.case import NETWORKS, Exhibit, exhibits
from zoo.cases import STRUCTURES
from zoo.keeper import Keeper
from zoo.networks import structures, values

X = tensors("x", "FP32", [-1, 8])
Y = tensors("output", "FP32", [-1, 8], "outputs")
LIMIT = 1024 * 1024
"""Most bytes of a message."""
FLOOD = 300
"""Wrong requests of one client."""


@pytest.mark.parametrize("exhibit", exhibits(STRUCTURES))
def test_each_is_served_as_it_has_to_be(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []


# --- what a table cannot say ---------------------------------------------------------------------------------


class Repository:
    """Models that are written by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def version(self, name: str, toml: str = "") -> Path:
        """A new version's directory. Args: toml: written as its model.toml, if not empty."""
        folder = self.root / name / "1"
        folder.mkdir(parents=True)
        if toml:
            (self.root / name / "model.toml").write_text(toml)
        return folder

    def doubles(self, name: str, weights: dict[str, torch.Tensor] | None, more: str = "") -> Path:
        """`structures.Doubles`; without weights, no file for them is written."""
        folder = self.version(name, f'factory = "structures:Doubles"\n{more}{X}{Y}')
        (folder / "structures.py").write_bytes((NETWORKS / "structures.py").read_bytes())
        if weights is not None:
            safetensors.torch.save_file(weights, folder / "model.safetensors")
        return folder

    def program(self, name: str, network: torch.nn.Module, toml: str = "", **arguments: torch.Tensor) -> None:
        """An exported program whose inputs have an axis 0 that counts rows."""
        folder = self.version(name, toml)
        rows = torch.export.Dim("rows")
        with building.quiet():
            program = torch.export.export(
                network.eval(), (), arguments, dynamic_shapes={key: {0: rows} for key in arguments}
            )
            torch.export.save(program, folder / "model.pt2")


DOUBLES = structures.Doubles().eval().requires_grad_(False)
WEIGHTS = {name: weight.clone() for name, weight in DOUBLES.state_dict().items()}
ROWS: Array = np.arange(24, dtype=np.float32).reshape(3, 8) / 8 + 1


def shards(folder: Path, *, of: dict[str, torch.Tensor], missing: str = "") -> None:
    """Weights in two files, with an index as transformers writes it. Args: missing: a file that is not there."""
    names = list(of)
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, inside in files.items():
        if file != missing:
            safetensors.torch.save_file({name: of[name] for name in inside}, folder / file)
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in of.values())},
        "weight_map": {name: file for file, inside in files.items() for name in inside},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unranked(path: Path) -> None:
    """An ONNX model whose input has no known number of axes."""
    unknown = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "unranked", [unknown], [output])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Client]]:
    folder = tmp_path_factory.mktemp("written")
    repository = Repository(folder / "models")
    repository.doubles("whole", WEIGHTS)
    shards(repository.doubles("sharded", None), of=WEIGHTS)
    shards(repository.doubles("shard-missing", None), of=WEIGHTS, missing="model-00002-of-00002.safetensors")
    repository.doubles("prefixed", {f"module.{name}": weight for name, weight in WEIGHTS.items()})
    repository.doubles("extra", {**WEIGHTS, "ema.decay": torch.ones(1)})
    optional = repository.version(
        "optional",
        f'factory = "structures:Optional"\n{X}\n{X.replace("x", "offset", 1)}optional = true\n{Y}',
    )
    (optional / "structures.py").write_bytes((NETWORKS / "structures.py").read_bytes())
    safetensors.torch.save_file({"scale": torch.ones(8) * 2}, optional / "model.safetensors")
    repository.program("keyword", structures.Keyword(), x=torch.ones(2, 8), scale=torch.ones(2, 8))
    repository.program("some-outputs", structures.ListOut(), Y.replace('"output"', '"output_1"'), x=torch.ones(2, 8))
    unranked(repository.version("unranked") / "model.onnx")
    unranked(repository.version("ranked", "max_batch_size = 8\n" + X + Y.replace('"output"', '"y"')) / "model.onnx")
    with building.quiet():
        script = torch.jit.script(values.Scripted().eval())
        torch.jit.save(
            script,
            repository.version("scripted", X.replace("FP32", "INT64").replace("-1, 8", "-1") + Y) / "model.pt",
        )
    repository.program("wide-answer", structures.ListOut(), x=torch.ones(2, 8))
    operators(repository)
    config = keeper.settings() + f"[limits]\nmessage_bytes = {LIMIT}\n"
    with keeper.serve(folder, repository.root, config) as (daemon, clients):
        yield daemon, clients[0]


def operators(repository: Repository) -> None:
    """A program that needs an operator of a library, with and without a word about it."""
    repository.program("operator", zoo_operators.Triples(), x=torch.ones(2, 8))
    repository.program(
        "operator-imported", zoo_operators.Triples(), 'imports = ["zoo_operators"]\n', x=torch.ones(2, 8)
    )
    repository.program("operator-nowhere", structures.ListOut(), 'imports = ["no_such_library"]\n', x=torch.ones(2, 8))


@pytest.fixture
def tnx(written: tuple[Daemon, Client]) -> Client:
    return written[1]


def info(tnx: Client, name: str) -> ModelInfo:
    return next(each for each in tnx.models() if each.name == name)


def expected(x: Array) -> Array:
    array: Array = DOUBLES(torch.from_numpy(x)).numpy()
    return array


def test_weights_in_shards_are_put_together(tnx: Client) -> None:
    assert info(tnx, "sharded").error == ""
    np.testing.assert_allclose(tnx.predict(ROWS, model="sharded").output, expected(ROWS), rtol=1e-4)


def test_a_shard_that_is_missing_is_named(tnx: Client) -> None:
    assert "model-00002-of-00002.safetensors" in info(tnx, "shard-missing").error
    np.testing.assert_allclose(tnx.predict(ROWS, model="whole").output, expected(ROWS), rtol=1e-4)


def test_keys_with_a_prefix_are_named_on_both_sides(tnx: Client) -> None:
    error = info(tnx, "prefixed").error
    assert "module.layers.0" in error
    assert "'layers.0" in error


def test_an_extra_key_is_named(tnx: Client) -> None:
    assert "ema.decay" in info(tnx, "extra").error


def test_an_optional_input_may_be_left_out(tnx: Client) -> None:
    assert info(tnx, "optional").error == ""
    futures = []
    for number in range(20):
        x = ROWS + number
        inputs = {"x": x} if number % 2 else {"x": x, "offset": np.full_like(x, number)}
        futures.append((x * 2 + (0 if number % 2 else number), tnx.submit(inputs, model="optional")))
    for answer, future in futures:
        np.testing.assert_allclose(future.result().output, answer)


def test_an_input_by_name_alone_is_served(tnx: Client) -> None:
    answer = tnx.predict({"scale": ROWS, "x": ROWS + 1}, model="keyword").output
    np.testing.assert_allclose(answer, ROWS * (ROWS + 1))


def test_outputs_can_be_left_out(tnx: Client) -> None:
    assert info(tnx, "some-outputs").error == ""
    assert list(tnx.predict(ROWS, model="some-outputs").outputs) == ["output_1"]


def test_an_operator_that_is_missing_is_named_in_one_line(tnx: Client) -> None:
    error = info(tnx, "operator").error
    assert "zoo" in error
    assert "triple" in error
    assert "check the warnings" not in error


def test_a_library_of_operators_is_imported_where_model_toml_says_so(tnx: Client) -> None:
    assert info(tnx, "operator-imported").error == ""
    np.testing.assert_allclose(tnx.predict(ROWS, model="operator-imported").output, ROWS * 3)


def test_a_library_that_is_not_there_is_named_with_file_and_key(tnx: Client) -> None:
    error = info(tnx, "operator-nowhere").error
    assert "operator-nowhere/model.toml: imports" in error
    assert "no_such_library" in error


def test_an_onnx_input_of_unknown_rank_is_no_scalar(tnx: Client) -> None:
    model = info(tnx, "unranked")
    if model.status == "ready":
        np.testing.assert_allclose(tnx.predict(ROWS - 2, model="unranked").output, np.maximum(ROWS - 2, 0))
    else:
        assert "'x'" in model.error
        assert "model.toml" in model.error


def test_model_toml_may_say_what_an_onnx_file_does_not(tnx: Client) -> None:
    assert info(tnx, "ranked").error == ""
    np.testing.assert_allclose(tnx.predict(ROWS - 2, model="ranked").output, np.maximum(ROWS - 2, 0))


def test_a_failing_torchscript_says_what_failed(tnx: Client) -> None:
    with pytest.raises(TensorNextError, match="index out of range"):
        tnx.predict(np.array([1, 99]), model="scripted")
    assert tnx.predict(np.array([1, 2]), model="scripted").output.shape == (2, 8)


def test_a_flood_of_wrong_ids_fills_no_log(written: tuple[Daemon, Client]) -> None:
    daemon, tnx = written
    before = len(daemon.log.read_text().splitlines())
    futures = [tnx.submit(np.array([1, 99 + number]), model="scripted") for number in range(FLOOD)]
    assert all(isinstance(future.exception(), TensorNextError) for future in futures)
    assert len(daemon.log.read_text().splitlines()) - before < FLOOD


def test_an_answer_beyond_the_limit_is_refused_with_its_size(written: tuple[Daemon, Client]) -> None:
    """Half of the limit goes in, one and a half comes out."""
    daemon, tnx = written
    before = tnx.health()
    x = np.ones((1024 * 16, 8), np.float32)
    with (
        Client(daemon.endpoint, timeout=60.0, limits=Limits(message_bytes=LIMIT)) as bounded,
        pytest.raises(TensorNextError, match=r"\d") as caught,
    ):
        bounded.predict(x, model="wide-answer")
    assert caught.value.code in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "FAILED_PRECONDITION"), caught.value
    after = tnx.health()
    assert sum(after.errors.values()) == sum(before.errors.values()) + 1
    assert after.replies == before.replies


def test_a_wrong_name_is_still_refused(tnx: Client) -> None:
    with pytest.raises(InvalidArgument, match="'z'"):
        tnx.predict({"z": ROWS}, model="whole")
