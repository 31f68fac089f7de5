"""Requests and answers that are too large or have many tensors: refused once and in words, or taken after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from conftest import Daemon, serving_daemon
from dealer import Dealer
from model_repositories import Repository
from tnxctl import Client, FailedPrecondition, InvalidArgument
from tnxctl.protocol import wire
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.wire import Limits

MIB = 1 << 20

LIMIT = 4 * MIB

CONFIG = f"""
cpu.workers = 1
[limits]
message_bytes = {LIMIT}
header_bytes = 4096
"""

COUNTS = """
import pathlib
import torch

CALLS = pathlib.Path({calls!r})


class Counts(torch.nn.Module):
    # Notes each forward in a file.
    def forward(self, *inputs):
        with CALLS.open("a") as file:
            file.write(f"{{len(inputs[0])}}\\n")
        return self.answer(*inputs)


class Fixed(Counts):
    def answer(self, x):
        return x[:, :1].expand(-1, 262144).contiguous()


class Free(Counts):
    def answer(self, x):
        return torch.zeros(len(x), int(x[0, 0]) if x[0, 0] > 1000 else 1)


class Wide(torch.nn.Module):
    def forward(self, *inputs):
        return tuple(each + 1 for each in inputs)


class Deep(torch.nn.Module):
    def forward(self, x):
        return x + 1
"""

X = np.zeros((1, 2), np.float32)

NAMES = [f"input_{number}" for number in range(100)]


def tensor(name: str, *shape: int) -> str:
    return f'{{ name = "{name}", datatype = "FP32", shape = {list(shape)} }}'


def model_toml(kind: str, inputs: list[str], outputs: list[str]) -> str:
    return (
        f'factory = "net:{kind}"\nmax_batch_size = 16\nwarm_up = [1]\naudit = 0.0\n'
        f"inputs = [{', '.join(inputs)}]\noutputs = [{', '.join(outputs)}]\n"
    )


SIGNATURES = {
    "fixed": model_toml("Fixed", [tensor("x", -1, 2)], [tensor("y", -1, 262144)]),
    "free": model_toml("Free", [tensor("x", -1, 2)], [tensor("y", -1, -1)]),
    "wide": model_toml(
        "Wide", [tensor(name, -1, 2) for name in NAMES], [tensor(name.replace("in", "out"), -1, 2) for name in NAMES]
    ),
    "deep": model_toml("Deep", [tensor("x", -1, *[1] * 19)], [tensor("y", -1, *[1] * 19)]),
    "wordy": model_toml(
        "Wide", [tensor(50 * "x" + name, -1, 2) for name in NAMES], [tensor(name, -1, 2) for name in NAMES]
    ),
    "huge": model_toml("Deep", [tensor("x", -1, LIMIT)], [tensor("y", -1, LIMIT)]),
    "loud": model_toml("Deep", [tensor("x", -1, 2)], [tensor("y", -1, LIMIT)]),
}


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """A daemon with narrow limits, and the file that its models note their forwards in."""
    root = tmp_path_factory.mktemp("sizes")
    calls = root / "calls"
    repository = Repository(root / "models")
    for name, settings in SIGNATURES.items():
        repository.settings(name, settings)
        files = {
            "model.safetensors": safetensors.torch.save({}),
            "net.py": COUNTS.format(calls=str(calls)).encode(),
        }

        repository.publish(name, 1, files)
    config = root / "tnxd.toml"
    config.write_text(CONFIG)
    arguments = ("--config", str(config), "--model-repository", str(root / "models"))
    with serving_daemon(root / "log", *arguments) as running:
        calls.unlink()
        yield running, calls


@pytest.fixture
def daemon(limited: tuple[Daemon, Path]) -> Daemon:
    running, calls = limited
    calls.write_text("")
    return running


@pytest.fixture
def forwards(limited: tuple[Daemon, Path]) -> Callable[[], list[int]]:
    """The rows of each forward of this test."""
    return lambda: [int(line) for line in limited[1].read_text().split()]


def rows(count: int, value: float = 0.0) -> Array:
    return np.full((count, 2), value, np.float32)


def test_an_answer_that_no_message_may_have_is_not_computed(daemon: Daemon, forwards: Callable[[], list[int]]) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        before = tnx.health()
        assert tnx.predict(rows(4), model="fixed").output.nbytes == LIMIT
        with pytest.raises(InvalidArgument, match=rf"answer takes {5 * MIB} bytes, more than the {LIMIT} that the dae"):
            tnx.predict(rows(5), model="fixed")
        after = tnx.health()
    assert forwards() == [4]
    assert after.replies == before.replies + 1
    assert after.errors.get("INVALID_ARGUMENT", 0) == before.errors.get("INVALID_ARGUMENT", 0) + 1


def test_an_answer_of_unknown_length_is_computed_once_and_refused(
    daemon: Daemon, forwards: Callable[[], list[int]]
) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        before = tnx.health()
        assert tnx.predict(rows(4, MIB // 4), model="free").output.nbytes == LIMIT
        with pytest.raises(InvalidArgument, match=rf"answer takes {8 * MIB} bytes, more than the {LIMIT} that the dae"):
            tnx.predict(rows(8, MIB // 4), model="free")
        after = tnx.health()
    assert forwards() == [4, 8]
    assert after.replies == before.replies + 1
    assert after.errors.get("INVALID_ARGUMENT", 0) == before.errors.get("INVALID_ARGUMENT", 0) + 1


@pytest.mark.parametrize(("model", "value", "computed"), [("fixed", 0, []), ("free", MIB // 4, [2])])
def test_what_the_client_takes_counts_too(
    daemon: Daemon, forwards: Callable[[], list[int]], model: str, value: float, computed: list[int]
) -> None:
    with Client(daemon.endpoint, timeout=60.0, limits=Limits(message_bytes=MIB)) as tnx:
        with pytest.raises(
            InvalidArgument, match=rf"answer takes {2 * MIB} bytes, more than the {MIB} that the client"
        ):
            tnx.predict(rows(2, value), model=model)
        assert tnx.predict(rows(1, value), model=model).output.nbytes == MIB
    assert forwards() == [*computed, 1]


def test_the_other_requests_of_a_batch_are_answered(daemon: Daemon) -> None:
    small = Limits(message_bytes=MIB)
    with Client(daemon.endpoint, timeout=60.0) as tnx, Client(daemon.endpoint, timeout=60.0, limits=small) as other:
        futures = [tnx.submit(rows(2, MIB // 4), model="free") for _ in range(4)]
        refused = [other.submit(rows(2, MIB // 4), model="free") for _ in range(4)]
        assert all(future.result().output.nbytes == 2 * MIB for future in futures)
        for future in refused:
            with pytest.raises(InvalidArgument, match="that the client may have"):
                future.result()


def test_inputs_beyond_what_the_daemon_takes_are_refused_and_harm_no_other_call(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        for _ in range(2):  # the knowledge is not kept: another daemon may be there next time
            calls = [tnx.submit(rows(1), model="fixed") for _ in range(4)]
            large = tnx.submit(np.zeros((1, LIMIT), np.float32), model="fixed")
            calls += [tnx.submit(rows(1), model="fixed") for _ in range(4)]
            with pytest.raises(
                InvalidArgument, match=rf"inputs have {4 * LIMIT} bytes, and .* takes {LIMIT} in a mess"
            ):
                large.result()
            assert all(call.result().output.nbytes == MIB for call in calls)


def test_inputs_that_are_too_large_together_are_refused(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        inputs = {name: np.zeros((1, LIMIT // 8), np.float32) for name in "abc"}
        with pytest.raises(InvalidArgument, match=f"limit of {LIMIT} bytes for all tensors"):
            tnx.predict(inputs, model="wide")


def test_a_model_with_a_hundred_inputs_and_outputs_can_be_asked(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        inputs = {name: rows(3, number) for number, name in enumerate(NAMES)}
        result = tnx.predict(inputs, model="wide")
    assert len(result.outputs) == len(NAMES)
    for number, output in enumerate(result.outputs.values()):
        assert np.array_equal(output, rows(3, number + 1))


def test_a_model_with_many_axes_can_be_asked(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx:
        x = np.full((2, *[1] * 19), 4, np.float32)
        assert np.array_equal(tnx.predict(x, model="deep").output, x + 1)


def test_more_tensors_than_any_model_has_are_refused(daemon: Daemon) -> None:
    with Dealer(daemon.endpoint) as dealer:
        header = wire.encode(wire.Predict(v=1, id=7, inputs=(), model="wide"))
        dealer.socket.send_multipart([header, *[b""] * 10_000])
        assert dealer.error().message == "10000 tensor frames came, more than the limit of 100"


def test_without_the_model_the_limit_is_as_before(daemon: Daemon) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx, Dealer(daemon.endpoint) as dealer:
        tnx.unload("wide")
        try:
            header = wire.encode(wire.Predict(v=1, id=7, inputs=(), model="deep"))
            dealer.socket.send_multipart([header, *[b""] * 65])
            assert dealer.error().message == "65 tensor frames came, more than the limit of 64"
        finally:
            tnx.load("wide")
        result = tnx.predict({name: rows(1) for name in NAMES}, model="wide")
        assert len(result.outputs) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wordy", r"100 inputs needs a header of \d{4} bytes, and limits.header_bytes is 4096"),
        ("huge", f"the inputs of one row would take {4 * LIMIT} bytes, and limits.message_bytes is {LIMIT}"),
        ("loud", f"the answer to one row would take {4 * LIMIT} bytes, and limits.message_bytes is {LIMIT}"),
    ],
)
def test_a_model_that_nobody_could_ask_is_not_loaded(daemon: Daemon, name: str, why: str) -> None:
    with Client(daemon.endpoint, timeout=60.0) as tnx, pytest.raises(FailedPrecondition, match=why):
        tnx.predict(X, model=name)
