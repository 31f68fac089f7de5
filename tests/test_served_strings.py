"""Strings end to end: ONNX models with string tensors in a real daemon, asked by both clients, the tool and by hand."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

import string_models
from conftest import Daemon, serving_daemon
from daemons import freeze
from dealer import Dealer
from tnxctl import AsyncClient, Client
from tnxctl.protocol import wire
from tnxctl.protocol.errors import FailedPrecondition, InvalidArgument
from tool import run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

LIMIT = wire.Limits().strings


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("strings")
    string_models.save_all(root / "models")
    with serving_daemon(root / "log", "--model-repository", str(root / "models")) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def tnx(serving: Daemon) -> Iterator[Client]:
    with Client(serving.endpoint, timeout=60.0) as client:
        yield client


def texts(array: np.ndarray) -> list[str]:
    return [element.decode() for element in array.ravel().tolist()]


# --- models ----------------------------------------------------------------------------------------------------


def test_signatures_name_the_datatype(tnx: Client) -> None:
    found = {info.name: (info.status, [(spec.datatype, spec.shape) for spec in info.inputs]) for info in tnx.models()}
    assert found["echo"] == ("ready", [("BYTES", (-1,))])
    assert found["mixed"] == ("ready", [("BYTES", (-1, 1)), ("FP32", (-1, 1))])
    assert all(status == "ready" for status, _ in found.values()), found
    assert all(info.max_batch_size for info in tnx.models())


@pytest.mark.parametrize(
    "value",
    [
        ["wolf", "wölf", "", "a\0b", "日本"],
        np.array(["wolf", "wölf", "", "a\0b", "日本"]),
        np.array(["wolf", b"w\xc3\xb6lf", "", b"a\0b", "日本"], object),
        np.array(["日本", "a\0b", "", "wölf", "wolf"], object)[::-1],
    ],
    ids=["list", "U", "object", "reversed"],
)
def test_strings_come_back_as_bytes_and_as_text(tnx: Client, value: object) -> None:
    result = tnx.predict(value, model="echo")  # type: ignore[arg-type]
    assert result.output.dtype == object
    assert result.output.tolist() == [text.encode() for text in ("wolf", "wölf", "", "a\0b", "日本")]
    assert result.text().tolist() == ["wolf", "wölf", "", "a\0b", "日本"]
    assert result.text("same").tolist() == result.text().tolist()


def test_strings_become_others_numbers_and_numbers_strings(tnx: Client) -> None:
    assert tnx.predict(["a", "Bc"], model="upper").text().tolist() == ["A", "BC"]
    assert tnx.predict([["dog"], ["?"], ["cat"]], model="animals").output.tolist() == [[2], [0], [1]]
    assert tnx.predict(np.array([[2], [7]]), model="names").text().tolist() == [["dög"], ["?"]]
    assert tnx.predict([["a", "b"], ["c", "c"]], model="words").output.tolist() == [[1, 1, 0], [0, 0, 2]]


def test_the_asyncio_client_takes_and_gives_the_same(serving: Daemon) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(serving.endpoint, timeout=60) as tnx:
            inputs = await tnx.cast([["cat"]], "animals")
            assert (await tnx.predict(inputs, model="animals")).output.tolist() == [[1]]
            results = await asyncio.gather(*(tnx.predict([f"t{index}"], model="upper") for index in range(20)))
            return [text for result in results for text in result.text()]

    assert asyncio.run(ask()) == [f"T{index}" for index in range(20)]


def test_zero_rows_and_empty_axes(tnx: Client) -> None:
    assert tnx.predict(np.empty(0, object), model="echo").output.shape == (0,)
    assert tnx.predict(np.empty((0, 5), object), model="table").output.shape == (0, 5)
    assert tnx.predict(np.empty((2, 0), object), model="words").output.tolist() == [[0, 0, 0]] * 2


def test_requests_share_batches_and_keep_their_own_strings(serving: Daemon, tnx: Client) -> None:
    freeze(serving.process)  # until they are on their way
    try:
        futures = [tnx.submit([f"text {index}"] * (index % 3 + 1), model="upper") for index in range(300)]
    finally:
        serving.process.send_signal(signal.SIGCONT)
    results = [future.result() for future in futures]
    for index, result in enumerate(results):
        assert result.text().tolist() == [f"TEXT {index}"] * (index % 3 + 1)
    assert max(result.batch_size for result in results) > 3


def test_a_request_with_more_rows_than_a_batch_runs_in_pieces(tnx: Client) -> None:
    rows = [f"row {index}" for index in range(100)]  # the limit is 8
    assert tnx.predict(rows, model="upper").text().tolist() == [row.upper() for row in rows]


def test_requests_of_other_widths_do_not_share_a_batch(tnx: Client) -> None:
    futures = [tnx.submit([[f"{index}"] * (index % 4 + 1)], model="table") for index in range(40)]
    assert [future.result().output.shape for future in futures] == [(1, index % 4 + 1) for index in range(40)]


def test_an_input_that_is_left_out_gets_the_string_of_model_toml(tnx: Client) -> None:
    result = tnx.predict({"number": np.ones((2, 1), np.float32)}, model="mixed")
    assert texts(result.outputs["same"]) == ["nothing", "nothing"]
    assert result.outputs["double"].tolist() == [[2], [2]]


def test_answers_are_computed_again_and_compared(tmp_path: Path) -> None:
    from onnx import helper

    root = tmp_path / "models"
    for version, dog in ((1, "dog"), (2, "hound")):
        names = {"keys_int64s": [1, 2], "values_strings": ["cat", dog], "default_string": "?"}
        node = helper.make_node("LabelEncoder", ["numbers"], ["names"], domain="ai.onnx.ml", **names)
        inputs, outputs = [("numbers", "INT64", ["n", 1])], [("names", "STRING", ["n", 1])]
        string_models.save(root, "names", node, inputs, outputs, 'versions = "all"\naudit = 1\n', version)
    with (
        serving_daemon(tmp_path / "log", "--model-repository", str(root)) as daemon,
        Client(daemon.endpoint, timeout=60) as tnx,
    ):
        tnx.route("names", {1: 1}, shadow=2)
        found = None
        while found is None or found.requests < 8:  # copies run when there is time; the test has a limit of its own
            assert tnx.predict(np.array([[1], [2], [1], [1]]), model="names").text().ravel().tolist()[1] == "dog"
            with contextlib.suppress(FailedPrecondition):
                found = tnx.compare("names", 1, 2)
        (output,) = found.outputs
        assert (output.max_abs, output.mean_abs, output.misfits) == (1.0, 0.25, 0)
        while not (info := tnx.metadata("names@1")).audited:
            tnx.predict(np.array([[2]]), model="names@1")
        assert info.audit_differences == 0


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "value", "why"),
    [
        ("echo", [b"ok", b"\xff"], "input 'texts' takes text: row 1 is not UTF-8: byte 0xff at 0"),
        ("table", [["a", "b"], ["c", b"x\xc3"]], "takes text: element [1, 1] of row 1 is not UTF-8: byte 0xc3 at 1"),
        ("upper", [*["x"] * 20, b"\xed\xa0\x80"], "takes text: row 20 is not UTF-8"),  # in the third piece
        ("echo", np.zeros(1, np.float32), "takes BYTES, got FP32"),
        ("names", [["cat"]], "takes INT64, got BYTES"),
        ("echo", [["x"]], "takes rank 1 [-1], got rank 2 [1, 1]"),
        ("animals", [["x", "y"]], "axis 1 differs"),
    ],
)
def test_what_does_not_fit_the_model_is_named(tnx: Client, model: str, value: object, why: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tnx.predict(value, model=model)  # type: ignore[arg-type]
    assert why in caught.value.message
    assert tnx.predict(["fine"], model="upper").text().tolist() == ["FINE"]


def test_nobody_else_in_a_batch_hears_of_invalid_text(tnx: Client) -> None:
    futures = [tnx.submit([b"\xff" if index % 5 == 0 else b"fine"], model="upper") for index in range(50)]
    for index, future in enumerate(futures):
        if index % 5 == 0:
            assert isinstance(future.exception(), InvalidArgument)
        else:
            assert future.result().text().tolist() == ["FINE"]


def frame(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


HOSTILE = {
    "no frame content": (1, b"", "its frame has 0"),
    "half a length": (1, b"\1\0\0", "its frame has 3"),
    "beyond the frame": (1, frame(b"ab")[:-1], "element 0 of 1 says that it has 2 bytes, and 1 are left"),
    "negative": (1, b"\xff\xff\xff\xffab", "says that it has 4294967295 bytes, and 2 are left"),
    "the second one lies": (2, frame(b"ab") + b"\x05\0\0\0abcd", "element 1 of 2 says that it has 5 bytes"),
    "too few": (3, frame(b"abcdefgh", b"b"), "ends before the length of element 2 of 3"),
    "too many": (1, frame(b"a", b"b"), "its 1 elements take 5 bytes, its frame has 10"),
    "trailing byte": (1, frame(b"a") + b"!", "its 1 elements take 5 bytes, its frame has 6"),
    "none, but bytes": (0, b"\0\0\0\0", "its 0 elements take 0 bytes, its frame has 4"),
    "negative shape": (-1, b"", "dimension -1"),
    "more elements than bytes": (2**62, bytes(400), "elements"),
    "many empty ones": (LIMIT + 1, bytes(4 * (LIMIT + 1)), f"limit of {LIMIT} strings"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_frame_that_lies_is_refused_and_the_daemon_goes_on(serving: Daemon, kind: str) -> None:
    rows, content, why = HOSTILE[kind]
    with Dealer(serving.endpoint) as dealer:
        header = wire.Predict(v=1, id=7, model="echo", inputs=(wire.TensorSpec("texts", "BYTES", (rows,)),))
        dealer.socket.send_multipart([wire.encode(header), content])
        error = dealer.error()
        assert (error.code, error.id) == ("INVALID_ARGUMENT", 7)
        assert "tensor 'texts'" in error.message
        assert why in error.message
        dealer.predict(np.array([b"fine"], object), model="echo")
        assert dealer.result()[1][0].tolist() == [b"fine"]


def test_the_limit_of_strings_holds_for_all_tensors_together(serving: Daemon) -> None:
    with Dealer(serving.endpoint) as dealer:
        half = np.full(LIMIT // 2, b"", object)
        dealer.predict(half, model="echo")
        assert dealer.result()[1][0].size == LIMIT // 2
        dealer.predict(half, half, np.array([b""], object), names=("a", "b", "c"), model="echo")
        assert "tensor 'c'" in dealer.error().message


def test_an_answer_with_too_many_bytes_for_its_client(serving: Daemon) -> None:
    with Dealer(serving.endpoint) as dealer:
        dealer.predict(np.array([b"x" * 100], object), model="echo", max_reply_bytes=103)
        assert "the answer takes 104 bytes, more than the 103 that the client" in dealer.error().message
        dealer.predict(np.array([b"x" * 100], object), model="echo", max_reply_bytes=104)
        assert dealer.result()[1][0].tolist() == [b"x" * 100]


def test_the_limit_of_strings_is_a_setting(tmp_path: Path) -> None:
    string_models.save_all(tmp_path / "models")
    (tmp_path / "tnxd.toml").write_text("[limits]\nstrings = 2\n")
    arguments = ("--model-repository", str(tmp_path / "models"), "--config", str(tmp_path / "tnxd.toml"))
    with serving_daemon(tmp_path / "log", *arguments) as daemon, Client(daemon.endpoint, timeout=60) as tnx:
        assert tnx.predict(["a", "b"], model="echo").text().tolist() == ["a", "b"]
        with pytest.raises(InvalidArgument, match=r"3 elements \(BYTES \[3\]\) are more than the 2 that are left"):
            tnx.predict(["a", "b", "c"], model="echo")
        assert tnx.predict([["a"]], model="twice").text().tolist() == [["a", "a"]]
        with pytest.raises(InvalidArgument, match="the answer has 4 strings, more than the limit of 2 in a message"):
            tnx.predict([["a"], ["b"]], model="twice")


# --- the tool ----------------------------------------------------------------------------------------------------


def predict(serving: Daemon, *arguments: object, stdin: bytes | None = None) -> dict[str, object]:
    result = run("predict", "--host", serving.endpoint, "--timeout", 60, "--json", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    answers: list[dict[str, object]] = msgspec.json.decode(result.stdout)["answers"]
    return {output["name"]: output["data"] for output in answers[0]["outputs"]}  # type: ignore[attr-defined]


def test_the_tool_sends_a_row_for_each_line(serving: Daemon, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("hello, wörld\r\n\n[last]".encode())
    assert predict(serving, "--model", "echo", "--input", tmp_path / "x.txt") == {
        "same": ["hello, wörld", "", "[last]"]
    }
    assert predict(serving, "--model", "animals", "--input", "-", stdin=b"dog\ncat\n") == {"numbers": [[2], [1]]}


def test_the_tool_sends_json_csv_and_random_words(serving: Daemon, tmp_path: Path) -> None:
    assert predict(serving, "--model", "words", "--input", '[["a", "b"]]') == {"counts": [[1, 1, 0]]}
    (tmp_path / "x.csv").write_text('number,text\n1,"a, b"\n2,c\n')
    found = predict(serving, "--model", "mixed", "--input", tmp_path / "x.csv")
    assert found == {"same": [["a, b"], ["c"]], "double": [[2], [4]]}
    result = run(
        "predict", "--host", serving.endpoint, "--timeout", 60, "--model", "mixed", "--count", "3", "--batch-size", "2"
    )
    assert result.exit_code == 0, result.output
    assert "3 of 3 requests answered" in result.stdout
    assert "[2,1] +1" in result.stdout


def test_the_tool_writes_lines_and_arrays(serving: Daemon, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\ntwö\n")
    for name in ("y.txt", "y.npy"):
        call = (
            "predict",
            "--host",
            serving.endpoint,
            "--timeout",
            60,
            "--model",
            "upper",
            "--input",
            tmp_path / "x.txt",
        )
        assert run(*call, "--output", tmp_path / name).exit_code == 0
    assert (tmp_path / "y.txt").read_text() == "ONE\nTWö\n"
    assert np.load(tmp_path / "y.npy").tolist() == [b"ONE", "TWö".encode()]
    assert predict(serving, "--model", "echo", "--input", tmp_path / "y.npy") == {"same": ["ONE", "TWö"]}


def test_the_example_of_models_show_runs(serving: Daemon) -> None:
    result = run("models", "show", "mixed", "--host", serving.endpoint, "--timeout", 60, "--json")
    program = msgspec.json.decode(result.stdout)["example"]["python"]
    exec(compile(program, "example", "exec"), {})
