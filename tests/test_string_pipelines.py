"""Pipelines of plain Python with strings: texts of all lengths, rows that are told apart, limits, processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from conftest import Daemon, serving_daemon
from python_models import put
from tnxctl import Client
from tnxctl.protocol.errors import InvalidArgument
from tool import run

MOST_STRINGS = 1000

WORDS = """
import numpy as np
from tnxctl.protocol.errors import InvalidArgument
class Model:
    def predict(self, text):
        try:
            texts = [[len(word) for word in element.decode().split()] for element in text]
        except UnicodeDecodeError:
            raise InvalidArgument("this is no text")
        ids = np.zeros((len(texts), max(map(len, texts), default=0)), np.int64)
        mask = np.zeros_like(ids)
        for row, numbers in enumerate(texts):
            ids[row, :len(numbers)], mask[row, :len(numbers)] = numbers, 1
        return {"ids": ids, "mask": mask}
"""
"""A tokenizer: a number for each word. Rows are as long as the longest one beside them."""

WORDS_TOML = """
inputs = [{ name = "text", datatype = "BYTES", shape = [-1] }]
outputs = [
    { name = "ids", datatype = "INT64", shape = [-1, -1] }, { name = "mask", datatype = "INT64", shape = [-1, -1] },
]
"""

SUMS = """
import torch
class Sums(torch.nn.Module):
    def forward(self, ids, mask):
        return {"sum": (ids * mask).sum(1).float()}
"""

SUMS_TOML = """
factory = "sums:Sums"
max_batch_size = 16
inputs = [
    { name = "ids", datatype = "INT64", shape = [-1, -1] }, { name = "mask", datatype = "INT64", shape = [-1, -1] },
]
outputs = [{ name = "sum", datatype = "FP32", shape = [-1] }]
[ragged]
max_length = 64
mask = "mask"
inputs = { ids = {}, mask = {} }
"""

HELD_SUMS = SUMS.replace("import torch\n", "import os, time\nimport torch\n").replace(
    "        return", "        while not os.path.exists({go!r}): time.sleep(0.01)\n        return"
)
"""The same, once a file is there."""

MOST_TOKENS = 6

HELD = """
inputs = ["ids", "mask"]
steps = [{ name = "sums", model = "held-sums", inputs = { ids = "ids", mask = "mask" } }]
outputs = { sum = "sums.sum" }
"""

SPELLS = """
import numpy as np
class Model:
    def postprocess(self, sum):
        return {"number": b"%d letters\\0" % sum, "twice": 2 * sum}
    def predict(self, sum):
        return {"sum": sum}
"""

SPELLS_TOML = """
inputs = [{ name = "sum", datatype = "FP32", shape = [-1] }]
outputs = [
    { name = "number", datatype = "BYTES", shape = [-1] }, { name = "twice", datatype = "FP32", shape = [-1] },
]
"""

REPEATS = """
import numpy as np
class Model:
    def predict(self, text):
        return np.repeat(text[:, None], 100, axis=1)
"""

REPEATS_TOML = """
inputs = [{ name = "text", datatype = "BYTES", shape = [-1] }]
outputs = [{ name = "texts", datatype = "BYTES", shape = [-1, -1] }]
"""

FIRST = """
class Model:
    def predict(self, texts):
        return texts[:, 0]
"""

FIRST_TOML = """
inputs = [{ name = "texts", datatype = "BYTES", shape = [-1, -1] }]
outputs = [{ name = "text", datatype = "BYTES", shape = [-1] }]
"""

LETTERS = """
inputs = ["text"]
steps = [
    {{ name = "words", model = "{0}", inputs = {{ text = "text" }} }},
    {{ name = "sums", model = "sums", inputs = {{ ids = "words.ids", mask = "words.mask" }} }},
    {{ name = "spells", model = "spells", inputs = {{ sum = "sums.sum" }} }},
]
outputs = {{ number = "spells.number", twice = "spells.twice" }}
"""

MANY = """
inputs = ["text"]
steps = [
    { name = "repeats", model = "repeats", inputs = { text = "text" } },
    { name = "first", model = "first", inputs = { texts = "repeats.texts" } },
]
outputs = { texts = "repeats.texts", text = "first.text" }
"""

FEW = MANY.replace('texts = "repeats.texts", text = "first.text"', 'text = "first.text"')

ISOLATED = 'isolation = "process"\n'


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("strings")
    models = root / "models"
    put(models, WORDS, name="words", settings="max_batch_size = 0", signature=WORDS_TOML)
    put(models, WORDS, name="batched", signature=WORDS_TOML)
    put(models, SPELLS, name="spells", settings=ISOLATED, signature=SPELLS_TOML)
    put(models, REPEATS, name="repeats", settings=ISOLATED, signature=REPEATS_TOML)
    put(models, FIRST, name="first", signature=FIRST_TOML)
    short = SUMS_TOML.replace("max_length = 64", f"max_length = {MOST_TOKENS}\nmax_tokens = {MOST_TOKENS}")
    (root / "go").touch()
    held = HELD_SUMS.replace("{go!r}", repr(str(root / "go")))
    networks = {"sums": (SUMS, SUMS_TOML), "held-sums": (held, short)}
    for name, (code, settings) in networks.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "model.toml").write_text(settings)
        (models / name / "1/sums.py").write_text(code)
        safetensors.torch.save_file({}, models / name / "1/model.safetensors")
    pipelines = {"letters": LETTERS.format("words"), "together": LETTERS.format("batched"), "many": MANY, "few": FEW}
    pipelines["held"] = HELD
    for name, text in pipelines.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1/pipeline.toml").write_text(text)
    (root / "tnxd.toml").write_text(f"[limits]\nstrings = {MOST_STRINGS}\n[cpu]\nworkers = 2\ninline_limit_us = 0\n")
    arguments = ("--model-repository", str(models), "--config", str(root / "tnxd.toml"))
    with serving_daemon(root / "log", *arguments) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def tnx(serving: Daemon) -> Iterator[Client]:
    with Client(serving.endpoint, timeout=60.0) as client:
        yield client


def test_all_are_served(tnx: Client) -> None:
    infos = {info.name: info for info in tnx.models()}
    assert {name: info.error for name, info in infos.items() if info.status != "ready"} == {}
    for name, most in {"words": 0, "sums": 16, "spells": 64, "repeats": 64, "letters": 0, "many": 64}.items():
        assert infos[name].max_batch_size == most, name
    assert infos["spells"].devices == ("process",)
    assert infos["batched"].max_batch_size == infos["together"].max_batch_size == 0  # texts are as long as others
    assert any(note.startswith("no batches: ") for note in infos["batched"].notes)


@pytest.mark.parametrize("model", ["letters", "together"])
def test_texts_of_all_lengths_find_their_numbers(tnx: Client, model: str) -> None:
    texts = [[" ".join(["word"] * (1 + (row + index) % 20)) for row in range(1 + index % 3)] for index in range(60)]
    futures = [tnx.submit(text, model=model) for text in texts]
    for text, future in zip(texts, futures, strict=True):
        result = future.result()
        assert result.outputs["number"].tolist() == [b"%d letters\0" % (4 * len(line.split())) for line in text]
        assert result.outputs["twice"].tolist() == [8.0 * len(line.split()) for line in text]


def test_a_step_counts_its_tokens_as_its_model_does_for_others(serving: Daemon, tnx: Client) -> None:
    """Requests that wait for the lanes share batches of `max_tokens` at most, in rows of two tokens."""
    ids = np.ones((1, 2), np.int64)
    go = serving.log.parent / "go"
    go.unlink()
    try:
        futures = [tnx.submit({"ids": ids, "mask": ids}, model="held") for _ in range(24)]
        while (report := tnx.health()).queued + report.running < len(futures):
            pass  # the test's own time limit ends this
    finally:
        go.touch()
    sizes = [future.result().steps[0].batch_size for future in futures]
    assert max(sizes) == MOST_TOKENS // 2


@pytest.mark.parametrize("model", ["letters", "together"])
def test_many_rows_and_none(tnx: Client, model: str) -> None:
    texts = ["a " * (index % 10 + 1) for index in range(200)]
    result = tnx.predict(texts, model=model)
    assert result.outputs["twice"].tolist() == [2.0 * (index % 10 + 1) for index in range(200)]
    assert tnx.predict(np.empty(0, object), model=model).outputs["number"].shape == (0,)


def test_what_is_no_text_is_the_mistake_of_its_client(tnx: Client) -> None:
    futures = [tnx.submit([b"\xff" if index % 5 == 0 else b"fine"], model="letters") for index in range(20)]
    for index, future in enumerate(futures):
        if index % 5 == 0:
            with pytest.raises(InvalidArgument, match="step 'words': this is no text"):
                future.result()
        else:
            assert future.result().outputs["twice"].tolist() == [8.0]


def test_the_limit_of_strings_is_that_of_the_answer(tnx: Client) -> None:
    assert tnx.predict(["a"] * 9, model="many").outputs["texts"].shape == (9, 100)
    with pytest.raises(InvalidArgument, match=f"the answer has 1010 strings, more than the limit of {MOST_STRINGS}"):
        tnx.predict(["a"] * 10, model="many")
    assert tnx.predict(["a"] * 500, model="few").text().tolist() == ["a"] * 500


def test_the_tool_sends_a_line_per_row(serving: Daemon, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two\nthree\n")
    done = run(
        "predict", "--host", serving.endpoint, "--timeout", 60, "--model", "letters", "--input", tmp_path / "text.txt"
    )
    assert done.exit_code == 0, done.output
    assert "6 letters" in done.stdout
    assert "5 letters" in done.stdout
