"""Inputs of `tnxctl predict --input` beside files of numpy's: JSON, CSV, text and images."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fake_daemon import FakeDaemon
from tnxctl.cli import exits, sources
from tnxctl.protocol import wire
from tool import ask


def model(*specs: wire.TensorSpec, max_batch_size: int = 8) -> wire.ModelInfo:
    return wire.ModelInfo(
        name="m", version="1", status="ready", default=True, inputs=specs, max_batch_size=max_batch_size
    )


def sent(argument: object, info: wire.ModelInfo, *flags: str, stdin: bytes | None = None) -> dict[str, np.ndarray]:
    """The tensors that reach the daemon."""
    with FakeDaemon(models=(info,), compute=lambda _, inputs: inputs) as fake:
        result = ask(fake, "predict", "--input", argument, *flags, stdin=stdin)
        assert result.exit_code == 0, result.output
        return fake.inputs[0]


def refused(argument: object, info: wire.ModelInfo, *flags: str) -> tuple[int, str]:
    """The exit code, and the one sentence."""
    with FakeDaemon(models=(info,)) as fake:
        result = ask(fake, "predict", "--input", argument, *flags)
        assert not fake.predicts
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.exit_code, result.stderr.removeprefix("Error: ").strip()


FLOATS = model(wire.TensorSpec("x", "FP32", (-1, 3)))
WHOLE = model(wire.TensorSpec("x", "INT64", (-1, 3)))
PAIR = model(wire.TensorSpec("ids", "INT64", (-1, 2)), wire.TensorSpec("mask", "BOOL", (-1, 2)))

# --- JSON ----------------------------------------------------------------------------------------------------


def same(array: np.ndarray, expected: Any, dtype: str) -> bool:
    return array.dtype == dtype and array.tolist() == expected


def test_a_value_on_the_command_line_takes_the_datatype_of_the_model() -> None:
    (array,) = sent("[[1, 2, 3.5]]", FLOATS).values()
    assert same(array, [[1, 2, 3.5]], "f4")
    (array,) = sent(" [[1, 2, 3.0]]", WHOLE).values()
    assert same(array, [[1, 2, 3]], "i8")


def test_names_of_inputs_are_the_keys_of_an_object() -> None:
    inputs = sent('{"ids": [[1, 2]], "mask": [[true, false]]}', PAIR)
    assert same(inputs["ids"], [[1, 2]], "i8")
    assert same(inputs["mask"], [[True, False]], "?")


@pytest.mark.parametrize("name", ["x.json", "x.txt", "x.JSON"])
def test_json_in_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\ufeff" * (name == "x.json") + " [[1, 2, 3],\n [4, 5, 6]]\n")
    (array,) = sent(tmp_path / name, FLOATS).values()
    assert same(array, [[1, 2, 3], [4, 5, 6]], "f4")


def test_json_on_standard_input() -> None:
    (array,) = sent("-", FLOATS, stdin=b"[[1, 2, 3]]").values()
    assert same(array, [[1, 2, 3]], "f4")


@pytest.mark.parametrize(
    ("argument", "why"),
    [
        ("[[1, 2], [3]]", "cannot read --input: its lists have different lengths, so they are no tensor"),
        ("[[1, 2, 3]", "cannot read --input: not JSON: "),
        ('[["1", "2", "3"]]', "neither a number nor true or false"),
        ("[[1, null, 3]]", "neither a number nor true or false"),
        ("{}", "it holds no tensors"),
        ('{"x": {"y": 1}}', "cannot read --input, 'x': "),
        ("[" * 100_000, "cannot read --input: not JSON: "),
    ],
)
def test_json_that_is_no_tensor(argument: str, why: str) -> None:
    code, sentence = refused(argument, FLOATS)
    assert code == exits.Exit.FILE
    assert why in sentence


@pytest.mark.parametrize(
    ("argument", "info", "which"),
    [
        ("[[1, 2.5, 3]]", WHOLE, "takes INT64, which cannot hold 2.5"),
        ("[[1, NaN, 3]]", WHOLE, "takes INT64, which cannot hold nan"),
        ("[[1, 300, 3]]", model(wire.TensorSpec("x", "UINT8", (-1, 3))), "takes UINT8, which cannot hold 300"),
        ("[[1, 1e300, 3]]", FLOATS, "takes FP32, which cannot hold a number that is too large"),
        ("[[1, 2, 0]]", model(wire.TensorSpec("x", "BOOL", (-1, 3))), "takes BOOL, which cannot hold 2"),
    ],
)
def test_numbers_that_the_datatype_cannot_hold(argument: str, info: wire.ModelInfo, which: str) -> None:
    code, sentence = refused(argument, info)
    assert (code, sentence) == (exits.Exit.REFUSED, f"the input {which}")
    sent(argument, info, "--cast")


# --- CSV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1,2,3\n4,5,6\n", "a,b,c\r\n1, 2, 3\r\n4,5,6", '1,2,3\n\n"4",5,6\n'])
def test_csv_has_a_row_on_each_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_bytes(text.encode())
    for info, dtype in ((FLOATS, "f4"), (WHOLE, "i8")):
        (array,) = sent(tmp_path / "x.csv", info).values()
        assert same(array, [[1, 2, 3], [4, 5, 6]], dtype)
        (array,) = sent("-", info, stdin=text.encode()).values()
        assert same(array, [[1, 2, 3], [4, 5, 6]], dtype)


def test_large_whole_numbers_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("9007199254740993,2,3\n")
    (array,) = sent(tmp_path / "x.csv", WHOLE).values()
    assert array.tolist() == [[9007199254740993, 2, 3]]


@pytest.mark.parametrize("text", ["1,2,3\n", "1\n2\n3\n"])
def test_a_line_or_a_column_is_a_tensor_of_one_axis(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    (array,) = sent(tmp_path / "x.csv", model(wire.TensorSpec("x", "FP32", (-1,)))).values()
    assert array.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1,2,3\n4,5\n", "line 2 has 2 cells, the one before has 3"),
        ("1,2,3\n4,five,6\n", "line 2, column 2: 'five' is no number"),
        ("1,2,3\n4,,6\n", "line 2, column 2: '' is no number"),
        ("1,2,1_0\n", "line 1, column 3: '1_0' is no number"),
        ("a,b,c\n", "it holds no numbers"),
        ("", "is empty"),
    ],
)
def test_csv_that_is_no_tensor(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    code, sentence = refused(tmp_path / "x.csv", FLOATS)
    assert code == exits.Exit.FILE
    assert sentence.startswith(f"cannot read {tmp_path}/x.csv: ")
    assert why in sentence


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"1,\xff\xfe\n")
    assert "none of .npy, .npz, .json, .csv and images" in refused(tmp_path / "x.csv", FLOATS)[1]


# --- strings -------------------------------------------------------------------------------------------------

TEXTS = model(wire.TensorSpec("text", "BYTES", (-1,)))
COLUMN = model(wire.TensorSpec("text", "BYTES", (-1, 1)))
CELLS = model(wire.TensorSpec("cells", "BYTES", (-1, -1)))
JOBS = model(wire.TensorSpec("job", "BYTES", (-1, 1)), wire.TensorSpec("age", "INT64", (-1,)))


def only(argument: object, info: wire.ModelInfo, stdin: bytes | None = None) -> Any:
    """The elements of the only tensor that reaches the daemon."""
    (array,) = sent(argument, info, stdin=stdin).values()
    return array.tolist()


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_each_line_of_a_text_is_a_string(tmp_path: Path, ending: str, last: str) -> None:
    content = ending.join(["\ufeff[one, two]", "", "wölf\u2028x"]) + last
    (tmp_path / "x.txt").write_bytes(content.encode())
    expected = [b"[one, two]", b"", "wölf\u2028x".encode()]
    assert only(tmp_path / "x.txt", TEXTS) == expected
    assert only(tmp_path / "x.txt", COLUMN) == [[line] for line in expected]
    assert only("-", TEXTS, stdin=b"one, two\nthree") == [b"one, two", b"three"]


def test_json_of_strings() -> None:
    assert only('["a", "é"]', TEXTS) == [b"a", "é".encode()]
    assert only('["a", "é"]', COLUMN) == [[b"a"], ["é".encode()]]
    assert only('[["a"], ["b"]]', COLUMN) == [[b"a"], [b"b"]]
    assert only('[["a", "b"]]', CELLS) == [[b"a", b"b"]]
    assert only("-", TEXTS, stdin=b'["a"]') == [b"a"]
    inputs = sent('{"job": [["nurse"]], "age": [30]}', JOBS)
    assert inputs["job"].tolist() == [[b"nurse"]]
    assert same(inputs["age"], [30], "i8")


@pytest.mark.parametrize("text", ['["a", 1]', '["a", ["b"]]', "[1]", '["\\ud800"]', "[null]"])
def test_json_that_is_no_strings(text: str) -> None:
    code, sentence = refused(text, TEXTS)
    assert code == exits.Exit.FILE
    assert (
        sentence == "cannot read --input: 'text' takes strings, and it holds something else, or lists of other lengths"
    )


def test_a_table_has_a_column_for_each_input(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('age, job\n30, "nurse, night"\n41,\n')
    inputs = sent(tmp_path / "x.csv", JOBS)
    assert inputs["job"].tolist() == [[b"nurse, night"], [b""]]
    assert same(inputs["age"], [30, 41], "i8")
    (tmp_path / "x.csv").write_text("a,b\nc,d\n")
    assert only(tmp_path / "x.csv", CELLS) == [[b"a", b"b"], [b"c", b"d"]]
    (tmp_path / "x.csv").write_text("a\nb\n")
    assert only(tmp_path / "x.csv", TEXTS) == [b"a", b"b"]
    assert only(tmp_path / "x.csv", COLUMN) == [[b"a"], [b"b"]]
    (tmp_path / "x.csv").write_text("text\na\n")
    assert only(tmp_path / "x.csv", COLUMN) == [[b"a"]]


@pytest.mark.parametrize(
    ("text", "info", "why"),
    [
        ("30,nurse\n", JOBS, "its first line has to name inputs of the model: job, age"),
        ("age,job\nold,nurse\n", JOBS, "line 2, column 1: 'old' is no number"),
        ("age,job\n30\n", JOBS, "line 2 has 1 cells, the first has 2"),
        ("age,job\n", JOBS, "it holds a heading alone"),
        ("\n\n", CELLS, "it holds no text"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path: Path, text: str, info: wire.ModelInfo, why: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    code, sentence = refused(tmp_path / "x.csv", info)
    assert (code, sentence) == (exits.Exit.FILE, f"cannot read {tmp_path}/x.csv: {why}")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\0\xff", b"%PDF-\xff\n[1]", b"\0\n\0"])
def test_any_other_file_is_one_string(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "x.bin").write_bytes(content)
    assert only(tmp_path / "x.bin", TEXTS) == [content]
    assert only(tmp_path / "x.bin", COLUMN) == [[content]]
    assert refused(tmp_path / "x.bin", FLOATS)[0] == exits.Exit.FILE


def test_a_text_without_lines(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n")
    assert refused(tmp_path / "x.txt", TEXTS)[1] == f"cannot read {tmp_path}/x.txt: it holds no text"


# --- images --------------------------------------------------------------------------------------------------

GREY = np.arange(30, dtype=np.uint8).reshape(5, 6)
COLOUR = np.arange(90, dtype=np.uint8).reshape(5, 6, 3)


def picture(path: Path, array: np.ndarray, kind: str = "png") -> Path:
    image = pytest.importorskip("PIL.Image")
    path = path / f"x.{kind}"
    image.fromarray(array).save(path)
    return path


def image_model(*shape: int, datatype: str = "FP32", max_batch_size: int = 8) -> wire.ModelInfo:
    return model(wire.TensorSpec("pixels", datatype, shape), max_batch_size=max_batch_size)


@pytest.mark.parametrize(
    ("shape", "batches", "expected"),
    [
        ((-1, 3, 5, 6), 8, COLOUR.transpose(2, 0, 1)[None]),
        ((-1, 3, -1, -1), 8, COLOUR.transpose(2, 0, 1)[None]),
        ((-1, 5, 6, 3), 8, COLOUR[None]),
        ((3, -1, -1), 0, COLOUR.transpose(2, 0, 1)),
        ((1, 3, 5, 6), 0, COLOUR.transpose(2, 0, 1)[None]),
        ((-1, -1, -1, 3), 0, COLOUR[None]),
    ],
)
def test_a_colour_image_has_the_layout_of_the_model(
    tmp_path: Path, shape: tuple[int, ...], batches: int, expected: np.ndarray
) -> None:
    (array,) = sent(picture(tmp_path, COLOUR), image_model(*shape, max_batch_size=batches)).values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("shape", "batches", "expected"),
    [
        ((-1, 5, 6), 8, GREY[None]),
        ((-1, 1, 5, 6), 8, GREY[None, None]),
        ((5, 6), 0, GREY),
        ((-1, 5, 6), 0, GREY[None]),
    ],
)
def test_a_grey_image_has_the_layout_of_the_model(
    tmp_path: Path, shape: tuple[int, ...], batches: int, expected: np.ndarray
) -> None:
    info = image_model(*shape, datatype="UINT8", max_batch_size=batches)
    (array,) = sent(picture(tmp_path, GREY, "bmp"), info).values()
    np.testing.assert_array_equal(array, expected)


def test_an_image_on_standard_input(tmp_path: Path) -> None:
    (array,) = sent("-", image_model(-1, 5, 6), stdin=picture(tmp_path, GREY, "tiff").read_bytes()).values()
    np.testing.assert_array_equal(array, GREY[None])


def test_deep_grey_keeps_its_values(tmp_path: Path) -> None:
    deep = GREY.astype(np.uint16) * 1000
    (array,) = sent(picture(tmp_path, deep), image_model(-1, 5, 6)).values()
    np.testing.assert_array_equal(array, deep[None])
    assert "more than 8 bits" in refused(picture(tmp_path, deep), image_model(-1, 3, 5, 6))[1]


def test_an_image_is_never_resized(tmp_path: Path) -> None:
    path = picture(tmp_path, COLOUR)
    code, sentence = refused(path, image_model(-1, 3, 224, 224))
    assert code == exits.Exit.REFUSED
    assert sentence == (
        f"{path} is 6 x 5 pixels, and input 'pixels' takes 224 x 224: resize it first, that is never done here"
    )


@pytest.mark.parametrize(
    ("info", "why"),
    [
        (image_model(-1, 64), "which is none"),
        (image_model(-1, 7, 5, 6), "which is none"),
        (PAIR, "takes 2 inputs"),
        (image_model(-1, 5, 6, datatype="INT8"), None),
    ],
)
def test_a_model_that_takes_no_image(tmp_path: Path, info: wire.ModelInfo, why: str | None) -> None:
    if why is None:
        assert "takes INT8, which cannot hold 226" in refused(picture(tmp_path, GREY + np.uint8(226)), info)[1]
    else:
        code, sentence = refused(picture(tmp_path, COLOUR), info)
        assert code == exits.Exit.REFUSED
        assert why in sentence


def test_transparency_is_not_dropped(tmp_path: Path) -> None:
    glass = np.dstack([COLOUR, np.full((5, 6), 128, np.uint8)])
    path = picture(tmp_path, glass)
    assert "is transparent in parts" in refused(path, image_model(-1, 3, 5, 6))[1]
    (array,) = sent(path, image_model(-1, 4, 5, 6)).values()
    np.testing.assert_array_equal(array[0], glass.transpose(2, 0, 1))
    glass[..., 3] = 255
    (array,) = sent(picture(tmp_path, glass), image_model(-1, 3, 5, 6)).values()
    np.testing.assert_array_equal(array[0], COLOUR.transpose(2, 0, 1))


def test_a_damaged_image_and_one_of_several(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    whole = picture(tmp_path, COLOUR).read_bytes()
    (tmp_path / "x.png").write_bytes(whole[:40])
    assert refused(tmp_path / "x.png", image_model(-1, 3, 5, 6))[0] == exits.Exit.FILE
    frames = [image.fromarray(GREY), image.fromarray(GREY[::-1])]
    moving = io.BytesIO()
    frames[0].save(moving, "gif", save_all=True, append_images=frames[1:])
    (tmp_path / "x.gif").write_bytes(moving.getvalue())
    assert "it has 2 images" in refused(tmp_path / "x.gif", image_model(-1, 5, 6))[1]


def test_without_pillow_the_sentence_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(exits.FileProblem, match=re.escape(f"{shlex.quote(sys.executable)} -m pip install pillow")):
        sources.read(str(tmp_path / "x.png")).fitted(image_model(-1, 5, 6), cast=False)
