"""The tool as a process of its own: exit codes, pipes, terminals, Ctrl-C, and what importing it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fake_daemon import FakeDaemon
from patience import longer_each_time
from tnxctl.cli.exits import Exit

TOOL = [sys.executable, "-m", "tnxctl.cli"]
PATIENCE_S = 60.0  # far more than any of these takes: only so that nothing waits for ever

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, pipes or terminals")


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as running:
        yield running


def environment(**extra: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "TNX_HOST"} | extra


def patient(*arguments: object) -> list[str]:
    """A command line that waits long for the answers of a daemon, unless it says otherwise."""
    given = [*map(str, arguments)]
    is_short = given[0] in ("health", "predict") and "--timeout" not in given
    return [*TOOL, *given, *(("--timeout", f"{PATIENCE_S:g}") if is_short else ())]


def run(*arguments: object, stdin: bytes = b"", **extra: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        patient(*arguments), input=stdin, capture_output=True, env=environment(**extra), timeout=PATIENCE_S
    )


def interrupted(
    *arguments: str, when: Callable[[], bool], number: signal.Signals = signal.SIGINT
) -> tuple[bytes, bytes]:
    """Output of a tool that gets a Ctrl-C, or another signal, when `when` returns, and ends because of it."""
    command = patient(*arguments)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    try:
        assert when()
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()  # which closes its pipes: else the next test is told of them
    assert process.returncode == 128 + number
    return stdout, stderr


def test_health_in_json_from_the_environments_host(fake: FakeDaemon) -> None:
    done = run("health", "--json", TNX_HOST=fake.endpoint)
    assert (done.returncode, done.stderr) == (Exit.OK, b"")
    assert json.loads(done.stdout)["status"] == "ready"


def test_a_draining_daemon_is_not_ready() -> None:
    with FakeDaemon(status="draining") as fake:
        assert run("health", "--host", fake.endpoint).returncode == Exit.NOT_READY


def test_nobody_there(tmp_path: Path) -> None:
    done = run("health", "--host", f"ipc://{tmp_path}/nobody", "--timeout", "0.2")
    assert done.returncode == Exit.UNREACHABLE
    assert done.stdout == b""
    assert done.stderr.startswith(b"Error: ")
    assert done.stderr.count(b"\n") == 1


def test_tensors_through_pipes(fake: FakeDaemon, tmp_path: Path) -> None:
    scans = np.arange(640, dtype=np.float32).reshape(10, 64)
    np.save(tmp_path / "scans.npy", scans)
    stdin = (tmp_path / "scans.npy").read_bytes()
    done = run("predict", "--host", fake.endpoint, "--model", "digits", "--input", "-", "--output", "-", stdin=stdin)
    assert done.returncode == Exit.OK
    (tmp_path / "scores.npy").write_bytes(done.stdout)
    scores = np.load(tmp_path / "scores.npy")
    np.testing.assert_array_equal(scores, scans.sum(axis=1, keepdims=True) + np.arange(10, dtype=np.float32))
    assert b"no GPU here" in done.stderr


def test_a_truncated_tensor_on_standard_input(tmp_path: Path) -> None:
    np.save(tmp_path / "scans.npy", np.zeros((10, 64), np.float32))
    done = run("predict", "--input", "-", stdin=(tmp_path / "scans.npy").read_bytes()[:-1])
    assert done.returncode == Exit.FILE
    assert done.stderr.startswith(b"Error: cannot read standard input: ")
    assert done.stderr.count(b"\n") == 1


def test_a_terminal_without_the_characters_is_no_error(fake: FakeDaemon) -> None:
    done = run("predict", "--host", fake.endpoint, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (Exit.OK, b"")
    assert b"DAEMON ?s" in done.stdout


@posix
def test_a_reader_that_has_enough_is_no_trouble(fake: FakeDaemon) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = subprocess.run(
            [*TOOL, "health", "--host", fake.endpoint],
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment(),
            timeout=PATIENCE_S,
        )
    assert done.stderr == b""


@posix
@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, b"interrupted"), (signal.SIGTERM, b"terminated")])
def test_a_signal_ends_the_run_with_its_summary(
    concurrency: int, as_json: bool, number: signal.Signals, word: bytes
) -> None:
    with FakeDaemon(delay_s=0.002) as fake:
        arguments = ["predict", "--host", fake.endpoint, "--count", "100000", "--concurrency", str(concurrency)]
        if as_json:
            arguments.append("--json")
        stdout, stderr = interrupted(*arguments, when=lambda: fake.wait_for_predicts(50, PATIENCE_S), number=number)
    assert stderr.startswith(b"Error: " + word + b" after ")
    assert stderr.count(b"\n") == 1
    if as_json:
        document = json.loads(stdout)
        assert document["interrupted"] is True
        assert 0 < document["answered"] < 100000
        assert document["answered"] + document["unknown"] == document["sent"]
        assert document["unknown"] <= concurrency
    else:
        assert b"of 100000 requests answered by mlp version 1" in stdout
        assert b"p99" in stdout


@posix
def test_a_signal_ends_the_waiting_for_a_load(tmp_path: Path) -> None:
    with FakeDaemon(load_delay_s=60.0) as fake:
        arguments = ["models", "load", "mlp", "--host", fake.endpoint]
        _, stderr = interrupted(*arguments, when=lambda: fake.wait_for_requests(1, PATIENCE_S), number=signal.SIGTERM)
    assert b"the daemon finishes what it has begun" in stderr


@posix
def test_a_daemon_that_dies_in_a_run_leaves_no_request_without_an_account() -> None:
    for timeout in longer_each_time(2.0):
        dying = FakeDaemon(delay_s=10 * PATIENCE_S)
        arguments = ["--count", "100", "--concurrency", "8", "--timeout", f"{timeout}", "--json"]
        with dying:
            process = subprocess.Popen(
                [*TOOL, "predict", "--host", dying.endpoint, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment(),
            )
            while not dying.wait_for_predicts(8, 0.1) and process.poll() is None:
                pass
        stdout, stderr = process.communicate(timeout=2 * PATIENCE_S)
        if process.returncode != Exit.TIMEOUT:  # else the time of requests was over before it had died
            break
    document = json.loads(stdout)
    assert process.returncode == Exit.UNREACHABLE
    assert (document["sent"], document["failed"], document["unknown"]) == (8, 8, 0)
    assert b"given up after 8 of 100 requests; 8 of 8 requests failed: 8 UNAVAILABLE" in stderr


FULL = Path("/dev/full")


WRITING = (
    "health",
    "health --json",
    "models",
    "models show mlp",
    "models load mlp",
    "models unload mlp",
    "models route mlp latest",
    "models compare mlp 1 2",
    "models init resnet",
    "metadata",
    "predict",
    "predict --count 1000",
    "predict --json",
    "predict --output -",
    "reload",
    "completion bash",
    "--help",
    "--version",
    "models --help",
)

UNBUFFERED = ("health", "models init resnet", "predict --output -", "--version")
"""Commands of those, one for each way of writing. How a stream buffers is the interpreter's affair."""


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [
        *((arguments, "") for arguments in WRITING),
        *(
            pytest.param(arguments, "1", marks=() if arguments in UNBUFFERED else pytest.mark.slow)
            for arguments in WRITING
        ),
    ],
)
def test_standard_output_that_takes_nothing(arguments: str, unbuffered: str, tmp_path: Path) -> None:
    with FakeDaemon() as fake, FULL.open("wb") as full:
        done = subprocess.run(
            [*TOOL, *arguments.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(TNX_HOST=fake.endpoint, PYTHONUNBUFFERED=unbuffered),
            cwd=tmp_path,
            timeout=PATIENCE_S,
        )
        assert fake.requests == 0, "known before the work starts"
    assert (done.returncode, done.stderr) == (
        Exit.FILE,
        b"Error: cannot write standard output: No space left on device\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(("arguments", "code"), [("health", Exit.NOT_READY), ("nonsense", Exit.FILE)])
def test_standard_error_that_takes_nothing(arguments: str, code: Exit) -> None:
    with FakeDaemon(status="draining") as fake, FULL.open("wb") as full:
        done = subprocess.run(
            [*TOOL, *arguments.split()],
            stdout=subprocess.PIPE,
            stderr=full,
            env=environment(TNX_HOST=fake.endpoint),
            timeout=PATIENCE_S,
        )
    assert done.returncode == code


@posix
@pytest.mark.parametrize("verb", ["health", "predict"])
def test_ctrl_c_while_a_daemon_keeps_silent(verb: str) -> None:
    with FakeDaemon(mute=True) as fake:
        arguments = [verb, "--host", fake.endpoint, "--timeout", "60"]
        stdout, stderr = interrupted(*arguments, when=lambda: fake.wait_for_requests(1, PATIENCE_S))
    assert (stdout, stderr.strip()) == (b"", b"")


@posix
def test_the_tests_can_interrupt_a_tool_where_their_own_job_ignores_ctrl_c() -> None:
    program = "import signal as s; s.signal(s.SIGINT, s.SIG_IGN); import conftest; print(s.getsignal(s.SIGINT))"
    shown = subprocess.check_output([sys.executable, "-c", program], cwd=Path(__file__).parents[1], text=True)
    assert "default_int_handler" in shown


@posix
def test_on_a_terminal_there_are_colours_and_a_progress_bar(fake: FakeDaemon) -> None:
    health = on_terminal("health", "--host", fake.endpoint)
    run_of_many = on_terminal("predict", "--host", fake.endpoint, "--count", "200", "--concurrency", "4")
    assert "\x1b[32mready" in health
    assert all(len(line) <= 80 for line in strip(health).splitlines())
    assert "200/200" in run_of_many
    assert "\x1b[?25h" in run_of_many, "the cursor is back"


def on_terminal(*arguments: str) -> str:
    """The text that the tool writes to a terminal of 80 columns."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        patient(*arguments), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm", COLUMNS="80")
    )
    os.close(theirs)
    written = b""
    try:
        while chunk := os.read(ours, 4096):
            written += chunk
    except OSError:  # EIO: the other end is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(PATIENCE_S) == Exit.OK
    return written.decode()


def strip(text: str) -> str:
    import click

    return click.unstyle(text)


# --- imports -------------------------------------------------------------------------------------------------

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
for name in BLOCKED:
    sys.modules.pop(name, None)
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_tool_needs_neither_torch_nor_posix(fake: FakeDaemon) -> None:
    blocked = ("torch", "fcntl", "pwd", "grp", "resource", "termios", "tty", "pty")
    code = f"""
BLOCKED = {blocked!r}
{BLOCKER}
from tnxctl.cli import main
for arguments in (
    ["health"], ["metadata"], ["predict"], ["predict", "--count", "50", "--concurrency", "4"], ["reload"], ["models"],
    ["models", "show", "mlp"], ["models", "load", "mlp"], ["models", "compare", "mlp", "1", "2"],
):
    assert main([*arguments, "--host", {fake.endpoint!r}], standalone_mode=False) in (0, None), arguments
"""
    assert "ready" in python(code)


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--version"], ("numpy", "zmq", "msgspec", "asyncio", "rich")),
        (["--help"], ("numpy", "zmq", "msgspec", "asyncio", "rich")),
        (["models", "--help"], ("numpy", "zmq", "msgspec", "asyncio", "rich")),
        (["completion", "zsh"], ("numpy", "zmq", "msgspec", "asyncio", "rich")),
        (["health"], ("asyncio", "rich", "ml_dtypes", "zmq.asyncio")),
        (["models"], ("numpy", "asyncio", "rich", "ml_dtypes", "zmq.asyncio")),
        (["reload"], ("numpy", "asyncio", "rich", "ml_dtypes", "zmq.asyncio")),
        (["predict"], ("asyncio", "rich", "ml_dtypes", "zmq.asyncio")),
    ],
)
def test_each_command_imports_only_what_it_needs(
    fake: FakeDaemon, arguments: list[str], unneeded: tuple[str, ...]
) -> None:
    code = f"""
import sys
from tnxctl.cli import main
try:
    main({arguments!r}, standalone_mode=False)
finally:
    print("imported:", sorted(set({unneeded!r}) & set(sys.modules)))
"""
    if arguments[-1] in ("health", "models", "reload", "predict"):
        code = code.replace(repr(arguments), repr([*arguments, "--host", fake.endpoint]))
    assert python(code).splitlines()[-1] == "imported: []"
