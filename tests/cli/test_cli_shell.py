"""The tool at a terminal: words completed, and progress shown."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.shell_completion import ShellComplete

from fake_daemon import DIGITS, MLP, RESNETS, FakeDaemon
from tnxctl.cli import completion, main, suggestions
from tnxctl.protocol import wire

TOOL = [sys.executable, "-m", "tnxctl.cli"]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def running() -> Iterator[FakeDaemon]:
    with FakeDaemon(models=(MLP, DIGITS, *RESNETS)) as daemon:
        yield daemon


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have completion wait for a daemon that is there but slow."""
    monkeypatch.setattr(suggestions, "_TIMEOUT_S", PATIENCE_S)


@pytest.fixture
def fake(running: FakeDaemon, patient: None) -> FakeDaemon:
    return running


def complete(*arguments: str) -> list[str]:
    """Completions of the last of the arguments, as click makes them for every shell."""
    found = ShellComplete(main, {}, "tnxctl", completion.VARIABLE).get_completions(list(arguments[:-1]), arguments[-1])
    return [item.value for item in found]


WORDS = [
    ("metadata ", ["mlp", "digits", "resnet"]),
    ("metadata d", ["digits"]),
    ("metadata resnet", ["resnet@1", "resnet@2"]),
    ("models show resnet@", ["resnet@1", "resnet@2"]),
    ("models load resnet@2", ["resnet@2"]),
    ("models unload m", ["mlp"]),
    ("models route r", ["resnet"]),
    ("models route resnet ", ["1=", "2=", "latest"]),
    ("models route resnet 1=1 --shadow ", ["1", "2"]),
    ("models compare resnet ", ["1", "2"]),
    ("models compare resnet 1 2", ["2"]),
    ("predict --model di", ["digits"]),
    ("predict --device ", ["auto", "cpu"]),
    ("bench --model di", ["digits"]),
    ("bench --device ", ["auto", "cpu"]),
]


@pytest.mark.parametrize(("line", "words"), WORDS, ids=[line for line, _ in WORDS])
def test_words_come_from_the_daemon(fake: FakeDaemon, line: str, words: list[str]) -> None:
    assert complete("--host", fake.endpoint, *line.split(" ")) == words


def test_the_daemon_is_the_one_that_the_line_names(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    assert complete("metadata", "--host", fake.endpoint, "di") == ["digits"]
    monkeypatch.setenv("TNX_HOST", fake.endpoint)
    assert complete("metadata", "di") == ["digits"]


@pytest.mark.parametrize("host", ["ipc:///nobody", "udp://nonsense"])
def test_without_a_daemon_there_are_no_words_and_no_error(host: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert complete("--host", host, "metadata", "") == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("patient")
def test_words_that_could_steer_a_terminal_are_not_suggested() -> None:
    evil = wire.ModelInfo(name="di\x1b[2J", version="1", status="ready")
    with FakeDaemon(models=(MLP, DIGITS, evil)) as fake:
        assert complete("--host", fake.endpoint, "metadata", "di") == ["digits"]


BASH = """
tnxctl() {{ {tool} "$@"; }}
env() {{ command env "${{@:1:$#-1}}" {tool}; }}   # the script calls the tool through it
compopt() {{ :; }}
{script}
for line in "$@"; do
    COMP_LINE=$line COMP_POINT=${{#line}} COMPREPLY=()
    _tnxctl_completion tnxctl
    echo "${{COMPREPLY[*]}}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_keeps_words_whole_that_it_takes_apart(fake: FakeDaemon) -> None:
    script = completion._Bash(main, {}, "tnxctl", completion.VARIABLE).source()
    patient = f"from tnxctl.cli import main, suggestions; suggestions._TIMEOUT_S = {PATIENCE_S}"
    tool = f"{shlex.quote(sys.executable)} -c '{patient}; main(prog_name=\"tnxctl\")'"
    program = BASH.format(tool=tool, script=script)
    host = f"tnxctl --host {fake.endpoint}"
    lines = ["tnxctl he", f"{host} models show resnet@", f"{host} predict --model=di", f"{host} models route resnet "]
    done = subprocess.run(["bash", "-c", program, "bash", *lines], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["health", "1 2", "digits", "1= 2= latest"]


# --- progress ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="needs a terminal of POSIX")
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("models", "load", "resnet@2"), "loading resnet@2: resnet@2 starting, "),
        (("models", "unload", "resnet"), "unloading resnet: resnet@2 starting, "),
        (("reload",), "reloading: resnet@2 starting, "),
    ],
)
def test_a_terminal_shows_what_the_daemon_is_doing(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    import pty

    loading = msgspec.structs.replace(RESNETS[1], status="starting")
    ours, theirs = pty.openpty()
    with FakeDaemon(models=(MLP, RESNETS[0], loading), looks=2, change=lambda _, models: models) as fake:
        process = subprocess.Popen(
            [*TOOL, *arguments, "--host", fake.endpoint], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # EIO: the other end is closed
            pass
        finally:
            os.close(ours)
        stdout, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    lines = shown.decode().split("\r\x1b[K")
    assert any(line.startswith(what) and line.endswith((" s", " ms")) for line in lines), lines
    assert lines[-1] == "", "the line is gone in the end"
    assert b"\x1b" not in stdout


def test_without_a_terminal_nothing_is_shown() -> None:
    with FakeDaemon(models=(MLP, *RESNETS), load_delay_s=1.0) as fake:
        done = subprocess.run(
            [*TOOL, "models", "load", "resnet@2", "--host", fake.endpoint], capture_output=True, timeout=PATIENCE_S
        )
        assert fake.requests == 1
    assert (done.returncode, done.stderr) == (0, b"")
