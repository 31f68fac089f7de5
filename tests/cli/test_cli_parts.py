"""The parts of the command tool that need no daemon: files, numbers, text, exit codes, generated inputs."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import pytest

from fake_daemon import DIGITS, MLP, TIMING
from tnxctl import arguments, casting, durations, encoder
from tnxctl.cli import exits, inputs, options, report, sources, tensorfiles, text
from tnxctl.cli.tally import Tally
from tnxctl.cli.workload import Answer
from tnxctl.protocol import errors, wire
from tnxctl.protocol.frames import STORAGE
from tnxctl.results import Result

# --- files ---------------------------------------------------------------------------------------------------


def read(path: str) -> dict[str, np.ndarray]:
    return sources.read(path).tensors


def write(path: str, tensors: dict[str, np.ndarray]) -> None:
    with tensorfiles.destination(path) as write_to_it:
        write_to_it(tensors)


def save(path: Path, array: np.ndarray, **options: bool) -> bytes:
    with path.open("wb") as stream:
        np.save(stream, array, **options)
    return path.read_bytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
        np.array([True, False]),
        np.array(3, np.int64),
        np.zeros((0, 64), np.float32),
    ],
    ids=["C order", "Fortran order", "bool", "no axis", "no rows"],
)
def test_one_tensor_comes_back_from_a_file(tmp_path: Path, array: np.ndarray) -> None:
    path = str(tmp_path / "x.npy")
    write(path, {"any": array})
    (back,) = read(path).values()
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_several_tensors_keep_their_names_even_those_that_numpy_cannot_save(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npz")
    tensors = {"file": np.arange(3), "a/b": np.ones((2, 2), np.float16), "": np.zeros(1, np.uint8)}
    write(path, tensors)
    back = read(path)
    assert list(back) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)


def test_what_numpy_saves_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=np.arange(3), b=np.ones(2))
    assert {name: array.shape for name, array in read(str(tmp_path / "x.npz")).items()} == {
        "a": (3,),
        "b": (2,),
    }


def test_a_big_endian_file_becomes_native(tmp_path: Path) -> None:
    save(tmp_path / "x.npy", np.array([1.5, 2.5], ">f4"))
    (array,) = read(str(tmp_path / "x.npy")).values()
    assert array.dtype == np.float32
    assert array.tolist() == [1.5, 2.5]


def test_bfloat16_is_written_as_float32(tmp_path: Path) -> None:
    path = str(tmp_path / "x.npy")
    write(path, {"y": np.array([1.5, -2.0], ml_dtypes.bfloat16)})
    assert np.load(path).dtype == np.float32
    assert np.load(path).tolist() == [1.5, -2.0]


def test_several_outputs_do_not_go_into_one_npy(tmp_path: Path) -> None:
    with pytest.raises(exits.FileProblem, match=r"2 outputs \(a, b\).*use \.npz"):
        write(str(tmp_path / "x.npy"), {"a": np.zeros(1), "b": np.zeros(1)})
    assert not (tmp_path / "x.npy").exists()


def test_what_was_in_a_file_stays_until_there_is_something_else(tmp_path: Path) -> None:
    old = save(tmp_path / "old.npy", np.arange(100))
    with pytest.raises(errors.Internal), tensorfiles.destination(str(tmp_path / "old.npy")):
        raise errors.Internal("no answer")
    assert (tmp_path / "old.npy").read_bytes() == old
    write(str(tmp_path / "old.npy"), {"y": np.zeros(1)})
    assert np.load(tmp_path / "old.npy").tolist() == [0.0]


def test_a_file_that_was_made_for_an_answer_goes_without_one(tmp_path: Path) -> None:
    with tensorfiles.destination(str(tmp_path / "new.npy")):
        assert (tmp_path / "new.npy").exists()
    assert not (tmp_path / "new.npy").exists()


class Boom:
    """Raises when it is unpickled: a test fails loudly if that ever happens."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemError('unpickled')",))


def bad_files(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    good = save(tmp_path / "good.npy", np.arange(100, dtype=np.float32))
    objects = save(tmp_path / "objects.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "good.npz", a=np.arange(100))
    archive = (tmp_path / "good.npz").read_bytes()
    with_objects, foreign, empty = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(with_objects, "w") as members:
        members.writestr("a.npy", objects)
    with zipfile.ZipFile(foreign, "w") as members:
        members.writestr("hello.txt", "hello")
    with zipfile.ZipFile(empty, "w"):
        pass
    header = good[: good.index(b"\n") + 1]
    return {
        "empty": (b"", "is empty"),
        "text": (b"1,2,3\n", "none of .npy, .npz, .json, .csv and images"),
        "pickle": (pickle.dumps(Boom()), "none of .npy, .npz, .json, .csv and images"),
        "objects": (objects, "never loaded"),
        "magic only": (good[:6], "cannot read"),
        "cut header": (good[:40], "cannot read"),
        "cut data": (good[:-1], "cannot read"),
        "too much": (good + b"!", "1 bytes follow"),
        "open bracket": (header.replace(b"}", b"("), "cannot read"),
        "huge": (header.replace(b"(100,)", b"(10**9,)").replace(b"10**9", b"9" * 15), "cannot read"),
        "unknown version": (good[:6] + b"\x09\x00" + good[8:], "cannot read"),
        "cut archive": (archive[:-10], "cannot read"),
        "damaged archive": (archive[:120] + b"\xff" * 40 + archive[160:], "cannot read"),
        "objects in archive": (with_objects.getvalue(), "never loaded"),
        "foreign archive": (foreign.getvalue(), "hello.txt"),
        "empty archive": (empty.getvalue(), "no tensors"),
    }


BAD_FILES = (
    *("empty", "text", "pickle", "objects", "magic only", "cut header", "cut data", "too much", "open bracket", "huge"),
    *("unknown version", "cut archive", "damaged archive", "objects in archive", "foreign archive", "empty archive"),
)


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_sentence(tmp_path: Path, kind: str) -> None:
    content, expected = bad_files(tmp_path)[kind]
    path = tmp_path / "bad.npy"
    path.write_bytes(content)
    with pytest.raises(exits.FileProblem) as problem:
        read(str(path))
    assert str(path) in str(problem.value)
    assert expected in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("name", ["missing.npy", "."])
def test_a_path_that_cannot_be_read_or_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(exits.FileProblem, match="cannot read"):
        read(str(tmp_path / name))
    with pytest.raises(exits.FileProblem, match="cannot write"):
        write(str(tmp_path / "no such folder" / "x.npy"), {"y": np.zeros(1)})


# --- generated and converted inputs --------------------------------------------------------------------------


def model(*specs: wire.TensorSpec, max_batch_size: int = 8) -> wire.ModelInfo:
    return wire.ModelInfo(name="m", version="1", status="ready", inputs=specs, max_batch_size=max_batch_size)


def generate(info: wire.ModelInfo, batch_size: int | None = None, input_dim: int | None = None, seed: int = 0):
    return inputs.random_inputs(info, batch_size=batch_size, input_dim=input_dim, seed=seed)


def test_random_inputs_fit_the_signature() -> None:
    assert generate(MLP)["input"].shape == (1, 256)
    assert generate(MLP, batch_size=4)["input"].shape == (4, 256)
    assert generate(MLP, batch_size=4, input_dim=7)["input"].shape == (4, 7)
    free = model(wire.TensorSpec("x", "FP32", (-1, -1, 3)), wire.TensorSpec("n", "INT64", ()), max_batch_size=0)
    assert {name: array.shape for name, array in generate(free).items()} == {"x": (1, 1, 3), "n": ()}


def test_a_model_that_is_not_loaded_takes_what_nobody_knows() -> None:
    assert inputs.known(MLP) is MLP
    failed = wire.ModelInfo(name="m", version="2", status="failed", error="m/2/model.pt2: incomplete")
    with pytest.raises(errors.FailedPrecondition, match=r"'m@2' is not loaded: m/2/model\.pt2: incomplete"):
        inputs.known(failed)
    with pytest.raises(errors.FailedPrecondition, match="'m@2' is unloaded; tnxctl models load m@2"):
        inputs.known(wire.ModelInfo(name="m", version="2", status="unloaded"))
    with pytest.raises(errors.Unavailable, match="'m@2' is still being loaded"):
        inputs.known(wire.ModelInfo(name="m", version="2", status="starting"))


@pytest.mark.parametrize("datatype", STORAGE)
def test_random_inputs_have_the_datatype(datatype: str) -> None:
    array = generate(model(wire.TensorSpec("x", datatype, (-1, 64))))["x"]
    assert array.dtype == (ml_dtypes.bfloat16 if datatype == "BF16" else STORAGE[datatype])
    assert len(np.unique(array)) > 1
    if array.dtype.kind in "biu":
        assert set(array.ravel().tolist()) <= {0, 1}


def test_the_same_seed_gives_the_same_inputs() -> None:
    np.testing.assert_array_equal(generate(MLP)["input"], generate(MLP)["input"])
    assert (generate(MLP)["input"] != generate(MLP, seed=1)["input"]).any()


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (model(wire.TensorSpec("x", "FP32", (3,)), max_batch_size=0), {"batch_size": 2}, "takes no batch axis"),
        (model(wire.TensorSpec("x", "FP32", (-1,))), {"input_dim": 2}, "no axis but the rows"),
        (MLP, {"batch_size": 10**12}, "too large"),
    ],
)
def test_options_that_do_not_apply(info: wire.ModelInfo, options: dict[str, int], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        generate(info, **options)


def test_a_datatype_from_the_future() -> None:
    with pytest.raises(errors.Unimplemented, match="FP8"):
        generate(model(wire.TensorSpec("x", "FP8", (-1, 3))))


def test_cast_converts_what_the_signature_names() -> None:
    scans = np.arange(64, dtype=np.float64).reshape(1, 64)
    for name in ("", "image"):
        assert casting.cast({name: scans}, DIGITS)[name].dtype == np.float32
    assert casting.cast({"other": scans}, DIGITS)["other"] is scans


# --- numbers -------------------------------------------------------------------------------------------------


def result(device: str = "cpu", reason: str = "because", **outputs: np.ndarray) -> Result:
    return Result(
        outputs=outputs,
        model="mlp",
        version="1",
        device=device,
        reason=reason,
        batch_size=4,
        latency_ms=0.1,
        gpu_memory_mb=0.0,
        timing=TIMING,
        predicted_us=150.0,
    )


def test_a_tally_counts() -> None:
    tally = Tally(planned=103, concurrency=1)
    for index in range(1, 101):
        tally.add(Answer(index, float(index), result(device="cuda:0" if index % 4 == 0 else "cpu")))
    for index in range(101, 104):
        tally.add(Answer(index, 1e6, errors.ResourceExhausted(f"full {index}")))
    tally.elapsed_s = 2.0
    assert (tally.answered, tally.failed, tally.rate) == (100, 3, 50.0)
    assert tally.percentiles_ms() == {"p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert tally.devices == {"cpu": 75, "cuda:0": 25}
    assert tally.versions == {("mlp", "1"): 100}
    assert tally.batch_mean() == 4.0
    assert tally.stage_means_us()["compute"] == pytest.approx(TIMING.compute_us)
    assert tally.prediction_errors_us() == {"p50": 25.0, "p90": 25.0, "p99": 25.0, "max": 25.0}
    assert tally.prediction_means_us() == (150.0, 125.0)
    assert tally.errors["RESOURCE_EXHAUSTED"].message == "full 103"
    assert report.document(tally)["errors"] == [{"code": "RESOURCE_EXHAUSTED", "count": 3, "message": "full 103"}]


def test_a_tally_without_a_result_has_no_times() -> None:
    tally = Tally(planned=2, concurrency=1)
    assert (tally.percentiles_ms(), tally.stage_means_us(), tally.batch_mean(), tally.rate) == ({}, {}, 0.0, 0.0)
    assert tally.prediction_errors_us() == {}
    assert list(report.summary(tally)) != []


@pytest.mark.parametrize(("count", "p99"), [(1, 1.0), (2, 2.0), (99, 99.0), (100, 99.0), (101, 100.0)])
def test_percentiles_are_nearest_ranks(count: int, p99: float) -> None:
    tally = Tally(count, 1)
    for index in range(count, 0, -1):
        tally.add(Answer(index, float(index), result()))
    assert tally.percentiles_ms()["p99"] == p99


@pytest.mark.parametrize(
    ("answered", "failures", "code"),
    [
        (5, [], 0),
        (0, [], 0),
        (0, [errors.DeadlineExceeded("x")], 6),
        (1, [errors.DeadlineExceeded("x")], 1),
        (0, [errors.InvalidArgument("x"), errors.NotFound("x")], 5),
        (0, [errors.InvalidArgument("x"), errors.DeadlineExceeded("x")], 1),
        (0, [errors.Internal("x")], 1),
    ],
)
def test_exit_code_of_several_requests(answered: int, failures: list[errors.TensorNextError], code: int) -> None:
    assert exits.of_run(answered, failures) == code


# --- options -------------------------------------------------------------------------------------------------


def test_the_limits_of_the_options_are_those_of_the_client() -> None:
    assert encoder.DEFAULT_TIMEOUT_S == options.DEFAULT_TIMEOUT_S
    assert arguments.MAX_DEADLINE_S == options.MAX_DEADLINE_S
    assert encoder.LOAD_TIMEOUT_S == options.LOAD_TIMEOUT_S
    assert wire.LOWEST_PRIORITY == options.LOWEST_PRIORITY


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("50ms", 0.05),
        ("0.05s", 0.05),
        (".5 ms", 0.0005),
        ("200us", 0.0002),
        ("200µs", 0.0002),
        ("200μs", 0.0002),
        ("2s", 2.0),
        ("2", 2.0),
        ("1e-3", 0.001),
        (" 5E1ms ", 0.05),
        ("86400", 86_400.0),
    ],
)
def test_durations_are_read(given: str, seconds: float) -> None:
    assert options.Duration(most=86_400.0).convert(given, None, None) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "given", ["", "ms", "5 m", "5MS", "1h", "5msec", "nan", "inf", "0x5", "1_0", "5ms5ms", "--5", "٥½"]
)
def test_bad_durations_are_told_apart(given: str) -> None:
    with pytest.raises(click.BadParameter, match=r"is not a duration: 50ms, 200us and 0\.05s are"):
        options.Duration(most=86_400.0).convert(given, None, None)


@pytest.mark.parametrize("given", ["0", "0ms", "-1s", "-0.0", "86400.1", "1e400", "1e-400"])
def test_durations_have_a_range(given: str) -> None:
    with pytest.raises(click.BadParameter, match=f"'{given}' is not in the range above 0 and up to 86400 s"):
        options.Duration(most=86_400.0).convert(given, None, None)


@pytest.mark.parametrize("given", ["0", "-1s", "1e400", "1e-400"])
def test_durations_without_a_limit_are_finite(given: str) -> None:
    assert options.Duration().convert("1e9", None, None) == 1e9
    with pytest.raises(click.BadParameter, match=rf"'{given}' is not in the range above 0\."):
        options.Duration().convert(given, None, None)


@pytest.mark.parametrize(
    ("seconds", "spelled"),
    [
        (1e-6, "1 us"),
        (0.0002, "200 us"),
        (0.02, "20 ms"),
        (1.0, "1 s"),
        (2.5, "2.5 s"),
        (600.0, "600 s"),
        (0.1, "100 ms"),
    ],
)
def test_durations_are_spelled_as_they_are_read(seconds: float, spelled: str) -> None:
    assert durations.spell(seconds) == spelled
    assert durations.read(spelled) == pytest.approx(seconds)


# --- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "room", "expected"),
    [
        (np.array([[1.0, 2.0]]), None, "1 2"),
        (np.arange(9), None, "0 1 2 …"),
        (np.arange(9), 8, "0 1 2 …"),
        (np.arange(4), 7, "0 1 2 3"),
        (np.arange(4), 6, "0 1 …"),
        (np.array([1e-9, np.nan, -np.inf], np.float16), None, "0 nan -inf"),
        (np.array([0.123456, 1.5], ml_dtypes.bfloat16), None, "0.124 1.5"),
        (np.array([True, False]), None, "True False"),
        (np.zeros((0, 3)), None, ""),
        (np.arange(4), 1, "…"),
        (np.arange(4), -5, "…"),
    ],
)
def test_preview_of_values(array: np.ndarray, room: int | None, expected: str) -> None:
    assert report.preview(array, room) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.84, "840 ms"),
        (1.25, "1.2 s"),
        (42.0, "42 s"),
        (125, "2 min 5 s"),
        (7509, "2 h 5 min"),
        (90061, "1 d 1 h"),
        (9.96, "10.0 s"),
    ],
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_a_table_is_aligned_and_cut() -> None:
    lines = text.table(("A", "N", "LAST"), [("x", "1", "short"), ("yyy", "10", "very long")], "<><", width=16)
    assert [click.unstyle(line) for line in lines] == ["A     N  LAST", "x     1  short", "yyy  10  very l…"]


def test_the_widest_of_the_flexible_columns_gives_way_first() -> None:
    row = ("name of it", "first of two", "the second, longer one", "12 MiB")

    def table(width: int) -> list[str]:
        lines = text.table(("A", "FIRST", "SECOND", "LAST"), [row], "<<<>", width, ("FIRST", "SECOND"))
        return [click.unstyle(line) for line in lines]

    assert table(46) == [
        "A           FIRST         SECOND          LAST",
        "name of it  first of two  the second,…  12 MiB",
    ]
    assert table(30) == [
        "A           FIR…  SEC…    LAST",
        "name of it  fir…  the…  12 MiB",
    ]
    assert table(1)[1] == "name of it  …  …  12 MiB", "the other columns stay whole"


def test_a_tensor_without_a_name_is_called_so() -> None:
    assert text.tensor(wire.TensorSpec("", "FP32", (-1, 3))) == "(unnamed) FP32 [-1,3]"


def test_a_peer_cannot_steer_the_terminal() -> None:
    assert text.clean("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert text.clean("grün µs") == "grün µs"
