"""Exit of a client whose interpreter ends while calls are outstanding: with its own exit code, and silently."""

from __future__ import annotations

import subprocess
import sys

import pytest

from peers import FakeDaemon, silence

START = """
import atexit, os, sys, threading

def outlive():  # registered before all others, so it runs after them
    print("ending, and threads go on:", [one.name for one in threading.enumerate() if "tnx" in one.name], flush=True)
    sys.stdin.readline()

atexit.register(outlive)
import numpy as np
from tnxctl import Client

client = Client(sys.argv[1], timeout=60.0)
x = np.zeros((1, 200_000), np.float32)  # sent by reference
calls = [client.submit(x) for _ in range(2)]
sys.stdin.readline()
"""

CASES = {
    "calls outstanding": "",
    "a callback that fails": "calls[0].add_done_callback(lambda call: call.result())",
    "a thread that waits": "threading.Thread(target=lambda: client.predict(x), daemon=True).start()",
    "several clients": "calls += [Client(sys.argv[1], timeout=60.0).submit(x) for _ in range(5)]",
    "an exit with a code": "sys.exit(7)",
    "a child": "if os.fork() == 0: atexit.unregister(outlive); sys.exit()\nos.wait()",
    "a callback that does not end": """
inside = threading.Event()
late = client.submit(x, timeout=0.1)
late.add_done_callback(lambda call: (inside.set(), threading.Event().wait()))
inside.wait()
""",
}


@pytest.mark.parametrize("case", CASES)
def test_exit_code_of_an_interpreter_that_ends_while_the_daemon_is_gone(case: str) -> None:
    """It comes back while the last handlers run: what is outstanding would be sent again, which pyzmq refuses then."""
    with FakeDaemon(silence) as fake:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + CASES[case], fake.endpoint]
        with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) as process:
            try:
                fake.received.get(timeout=60)
                fake.stop()
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout is not None
                line = process.stdout.readline()
                fake.start()
                _, errors = process.communicate("\n", timeout=60)
            finally:
                process.kill()
        left = ["tnxctl-io"] if "does not end" in case else []
        assert line == f"ending, and threads go on: {left}\n"
        assert (process.returncode, errors) == (7 if "code" in case else 0, "")
