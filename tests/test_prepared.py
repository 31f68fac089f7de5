"""Processes that are forked with torch imported begin and end as others do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import prepared

SHOW = """
import json, os, sys
print(json.dumps([sys.argv, sys.path[0], __name__, os.getcwd(), dict(os.environ), "torch" in sys.modules]), flush=True)
print("to stderr", file=sys.stderr)
exec(sys.argv[1])
"""


def run(folder: Path, code: str, environment: dict[str, str]) -> prepared.Process:
    (folder / "show.py").write_text(SHOW)
    with (folder / "log").open("wb") as log:
        program = (str(folder / "show.py"), code)
        return prepared.start(program, ("--last",), environment, stdout=None, stderr=log.fileno())


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("", 0),
        ("os._exit(3)", 3),
        ("sys.exit(4)", 4),
        ("raise OSError", 1),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
)
def test_a_program_has_what_is_its_own_and_its_exit_status_is_told(tmp_path: Path, code: str, status: int) -> None:
    environment = {**os.environ, "ONLY": "here"}
    assert prepared.can_run(("-m", "tnxd"), environment)
    process = run(tmp_path, code, environment)
    assert process.stdout is not None
    with process.stdout:
        argv, path, name, folder, variables, imported = json.loads(process.stdout.readline())
        assert process.wait(60) == process.poll() == process.returncode == status
        assert process.stdout.read() == ""
    assert argv == [str(tmp_path / "show.py"), code, "--last"]
    assert (path, name, folder, imported) == (str(tmp_path), "__main__", os.getcwd(), True)
    assert variables.items() >= {"ONLY": "here"}.items()
    assert "ONLY" not in os.environ
    assert (tmp_path / "log").read_text().startswith("to stderr\n")


def test_who_waits_for_a_process_that_goes_on_is_told(tmp_path: Path) -> None:
    process = run(tmp_path, "import signal; signal.pause()", dict(os.environ))
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        process.kill()  # of one that has ended


def test_other_settings_of_libraries_and_code_on_the_command_line_need_an_interpreter() -> None:
    assert not prepared.can_run(("-m", "tnxd"), {**os.environ, "OMP_NUM_THREADS": "3"})
    assert not prepared.can_run(("-c", "import tnxd"), os.environ)


def test_no_process_outlives_those_that_started_it(tmp_path: Path) -> None:
    """Tests that are killed cannot end their daemons."""
    (tmp_path / "show.py").write_text(SHOW)
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(prepared.__file__).parent)!r})
import prepared
program = ({str(tmp_path / "show.py")!r}, "os.write(1, b'.'); import signal; signal.pause()")
process = prepared.start(program, (), os.environ, stdout=1, stderr=2)
sys.stdin.read()
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, stderr=-3, text=True)
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter.stdin, starter.stdout:
        assert json.loads(starter.stdout.readline())
        assert starter.stdout.read(1) == "."
        starter.kill()
        assert starter.stdout.read() == ""  # its end: nobody can write any more
    starter.wait()
