"""A scan of a model repository: what it finds, and how it names mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tnxctl.cli import modeltoml
from tnxctl.protocol.errors import InvalidArgument, PermissionDenied
from tnxd.models import repository, settings
from tnxd.models.file_formats import FILES, PIPELINE
from tnxd.models.settings import Settings

PROGRAM = {"model.pt2": ""}
SIGNATURE = """
[[inputs]]
name = "x"
datatype = "FP32"
shape = [-1, 4]
[[outputs]]
name = "y"
datatype = "FP32"
shape = [-1, 4]
"""


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with one good model in it."""
    write(tmp_path, {"good/1/model.pt2": "", "good/2/model.pt2": "", "good/10/model.pt2": ""})
    return tmp_path


# --- what is there -------------------------------------------------------------------------------------------


def test_versions_are_numbers_and_the_newest_is_wanted(root: Path) -> None:
    catalog = repository.scan(root)
    assert catalog.failures == {}
    good = catalog.entries["good"]
    assert list(good.sources) == ["1", "2", "10"]
    assert good.wanted == ("10",)
    source = good.sources["2"]
    assert (source.name, source.version, source.format) == ("good", "2", "pt2")


@pytest.mark.parametrize(
    ("versions", "wanted"),
    [("", ("10",)), ('versions = "all"', ("1", "2", "10")), ("versions = [10, 1]", ("1", "10"))],
)
def test_model_toml_says_which_versions(root: Path, versions: str, wanted: tuple[str, ...]) -> None:
    write(root, {"good/model.toml": versions})
    assert repository.scan(root).entries["good"].wanted == wanted


def test_traffic(root: Path) -> None:
    text = 'versions = "all"\n[traffic]\nweights = { "1" = 95, "2" = 5 }\nshadow = "10"'
    write(root, {"good/model.toml": text})
    good = repository.scan(root).entries["good"]
    assert (good.weights, good.shadow) == ({"1": 95.0, "2": 5.0}, "10")


def test_every_format_is_known_by_its_file(tmp_path: Path) -> None:
    files = {file: kind for file, kind in FILES.items() if kind is not PIPELINE}  # models by themselves
    write(tmp_path, {f"m/{number}/{file}": "12345" for number, file in enumerate(files, 1)})
    write(tmp_path, {"m/model.toml": 'factory = "net:make"\n' + SIGNATURE})
    catalog = repository.scan(tmp_path)
    assert catalog.failures == {}
    sources = catalog.entries["m"].sources
    assert [source.format for source in sources.values()] == [each.name for each in files.values()]
    assert {source.nbytes for source in sources.values()} == {5}


def test_what_belongs_to_others_is_passed_over(root: Path) -> None:
    write(
        root,
        {
            ".git/HEAD": "",
            "__pycache__/x.pyc": "",
            "good/.staged/model.pt2": "",
            "good/__pycache__/x.pyc": "",
            "good/README.md": "",
            "good/shared/__init__.py": "",
            "good/1/labels.txt": "",
        },
    )
    catalog = repository.scan(root)
    assert (list(catalog.entries), catalog.failures) == (["good"], {})


def test_scanning_imports_no_torch(root: Path) -> None:
    code = "import sys; from pathlib import Path; from tnxd.models import repository; "
    code += f"repository.scan(Path({str(root)!r})); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- the stamp -----------------------------------------------------------------------------------------------


def stamps(root: Path) -> dict[str, str]:
    return {version: source.stamp for version, source in repository.scan(root).entries["good"].sources.items()}


def test_a_stamp_stays_until_something_changes_that_a_load_would_read(root: Path) -> None:
    write(root, {"good/model.toml": "priority = 2", "good/1/labels.txt": "a", "good/net.py": ""})
    before = stamps(root)
    write(root, {"good/model.toml": 'priority = 2\nversions = "all"\n[traffic]\nshadow = "1"', "good/README": ""})
    assert stamps(root) == before
    write(root, {"good/1/labels.txt": "b"})
    after = stamps(root)
    assert after["1"] != before["1"]
    assert after["2"] == before["2"]
    write(root, {"good/model.toml": "priority = 3"})
    assert not set(stamps(root).values()) & set(after.values())


def test_shared_modules_are_a_part_of_weights_only(root: Path) -> None:
    """And of those without a manifest: it would not list them."""
    write(
        root,
        {
            "good/model.toml": 'factory = "net:make"\n' + SIGNATURE,
            "good/3/model.safetensors": "",
            "good/4/model.safetensors": "",
            "good/4/SHA256SUMS": "",
            "good/net.py": "",
        },
    )
    before = stamps(root)
    write(root, {"good/net.py": "# other"})
    assert {version for version, stamp in stamps(root).items() if stamp != before[version]} == {"3"}


# --- mistakes in one model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "where", "said"),
    [
        ({"bad/v2/model.pt2": ""}, "bad/v2", "'v2' is no version"),
        ({"bad/0/model.pt2": ""}, "bad/0", "'0' is no version"),
        ({"bad/01/model.pt2": ""}, "bad/01", "'01' is no version"),
        ({"bad": "text"}, "bad", "bad is a file"),
        ({"b d/1/model.pt2": ""}, "b d", "'b d' is no name"),
        ({"x" * 65 + "/1/model.pt2": ""}, "x" * 65, "is no name"),
        ({"bad/README": ""}, "bad", "bad has no version"),
        ({"bad/1/model.pt2": "", "bad/1/model.onnx": ""}, "bad@1", "model.pt2 and model.onnx is"),
        (
            {"bad/1/weights.bin": ""},
            "bad@1",
            "bad/1: exactly one of model.pt2, model.safetensors, ",
        ),
        ({"bad/model.toml": "= 1", "bad/1/model.pt2": ""}, "bad", "bad/model.toml: not TOML"),
        ({"bad/1/model.safetensors": ""}, "bad@1", "bad/model.toml: factory"),
        ({"bad/1/model.pt": ""}, "bad@1", "bad/model.toml: inputs"),
        ({"bad/model.toml": "versions = [7]", "bad/1/model.pt2": ""}, "bad@7", "versions: there is no bad/7"),
    ],
)
def test_a_mistake_is_named_and_hides_nothing_else(root: Path, files: dict[str, str], where: str, said: str) -> None:
    write(root, files)
    catalog = repository.scan(root)
    assert "good" in catalog.entries
    assert "bad" not in catalog.entries
    assert said in catalog.failures[where]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_batch_size = -1", "max_batch_size: expected int >= 0, not -1"),
        ('max_batch_size = "8"', "max_batch_size: expected int"),
        ("max_batchsize = 8", "max_batchsize: unknown key"),
        ("[traffic]\nweight = 1", "traffic.weight: unknown key"),
        ('[traffic]\nweights = { "7" = 1 }', "traffic.weights.7: there is no bad/7"),
        ('[traffic]\nweights = { "1" = 1 }', 'traffic.weights.1: version 1 is not loaded: versions = "latest"'),
        ('[traffic]\nweights = { "2" = -1 }', "traffic.weights"),
        ('[traffic]\nweights = { "2" = 0 }', "traffic.weights: at least one"),
        ('[traffic]\nshadow = "7"', "traffic.shadow: there is no bad/7"),
        ('versions = "newest"', "versions: expected one of all, latest, not 'newest'"),
        ("versions = []", "versions"),
        ("versions = [0]", "versions[0]"),
        ('devices = ["tpu"]', "devices: 'tpu'"),
        ('dtype = "int8"', "dtype: expected one of"),
        ('dtype = "float16"', "dtype: bad/1/model.pt2 was saved to run in its own"),
        ('optimize = "yes"', "optimize: expected one of auto, channels_last, inductor, none, onnxruntime"),
        ("warm_up = [0]", "warm_up[0]: expected int >= 1, not 0"),
        ("time_limit_s = 0", "time_limit_s"),
        ("time_limit_s = nan", "time_limit_s"),
        ("deadline_us = -1.0", "deadline_us"),
        ("priority = 4", "priority: expected int <= 3, not 4"),
        ("replicas = -1", "replicas"),
        ('factory = "net"', "factory: 'net' is not \"module:function\""),
        ('factory = "../net:make"', "factory"),
        ('[[inputs]]\nname = "x"\ndatatype = "FP32"', "inputs[0].shape: is missing"),
        ('[[inputs]]\nname = "x"\ndatatype = "FLOAT"\nshape = []', "inputs[0].datatype: expected one of BOOL"),
        ('[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-2]', "inputs[0].shape[0]: expected int >= -1, not -2"),
        ('[[inputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1]\nexample = [2, 2]', "inputs[0].example: [2, 2]"),
        ('[[outputs]]\nname = "x"\ndatatype = "FP32"\nshape = [-1]\nexample = [2]', "outputs[0].example"),
        (SIGNATURE + SIGNATURE, "inputs[1].name: 'x' stands there twice"),
    ],
)
def test_a_mistake_in_model_toml_is_named_with_file_and_key(root: Path, text: str, said: str) -> None:
    write(root, {"bad/1/model.pt2": "", "bad/2/model.pt2": "", "bad/model.toml": text})
    catalog = repository.scan(root)
    assert list(catalog.entries) == ["good"]
    failures = "\n".join(catalog.failures.values())
    assert "bad/model.toml: " in failures
    assert said in failures


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("model.onnx", 'optimize = "inductor"', "optimize: bad/1/model.onnx has no variant 'inductor'"),
        ("model.pt", 'optimize = "onnxruntime"' + SIGNATURE, "optimize: bad/1/model.pt has no variant 'onnxruntime'"),
        ("model.onnx", 'dtype = "bfloat16"', "dtype: bad/1/model.onnx"),
        ("model.onnx", 'devices = ["cuda"]', "devices: bad/1/model.onnx runs on the CPU alone"),
    ],
)
def test_a_setting_that_a_format_cannot_keep_is_refused(root: Path, file: str, text: str, said: str) -> None:
    write(root, {f"bad/1/{file}": "", "bad/model.toml": text})
    assert said in repository.scan(root).failures["bad@1"]


def test_a_broken_version_leaves_the_others(root: Path) -> None:
    write(root, {"good/11/README": "", "good/model.toml": '[traffic]\nweights = { "11" = 5, "10" = 95 }'})
    catalog = repository.scan(root)
    assert list(catalog.failures) == ["good@11"]
    assert catalog.entries["good"].wanted == ("10",)
    assert catalog.entries["good"].weights == {"10": 95.0}


def test_a_missing_version_of_a_list_leaves_the_others(root: Path) -> None:
    write(root, {"good/model.toml": "versions = [2, 7]"})
    catalog = repository.scan(root)
    assert catalog.failures == {"good@7": "good/model.toml: versions: there is no good/7"}
    assert catalog.entries["good"].wanted == ("2",)


def test_links_that_lead_nowhere_are_named(root: Path) -> None:
    write(root, {"good/labels.txt": "", "bad/1/README": ""})
    (root / "good/words.txt").symlink_to("labels.txt")
    (root / "model").symlink_to("nowhere")
    (root / "good/11").symlink_to("nowhere")
    (root / "good/12").symlink_to("12")
    (root / "good/lost.txt").symlink_to("nowhere")
    (root / "bad/model.toml").symlink_to("nowhere")
    catalog = repository.scan(root)
    assert "leads nowhere" in catalog.failures.pop("model")
    assert catalog.failures.pop("good@11").startswith("good/11: a link that leads nowhere")
    assert "Too many levels of symbolic links" in catalog.failures.pop("good@12")
    assert catalog.failures.pop("good/lost.txt").startswith("good/lost.txt: a link that leads nowhere")
    assert catalog.failures.pop("bad").startswith("bad: a link that leads nowhere")
    assert catalog.failures == {}
    assert list(catalog.entries["good"].sources) == ["1", "2", "10"]


def test_a_directory_that_is_called_like_a_model_file(root: Path) -> None:
    write(root, {"good/11/model.pt2/part": ""})
    assert repository.scan(root).failures == {"good@11": "good/11/model.pt2 is not a file"}


def test_a_directory_that_cannot_be_read(root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    write(root, {"bad/1/model.pt2": ""})
    (root / "bad").chmod(0)
    try:
        assert "Permission denied" in repository.scan(root).failures["bad"]
    finally:
        (root / "bad").chmod(0o700)


# --- the repository itself -----------------------------------------------------------------------------------


def test_no_repository_at_all(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="missing: No such file"):
        repository.scan(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="file is not a directory"):
        repository.scan(tmp_path / "file")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidArgument, match="loop"):
        repository.scan(tmp_path / "loop")


def test_an_empty_repository_is_none_of_our_business(tmp_path: Path) -> None:
    assert repository.scan(tmp_path) == repository.Catalog({})


def test_a_missing_manifest_is_refused_where_one_is_required(root: Path) -> None:
    catalog = repository.scan(root, require_manifest=True)
    assert set(catalog.failures) == {"good@1", "good@2", "good@10"}
    assert "good/2/SHA256SUMS is missing" in catalog.failures["good@2"]


def test_a_repository_that_others_may_write_is_refused(root: Path) -> None:
    root.chmod(0o775)
    with pytest.raises(PermissionDenied, match="chmod go-w"):
        repository.scan(root)


def test_a_model_that_vanishes_meanwhile_is_no_failure(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"gone/1/model.pt2": ""})
    iterdir = Path.iterdir

    def removed(directory: Path) -> Iterator[Path]:
        if directory.name == "gone":
            shutil.rmtree(directory)
        return iterdir(directory)

    monkeypatch.setattr(Path, "iterdir", removed)
    catalog = repository.scan(root)
    assert (list(catalog.entries), catalog.failures) == (["good"], {})


# --- the commented file of `tnxctl models init` --------------------------------------------------------------


def uncommented(text: str) -> str:
    return re.sub(r"(?m)^# (?=[a-z_]+ = |\[)", "", text)


def test_the_commented_model_toml_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(modeltoml.TEMPLATE)
    assert settings.load(path, "model.toml") == Settings()
    assert all(len(line) <= 120 for line in modeltoml.TEMPLATE.splitlines())


def test_the_commented_model_toml_names_every_key(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(uncommented(modeltoml.TEMPLATE))
    said = settings.load(path, "model.toml")
    written = msgspec.toml.decode(path.read_bytes())
    assert set(written) == set(Settings.__struct_fields__)
    assert set(written["inputs"][0]) == set(settings.Tensor.__struct_fields__)
    assert set(written["outputs"][0]) == set(settings.Tensor.__struct_fields__) - {
        "example",
        "values",
        "optional",
        "default",
    }
    assert set(written["traffic"]) == set(settings.Traffic.__struct_fields__)
    defaults = Settings()
    for key in ("versions", "optimize", "priority", "replicas"):
        assert getattr(said, key) == getattr(defaults, key)


def test_the_page_about_models_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = {key for row in re.findall(r"(?m)^\| (`.*?) \|", page) for key in re.findall(r"`\[*(\w+)\]*`", row)}
    assert set(Settings.__struct_fields__) <= rows


@pytest.mark.parametrize("kind", modeltoml.FILES)
def test_what_models_init_writes_for_a_format_is_accepted(tmp_path: Path, kind: str) -> None:
    assert modeltoml.FILES[kind] in FILES
    _, weights = modeltoml.write(str(tmp_path / "mine"), kind, force=False)
    weights.parent.mkdir()
    weights.write_bytes(b"")
    catalog = repository.scan(tmp_path)
    assert catalog.failures == {}
    assert catalog.entries["mine"].sources["1"].format == kind
