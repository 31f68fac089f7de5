"""Files of pipelines, and the models that fit together: signatures alone, no daemon."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tnxctl.protocol.wire import TensorSpec
from tnxd.models import pipeline_file
from tnxd.models.catalog import Catalog, Entry, missing_steps, with_steps
from tnxd.models.model import Model
from tnxd.models.pipeline_file import Description
from tnxd.models.pipelines import Pipeline, Source, no_module, wire
from tnxd.models.repository import scan

LABEL = "pipe/1/pipeline.toml"

LINE = """
inputs = ["text"]

[[steps]]
name = "tokenize"
model = "tokenizer"
inputs = { text = "text" }

[[steps]]
name = "encode"
model = "encoder@2"
inputs = { ids = "tokenize.ids", mask = "tokenize.mask" }

[[steps]]
name = "normalize"
model = "normalizer"
inputs = { x = "encode.embeddings" }

[outputs]
embeddings = "normalize.y"
"""


def described(text: str, tmp_path: Path) -> Description:
    file = tmp_path / "pipeline.toml"
    file.write_text(text)
    return pipeline_file.load(file, LABEL)


# --- the file by itself --------------------------------------------------------------------------------------


def test_a_description(tmp_path: Path) -> None:
    found = described(LINE, tmp_path)
    assert found.inputs == ("text",)
    assert found.models == ("tokenizer", "encoder@2", "normalizer")
    assert found.steps[1].inputs == {"ids": "tokenize.ids", "mask": "tokenize.mask"}
    assert found.outputs == {"embeddings": "normalize.y"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('inputs = ["text"]', 'inputs = "text"', "inputs: expected array, got str, not 'text'"),
        ('inputs = ["text"]', "inputs = []", "inputs: expected array of length >= 1, not []"),
        ('inputs = ["text"]', 'inputs = ["a.b"]', "inputs[0]: 'a.b' is no name here"),
        ('["text"]', '["text", "text"]', "inputs[1]: 'text' stands there twice"),
        ('["text"]', '["text", "more"]', "inputs[1]: nothing takes what 'more' gives"),
        ('name = "encode"', 'name = "tokenize"', "steps[1].name: 'tokenize' stands there twice"),
        ('name = "encode"', 'name = "text"', "steps[1].name: 'text' stands there twice"),
        ('name = "encode"', 'name = "en.code"', "steps[1].name: 'en.code' is no name here"),
        ('name = "encode"\n', "", "steps[1].name: is missing"),
        ('model = "encoder@2"', 'model = "encoder@zwei"', "steps[1].model: 'encoder@zwei' is not a model"),
        ('model = "encoder@2"', 'model = ""', "steps[1].model: '' is not a model"),
        ('model = "encoder@2"', 'modell = "encoder"', "steps[1].modell: unknown key, did you mean model?"),
        ('{ text = "text" }', "{}", "steps[0].inputs: expected object of length >= 1"),
        ('{ text = "text" }', '{ text = "txt" }', "steps[0].inputs.text: 'txt' is none of the pipeline's inputs, text"),
        ('x = "encode.emb', 'x = "encoder.emb', "steps[2].inputs.x: 'encoder.embeddings': there is no step 'encoder'"),
        ('"encode.embeddings"', '"encode."', "steps[2].inputs.x: 'encode.' names no output of the step"),
        ('"encode.embeddings"', '"encode"', "an output of the step is encode.OUTPUT"),
        ('"normalize.y"', '"text"', "outputs.embeddings: 'text' is not STEP.OUTPUT"),
        ('"normalize.y"', '"normalise.y"', "outputs.embeddings: 'normalise.y': there is no step 'normalise'"),
        ('"normalize.y"', '"encode.embeddings"', "steps[2].name: nothing takes what 'normalize' gives"),
        ('[outputs]\nembeddings = "normalize.y"', "[outputs]", "outputs: expected object of length >= 1"),
        (
            'text = "text" }',
            'text = "text", more = "normalize.y" }',
            "steps: tokenize -> encode -> normalize -> tokenize: each of them waits for the one before it",
        ),
        ('text = "text" }', 'text = "text", x = "tokenize.ids" }', "steps: tokenize -> tokenize: each of them"),
        ("embeddings = ", '"" = ', "outputs: expected `str` of length >= 1".replace("`", "")),
        ("embeddings = ", f"{'n' * 257} = ", "outputs: expected str of length <= 256"),
        ("text = ", '"a\\nb" = "x"\ntext = '.replace("\n", ", ", 1), "steps[0].inputs.'a\\nb': 'x' is none of"),
        ("[outputs]", "[outputs", "not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_key(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in LINE
    with pytest.raises(InvalidArgument) as caught:
        described(LINE.replace(old, new, 1), tmp_path)
    assert caught.value.message.startswith(f"{LABEL}: ")
    assert said in caught.value.message


def test_steps_are_bounded(tmp_path: Path) -> None:
    step = '[[steps]]\nname = "s{0}"\nmodel = "m"\ninputs = {{ x = "x" }}\n'
    many = 'inputs = ["x"]\n' + "".join(step.format(at) for at in range(65)) + '[outputs]\ny = "s0.y"\n'
    with pytest.raises(InvalidArgument, match="steps: expected array of length <= 64"):
        described(many, tmp_path)


# --- with models ---------------------------------------------------------------------------------------------


def model(name: str, inputs: str, outputs: str, max_batch_size: int = 16, **more: object) -> Model:
    """A model. Args: inputs, outputs: "x FP32 -1 8, ids INT64 -1 -1"."""

    def specs(text: str) -> tuple[TensorSpec, ...]:
        words = [part.split() for part in text.split(",")]
        return tuple(TensorSpec(name, datatype, tuple(map(int, shape))) for name, datatype, *shape in words)

    return Model(name, "1", specs(inputs), specs(outputs), max_batch_size, no_module, **more)  # type: ignore[arg-type]


TOKENIZER = model("tokenizer", "text UINT8 -1 -1", "ids INT64 -1 -1, mask INT64 -1 -1", examples=((1, 20),))
ENCODER = model("encoder", "ids INT64 -1 -1, mask INT64 -1 -1", "embeddings FP32 -1 384", 32)
NORMALIZER = model("normalizer", "x FP32 -1 384", "y FP32 -1 384", 64)


def test_models_that_fit(tmp_path: Path) -> None:
    wiring = wire(described(LINE, tmp_path), LABEL, [TOKENIZER, ENCODER, NORMALIZER])
    assert wiring.inputs_taken == (TensorSpec("text", "UINT8", (-1, -1)),)
    assert wiring.outputs_given == (TensorSpec("embeddings", "FP32", (-1, 384)),)
    assert wiring.max_batch_size == 16  # the smallest
    assert wiring.examples == ((1, 20),)
    assert [node.sources for node in wiring.nodes] == [
        (Source(-1, 0),),
        (Source(0, 0), Source(0, 1)),
        (Source(1, 0),),
    ]
    assert [(node.before, node.behind) for node in wiring.nodes] == [((), (1,)), ((0,), (2,)), ((1,), ())]
    assert wiring.order == (0, 1, 2)
    assert wiring.uses == (1, 1, 1)


DIAMOND = """
inputs = ["x"]
steps = [
    { name = "join", model = "add", inputs = { a = "left.y", b = "right.y" } },
    { name = "left", model = "double", inputs = { x = "x" } },
    { name = "right", model = "triple", inputs = { x = "x" } },
]
[outputs]
sum = "join.sum"
half = "left.y"
"""
DOUBLE, TRIPLE = model("double", "x FP32 -1 8", "y FP32 -1 8"), model("triple", "x FP32 -1 8", "y FP32 -1 8")
ADD = model("add", "a FP32 -1 8, b FP32 -1 8", "sum FP32 -1 8")


def test_steps_may_stand_in_any_order(tmp_path: Path) -> None:
    wiring = wire(described(DIAMOND, tmp_path), LABEL, [ADD, DOUBLE, TRIPLE])
    assert wiring.order == (1, 2, 0)
    assert wiring.nodes[0].before == (1, 2)
    assert wiring.nodes[1].behind == (0,)
    assert wiring.uses == (1, 2, 1)  # what an output of the whole is stays
    assert wiring.outputs == (Source(0, 0), Source(1, 0))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            model("encoder", "ids INT32 -1 -1, mask INT64 -1 -1", "embeddings FP32 -1 384"),
            "steps[1].inputs.ids: step 'encode' (encoder@1) takes INT32, not the INT64 of 'tokenize.ids'",
        ),
        (
            model("encoder", "ids INT64 -1, mask INT64 -1 -1", "embeddings FP32 -1 384"),
            "steps[1].inputs.ids: step 'encode' (encoder@1) takes [-1], not the [-1, -1] of 'tokenize.ids'",
        ),
        (
            model("encoder", "ids INT64 -1 -1, mask INT64 -1 -1", "embeddings FP32 -1 256"),
            "steps[2].inputs.x: step 'normalize' (normalizer@1) takes [-1, 384], not the [-1, 256] of 'encode.emb",
        ),
        (
            model("encoder", "ids INT64 -1 -1, mask INT64 -1 -1", "hidden FP32 -1 384"),
            "steps[2].inputs.x: step 'encode' (encoder@1) has no output 'embeddings'; its outputs are ['hidden']",
        ),
        (
            model("encoder", "ids INT64 -1 -1", "embeddings FP32 -1 384"),
            "steps[1].inputs.mask: step 'encode' (encoder@1) has no input 'mask'; its inputs are ['ids']",
        ),
        (
            model("encoder", "ids INT64 -1 -1, mask INT64 -1 -1, types INT64 -1 -1", "embeddings FP32 -1 384"),
            "steps[1].inputs.types: is missing: step 'encode' (encoder@1) needs the input 'types'",
        ),
    ],
)
def test_models_that_do_not_fit(changed: Model, said: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        wire(described(LINE, tmp_path), LABEL, [TOKENIZER, changed, NORMALIZER])
    assert caught.value.message.startswith(f"{LABEL}: ")
    assert said in caught.value.message


def test_a_pipeline_is_no_step(tmp_path: Path) -> None:
    inner = Pipeline("encoder", "1", ENCODER.inputs, ENCODER.outputs, 16, no_module)
    with pytest.raises(FailedPrecondition, match=re.escape("steps[1].model: 'encoder' is a pipeline")):
        wire(described(LINE, tmp_path), LABEL, [TOKENIZER, inner, NORMALIZER])


def test_an_input_that_may_be_left_out(tmp_path: Path) -> None:
    encoder = model(
        "encoder", "types INT64 -1 -1, ids INT64 -1 -1, mask INT64 -1 -1", "embeddings FP32 -1 384",
        optional={"types": None},
    )  # fmt: skip
    wiring = wire(described(LINE, tmp_path), LABEL, [TOKENIZER, encoder, NORMALIZER])
    assert wiring.nodes[1].sources == (None, Source(0, 0), Source(0, 1))


def test_an_input_of_several_steps_is_what_all_of_them_take(tmp_path: Path) -> None:
    free = model("double", "x FP32 -1 -1", "y FP32 -1 8", examples=((1, 3),))
    wiring = wire(described(DIAMOND, tmp_path), LABEL, [ADD, free, TRIPLE])
    assert wiring.inputs_taken == (TensorSpec("x", "FP32", (-1, 8)),)
    assert wiring.examples == ((1, 8),)
    other = model("triple", "x FP32 -1 9", "y FP32 -1 8")
    with pytest.raises(FailedPrecondition) as caught:
        wire(described(DIAMOND, tmp_path), LABEL, [ADD, DOUBLE, other])
    assert caught.value.message == (
        f"{LABEL}: steps[2].inputs.x: step 'right' (triple@1) takes [-1, 9], not the [-1, 8] of 'x', "
        f"as step 'left' (double@1) takes it"
    )


# --- rows ----------------------------------------------------------------------------------------------------

DETECT = """
inputs = ["picture"]
steps = [
    {{ name = "detect", model = "detector", inputs = {{ picture = "picture" }}{0} }},
    {{ name = "crop", model = "cropper", inputs = {{ picture = "picture", boxes = "detect.boxes" }}{1} }},
    {{ name = "classify", model = "classifier", inputs = {{ x = "crop.crops" }} }},
]
outputs = {{ scores = "classify.y", boxes = "detect.boxes" }}
"""
DETECTOR = model("detector", "picture FP32 3 -1 -1", "boxes FP32 -1 4", 0)
CROPPER = model("cropper", "picture FP32 3 -1 -1, boxes FP32 -1 4", "crops FP32 -1 3 8 8", 0)
CLASSIFIER = model("classifier", "x FP32 -1 3 8 8", "y FP32 -1 10")


def test_a_pipeline_with_a_step_that_counts_no_rows_counts_none(tmp_path: Path) -> None:
    wiring = wire(described(DETECT.format("", ""), tmp_path), LABEL, [DETECTOR, CROPPER, CLASSIFIER])
    assert wiring.max_batch_size == 0
    assert wiring.outputs_given[0].shape == (-1, 10)
    # What is cropped goes to a step that counts rows: there have to be as many as boxes.
    assert [node.keeps for node in wiring.nodes] == [(), ((0, (1,)),), ()]
    allowed = described(DETECT.format("", ", changes_rows = true"), tmp_path)
    assert [node.keeps for node in wire(allowed, LABEL, [DETECTOR, CROPPER, CLASSIFIER]).nodes] == [(), (), ()]


def test_rows_that_come_from_nowhere_have_to_be_meant(tmp_path: Path) -> None:
    text = """
    inputs = ["picture"]
    steps = [
        { name = "detect", model = "detector", inputs = { picture = "picture" } },
        { name = "judge", model = "judge", inputs = { boxes = "detect.boxes" } },
    ]
    outputs = { scores = "judge.y" }
    """
    judge = model("judge", "boxes FP32 -1 4", "y FP32 -1 10")
    with pytest.raises(FailedPrecondition) as caught:
        wire(described(text, tmp_path), LABEL, [DETECTOR, judge])
    assert "steps[0].changes_rows: has to be true: step 'detect' (detector@1) has no batch axis" in caught.value.message
    meant = text.replace('"picture" } }', '"picture" }, changes_rows = true }')
    assert wire(described(meant, tmp_path), LABEL, [DETECTOR, judge]).nodes[0].keeps == ()


# --- in a repository -----------------------------------------------------------------------------------------


def published(root: Path, name: str, text: str, toml: str = "", version: int = 1) -> None:
    (root / name / str(version)).mkdir(parents=True)
    (root / name / str(version) / "pipeline.toml").write_text(text)
    if toml:
        (root / name / "model.toml").write_text(toml)


def test_a_version_may_be_a_pipeline(tmp_path: Path) -> None:
    published(tmp_path, "pipe", LINE, "deadline_us = 5e4\npriority = 0\n")
    catalog = scan(tmp_path)
    assert catalog.failures == {}
    source = catalog.entries["pipe"].sources["1"]
    assert (source.format, source.steps, source.nbytes) == ("pipeline", ("tokenizer", "encoder@2", "normalizer"), 0)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("max_batch_size = 4", "pipe/model.toml: max_batch_size: pipe/1/pipeline.toml has models for its steps"),
        ('devices = ["cpu"]', "pipe/model.toml: devices: "),
        ("replicas = 2", "pipe/model.toml: replicas: "),
        ('state = "shared"', "pipe/model.toml: state: "),
        ('[traffic]\nshadow = "1"', "pipe/model.toml: traffic.shadow: "),
    ],
)
def test_settings_that_a_pipeline_cannot_keep(toml: str, said: str, tmp_path: Path) -> None:
    published(tmp_path, "pipe", LINE, toml)
    assert said in scan(tmp_path).failures["pipe@1"]


def test_mistakes_are_found_without_opening_anything(tmp_path: Path) -> None:
    published(tmp_path, "pipe", LINE.replace('"encode.embeddings"', '"encode"'))
    assert "pipe/1/pipeline.toml: steps[2].inputs.x: " in scan(tmp_path).failures["pipe@1"]
    (tmp_path / "pipe" / "1" / "model.onnx").write_bytes(b"")
    assert "model.onnx and pipeline.toml is" in scan(tmp_path).failures["pipe@1"]


class _Known:
    """A source of which nothing is known but its steps."""

    format = stamp = ""
    nbytes = 0

    def __init__(self, name: str, version: str, steps: tuple[str, ...] = ()) -> None:
        self.name, self.version, self.steps = name, version, steps

    def open(self, generation: int) -> Model:
        raise NotImplementedError


def entry(name: str, versions: int, wanted: tuple[str, ...], steps: tuple[str, ...] = ()) -> Entry:
    numbers = [str(number + 1) for number in range(versions)]
    return Entry(name, {number: _Known(name, number, steps) for number in numbers}, wanted)


def test_versions_that_pipelines_name_are_wanted_and_come_first() -> None:
    entries = [entry("a", 1, ("1",), ("encoder@1", "other", "newest@3")), entry("encoder", 2, ("2",))]
    entries += [entry("newest", 3, ("1", "2")), entry("other", 1, ("1",))]
    found = with_steps(Catalog({each.name: each for each in entries})).entries
    assert list(found) == ["encoder", "newest", "other", "a"]
    assert (found["encoder"].wanted, found["encoder"].weights) == (("1", "2"), {})
    # Its newest version is there for the pipeline alone: the name's traffic stays where it was.
    assert (found["newest"].wanted, found["newest"].weights) == (("1", "2", "3"), {"2": 1.0})


def test_steps_that_there_are_not() -> None:
    entries = [entry("a", 1, ("1",), ("encoder@3",)), entry("b", 1, ("1",), ("encoder", "decoder"))]
    entries += [entry("encoder", 2, ("2",)), entry("c", 1, ("1",), ("broken",))]
    catalog = Catalog({each.name: each for each in entries}, {"broken": "broken/1: none is"})
    assert missing_steps(catalog) == {
        "a@1": "a/1/pipeline.toml: steps[0].model: there is no version 3 of 'encoder', only 1, 2",
        "b@1": "b/1/pipeline.toml: steps[1].model: there is no model 'decoder', only a, b, encoder, c",
    }
