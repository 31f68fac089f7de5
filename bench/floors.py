"""The servers that the daemon is measured against: as little as a server can do, each in a process of its own.

    python bench/floors.py echo ENDPOINT             the same bytes in and out, nothing computed
    python bench/floors.py plain ENDPOINT            the same with a poller and whole messages
    python bench/floors.py forward ENDPOINT [cuda]   the same, with the bare forward of the model `mlp` inside
    python bench/floors.py batching ENDPOINT         the same, with one forward for all requests that wait

Each is one blocking thread around one ROUTER socket: receive, answer, receive. They do not decode a header, check
nothing and, but for the plain echo, never poll. The answers that they give come on stdin, one JSON list of `Answer` in
one line; then they print their endpoint. They end when stdin does, so none outlives the program that started it.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import zmq


class Answer(msgspec.Struct, frozen=True):
    """The reply to a request of a certain size.

    Attributes:
        request_bytes: length of the tensor frame of the request that this answers.
        id_at: where the eight bytes of the id lie in the request's header.
        before_id, after_id: the header of the answer, without these eight bytes.
        tensor: the tensor frame of the answer; `forward` sends what it computes instead.
    """

    request_bytes: int
    id_at: int
    before_id: bytes
    after_id: bytes
    tensor: bytes


_MOST_ROWS = 64

Forward = Callable[[bytes], "np.ndarray[Any, Any]"]


def echo(socket: zmq.Socket[bytes], answers: dict[int, Answer]) -> None:
    """Answer every request with the recorded answer to one of its size."""
    recv, send, more = socket.recv, socket.send, int(zmq.SNDMORE)
    _announce(socket)
    while True:
        peer = recv()
        header = recv()
        answer = answers[len(recv())]
        send(peer, more)
        send(answer.before_id + header[answer.id_at : answer.id_at + 8] + answer.after_id, more)
        send(answer.tensor)


def plain(socket: zmq.Socket[bytes], answers: dict[int, Answer]) -> None:
    """The same echo as one writes it first, with pyzmq's poller and its calls for whole messages."""
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    _announce(socket)
    while True:
        if socket in dict(poller.poll()):
            peer, header, tensor = socket.recv_multipart()
            answer = answers[len(tensor)]
            named = answer.before_id + header[answer.id_at : answer.id_at + 8] + answer.after_id
            socket.send_multipart([peer, named, answer.tensor])


def forward(socket: zmq.Socket[bytes], answers: dict[int, Answer], compute: Forward) -> None:
    """Answer every request with the output of the model."""
    import torch

    recv, more = socket.recv, int(zmq.SNDMORE)
    send: Any = socket.send  # its stubs know no numpy arrays
    with torch.inference_mode():
        for size in [*answers] * 20:  # warm-up
            compute(bytes(size))
        _announce(socket)
        while True:
            peer = recv()
            header = recv()
            tensor = recv()
            output = compute(tensor)
            answer = answers[len(tensor)]
            send(peer, more)
            send(answer.before_id + header[answer.id_at : answer.id_at + 8] + answer.after_id, more)
            send(output)


def batching(socket: zmq.Socket[bytes], answers: dict[int, Answer], compute: Forward) -> None:
    """Answer all requests that wait, up to 64, with the rows of one forward; each of them has one row."""
    import torch

    recv, more, noblock = socket.recv, int(zmq.SNDMORE), int(zmq.NOBLOCK)
    send: Any = socket.send
    ((size, answer),) = answers.items()
    with torch.inference_mode():
        for rows in (1, 2, 4, 8, 16, 32, _MOST_ROWS) * 20:  # warm-up
            compute(bytes(rows * size))
        _announce(socket)
        while True:
            peers, headers, tensors = [recv()], [recv()], [recv()]
            try:
                while len(peers) < _MOST_ROWS:
                    peers.append(recv(noblock))
                    headers.append(recv())
                    tensors.append(recv())
            except zmq.Again:
                pass
            outputs = compute(b"".join(tensors))
            for peer, header, output in zip(peers, headers, outputs, strict=True):
                send(peer, more)
                send(answer.before_id + header[answer.id_at : answer.id_at + 8] + answer.after_id, more)
                send(output)


def cpu_forward(*, ordered: bool = False) -> Forward:
    """The forward on this one thread. Bytes of float32 [N, 256] -> float32 [N, 128].

    Args:
        ordered: with weights laid out as the daemon does for batches.
    """
    import torch

    from tnxd.executors.cpu import order_weights
    from tnxd.models.builtin import builtin

    torch.set_num_threads(1)
    net = builtin("mlp").factory()
    if ordered:
        order_weights(net)
    from_numpy = torch.from_numpy  # with numpy's frombuffer it takes half as long as torch's own

    def compute(tensor: bytes) -> np.ndarray[Any, Any]:
        output: np.ndarray[Any, Any] = net(from_numpy(np.frombuffer(tensor, np.float32).reshape(-1, 256))).numpy()
        return output

    return compute


def cuda_forward(max_rows: int) -> Forward:
    """The same on the first GPU, through pinned memory both ways."""
    import torch

    from tnxd.models.builtin import builtin

    torch.set_num_threads(1)
    net = builtin("mlp").factory().to("cuda")
    staged_input = torch.empty((max_rows, 256), pin_memory=True)
    staged_output = torch.empty((max_rows, 128), pin_memory=True)
    stream = torch.cuda.current_stream()
    from_numpy = torch.from_numpy

    def compute(tensor: bytes) -> np.ndarray[Any, Any]:
        rows = len(tensor) // 1024
        staged = staged_input[:rows].copy_(from_numpy(np.frombuffer(tensor, np.float32).reshape(rows, 256)))
        output = staged_output[:rows].copy_(net(staged.to("cuda", non_blocking=True)), non_blocking=True)
        stream.synchronize()
        array: np.ndarray[Any, Any] = output.numpy()
        return array

    return compute


def _announce(socket: zmq.Socket[bytes]) -> None:
    print(socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"), flush=True)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    kind, endpoint, *device = sys.argv[1:]
    if kind not in ("echo", "plain"):
        import torch  # noqa: F401 - now, while others start: the answers come only when the daemon is there
    listed = msgspec.json.decode(sys.stdin.buffer.readline(), type=list[Answer])
    answers = {answer.request_bytes: answer for answer in listed}
    threading.Thread(target=_end_with_stdin, daemon=True).start()  # asleep in read(2): it never wants the GIL
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes to it
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.set_hwm(0)
    socket.bind(endpoint)
    if kind == "echo":
        echo(socket, answers)
    elif kind == "plain":
        plain(socket, answers)
    elif kind == "batching":
        batching(socket, answers, cpu_forward(ordered=True))
    else:
        forward(socket, answers, cuda_forward(max(answers) // 1024) if device == ["cuda"] else cpu_forward())


if __name__ == "__main__":
    main()
