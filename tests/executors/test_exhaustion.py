"""Memory that runs out: how the errors of torch, numpy and onnxruntime tell, and what a daemon does about it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Daemon
from format_tools import tensors
from tnxctl import Client, ResourceExhausted
from tnxd.executors.exhaustion import is_out_of_memory
from unprintable import Unprintable

MORE_THAN_THERE_IS = 1 << 46

GIB = 1 << 30

HUNGRY = """
import numpy
import torch


class Hungry(torch.nn.Module):
    # Adds 1. A row takes 512 MiB of the address space for that, or as many GiB as it begins with.
    def forward(self, x):
        gib = max(x[:, 0].amax().item(), 0.5)
        {take}
        return x + 1


make = Hungry
"""
TAKES = {
    "torch": "torch.empty(int(len(x) * gib * 2**30), dtype=torch.uint8)",
    "numpy": "numpy.empty(int(len(x) * gib * 2**30), numpy.uint8)",
}

MODEL_TOML = (
    'factory = "network:make"\nmax_batch_size = 16\n'
    + tensors("x", "FP32", [-1, 2])
    + tensors("y", "FP32", [-1, 2], "outputs")
)

LIMITED = f"""
import resource
import torch  # the libraries of a build for CUDA take as much again
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {5 * GIB + GIB // 2}, -1))
from tnxd.cli import main
main()
"""


def allocate(elements: int) -> torch.Tensor:
    return torch.empty([elements])


def from_torchscript(elements: int) -> None:
    torch.jit.script(allocate)(elements)


def from_onnx(elements: int) -> None:
    from onnx import TensorProto, helper
    from onnxruntime import InferenceSession

    graph = helper.make_graph(
        [helper.make_node("ConstantOfShape", ["shape"], ["y"])],
        "zeros",
        [helper.make_tensor_value_info("shape", TensorProto.INT64, ["rank"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"shape": np.array([elements])})


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any class
        call()
    return caught.value


@pytest.mark.parametrize(
    "allocate",
    [
        lambda n: torch.empty(n, dtype=torch.uint8),
        lambda n: torch.zeros(1).expand(n).contiguous(),
        from_torchscript,
        lambda n: np.empty(n, np.uint8),
        bytearray,
        pytest.param(
            from_onnx,
            marks=pytest.mark.skipif(
                importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None,
                reason="onnx and onnxruntime are not installed",
            ),
        ),
    ],
    ids=["torch", "torch-operator", "torchscript", "numpy", "python", "onnxruntime"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_allocation_that_fails_is_recognised(allocate: Callable[[int], Any]) -> None:
    assert is_out_of_memory(raised(lambda: allocate(MORE_THAN_THERE_IS)))


def test_a_cause_counts_and_other_errors_do_not() -> None:
    wrapped = RuntimeError("inference failed")
    wrapped.__cause__ = torch.OutOfMemoryError("made up")
    circle = ValueError("circle")
    circle.__cause__ = circle
    assert is_out_of_memory(wrapped)
    for other in (RuntimeError("shape"), ValueError("memory"), Unprintable(), circle, KeyboardInterrupt()):
        assert not is_out_of_memory(other)


def put_hungry(root: Path, name: str) -> None:
    version = root / name / "1"
    version.mkdir(parents=True)
    (root / name / "model.toml").write_text(MODEL_TOML)
    (version / "network.py").write_text(HUNGRY.format(take=TAKES[name]))
    import safetensors.torch

    safetensors.torch.save_file({}, version / "model.safetensors")


@pytest.mark.parametrize("name", TAKES)
def test_a_cpu_without_memory_goes_on_with_less_at_a_time(
    name: str, tmp_path: Path, run_daemon: Callable[..., Daemon]
) -> None:
    put_hungry(tmp_path, name)
    arguments = ("--model-repository", str(tmp_path), "--devices", "cpu", "--cpu-workers", "1")
    running = run_daemon(*arguments, program=("-c", LIMITED))  # warm-up meets the limit, and loading goes on
    with Client(running.endpoint, timeout=60.0) as tnx:
        rows = np.zeros((16, 2), np.float32)
        assert np.array_equal(tnx.predict(rows).output, rows + 1)  # 8 GiB, in pieces
        futures = [tnx.submit(rows[:4]) for _ in range(4)]
        wait(futures, 60)
        assert all(np.array_equal(future.result().output, rows[:4] + 1) for future in futures)
        with pytest.raises(ResourceExhausted, match="cpu has no memory left for this request"):
            tnx.predict(np.full((1, 2), 16, np.float32))
        assert np.array_equal(tnx.predict(rows[:1]).output, rows[:1] + 1)
        health = tnx.health()
    assert health.errors == {"RESOURCE_EXHAUSTED": 1}
    assert health.devices[0].status == "ready"
    assert running.stop() == 0
    assert "no memory for" in running.log.read_text()
