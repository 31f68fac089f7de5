"""A process that runs a model: it loads it, and answers the daemon's batches until the daemon is gone. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import inspect
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import msgspec
import numpy as np

from tnxctl.protocol import strings
from tnxctl.protocol.datatypes import Array
from tnxctl.protocol.errors import Internal, TensorNextError
from tnxctl.protocol.wire import MIB, TensorSpec
from tnxd.error_text import sentence
from tnxd.models.python.channel import CUT_OFF, OUT_OF_MEMORY, Answer, Ask, Failure, Loaded, Region, receive, send
from tnxd.models.python.instance import Code, Instance, Plan

_PR_SET_PDEATHSIG = 1
_DEVICE = "cpu"
_FIRST_TO_GO = "900"


def main(arguments: Sequence[str]) -> None:
    """Run as a process. Args: descriptors of the socket and of both regions, and the id of the daemon's process."""
    descriptor, asked, answered, parent = map(int, arguments)
    _end_with(parent)
    _ignore_signals()
    faulthandler.enable()
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_FIRST_TO_GO)  # where memory runs out, this process ends, and not the daemon
    link = socket.socket(fileno=descriptor)
    for number in (descriptor, asked, answered):
        os.set_inheritable(number, False)
    plan = msgspec.msgpack.decode(receive(link), type=Plan)
    if plan.memory_limit_mb:
        limit = int(plan.memory_limit_mb * MIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        code = Code(plan)
        instance = Instance(code)
        instance.load(_DEVICE)
    except BaseException as error:  # a model's code may raise anything
        traceback.print_exc()
        send(link, _failure(error))
        os._exit(1)  # threads of the model need not end first
    send(link, Loaded({name: default is not inspect.Parameter.empty for name, default in instance.optional.items()}))
    with contextlib.suppress(EOFError, OSError), _as_in_a_lane(code.framework):  # until the daemon is gone
        _serve(link, plan, code.framework, instance, Region(asked), Region(answered))
    os._exit(CUT_OFF)


def _serve(
    link: socket.socket, plan: Plan, framework: str, instance: Instance, inputs: Region, outputs: Region
) -> None:
    while True:
        ask = msgspec.msgpack.decode(receive(link), type=Ask)
        inputs.map(ask.size)
        arrays = list(inputs.read(plan.inputs, ask.shapes))
        try:
            made = instance(_tensors(arrays, plan.inputs) if framework == "torch" else arrays)
            shapes = outputs.write([_array(value, spec) for value, spec in zip(made, plan.outputs, strict=True)])
        except BaseException as error:
            failure = _failure(error)
            if not isinstance(error, TensorNextError):
                traceback.print_exc()
            send(link, failure)
            if failure.full:
                os._exit(OUT_OF_MEMORY)
            continue
        finally:
            made = arrays = []
        send(link, Answer(shapes, outputs.size))


def _as_in_a_lane(framework: str) -> AbstractContextManager[object]:
    """Without gradients, as forwards are in the daemon, if the model uses torch."""
    if framework != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def _failure(error: BaseException) -> Failure:
    if isinstance(error, TensorNextError):
        return Failure("", error.message, isinstance(error.__cause__, MemoryError), error.code)
    kind = type(error).__name__
    text = sentence(error).removeprefix(kind).removeprefix(": ")  # there is the name alone where it has no text
    return Failure(kind, text, full=isinstance(error, MemoryError))


def _tensors(arrays: Sequence[Array | None], specs: Sequence[TensorSpec]) -> list[Any]:
    from tnxd.models.tensors import to_tensor  # imports torch, as the model does

    return [
        None if array is None else to_tensor(array, spec.datatype) for array, spec in zip(arrays, specs, strict=True)
    ]


def _array(value: Any, spec: TensorSpec) -> Array:
    """An output as an array of its datatype. Raises Internal: it is of another one."""
    if isinstance(value, np.ndarray):
        odd = strings.odd_type(value) if value.dtype.hasobject else ""
        if odd:
            raise Internal(f"output {spec.name!r} is BYTES, and has an element that is {odd}")
        return value
    from tnxd.models.tensors import array_of

    return array_of(value, spec)


def _end_with(parent: int) -> None:
    """Have this process, and those that it forks, end with the daemon, whatever they do meanwhile."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)

    ask()
    if os.getppid() != parent:  # it has ended before that
        os._exit(1)
    os.register_at_fork(after_in_child=ask)


def _ignore_signals() -> None:
    """Leave it to the daemon when to end: a signal to all of a group or a service is meant for that."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _ignore)  # a handler of Python's, and not SIG_IGN, which programs that it runs inherit


def _ignore(_number: int, _frame: FrameType | None) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1:])
