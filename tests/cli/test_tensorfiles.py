"""Files of tensors: what is written comes back, what numpy saves is read, and a bad file is one sentence."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tnxctl.cli import exits, sources, tensorfiles
from tnxctl.protocol import errors
from tnxctl.protocol.strings import array_of


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


# --- strings -------------------------------------------------------------------------------------------------


def words(*elements: bytes) -> np.ndarray:
    return array_of(elements, (len(elements),))


def test_strings_in_files(tmp_path: Path) -> None:
    write(str(tmp_path / "y.npy"), {"y": words(b"a", "wölf".encode(), b"")})
    assert read(str(tmp_path / "y.npy"))[""].tolist() == [b"a", "wölf".encode(), b""]
    write(str(tmp_path / "y.npz"), {"y": words(b""), "z": np.ones(1)})
    assert read(str(tmp_path / "y.npz"))["y"].tolist() == [b""]
    write(str(tmp_path / "y.txt"), {"y": words(b"a", b"", "wölf".encode())})
    assert (tmp_path / "y.txt").read_bytes() == "a\n\nwölf\n".encode()


@pytest.mark.parametrize(
    ("name", "tensors", "why"),
    [
        ("y.npy", {"y": words(b"a\0")}, "in y, a string ends with a zero byte, which numpy would drop"),
        ("y.txt", {"y": words(b"a\nb")}, "a string has a line break in it: use .npy"),
        ("y.txt", {"y": np.ones(1)}, "a .txt file holds one output of strings: use .npz"),
        ("y.txt", {"y": words(b"a"), "z": words(b"b")}, "a .txt file holds one output of strings: use .npz"),
        ("y.txt", {"y": words(b"a", b"b").reshape(1, 2)}, "a line holds one string, and shape [1, 2] has more"),
    ],
)
def test_strings_that_a_file_cannot_hold(tmp_path: Path, name: str, tensors: dict[str, np.ndarray], why: str) -> None:
    with pytest.raises(exits.FileProblem) as problem:
        write(str(tmp_path / name), tensors)
    assert why in str(problem.value)
    assert not (tmp_path / name).exists()


def test_one_long_string_among_many_short_ones_is_no_file_of_gigabytes(tmp_path: Path) -> None:
    with pytest.raises(exits.FileProblem, match="70000 strings would take 20000 bytes each"):
        write(str(tmp_path / "y.npy"), {"y": words(b"x" * 20_000, *[b"a"] * 69_999)})
