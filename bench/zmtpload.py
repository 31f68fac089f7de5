"""A load generator that writes ZMTP to a TCP socket itself: what wrk is for HTTP, as near as Python comes to it.

A DEALER of libzmq hands every message to a thread of its own and back, which wakes two threads more per round trip and
takes about as much CPU time as a small server does. Here there is one thread and one socket; answers that come together
are read together, and the requests that they set off leave together.
"""

from __future__ import annotations

import gc
import time
from types import TracebackType
from typing import Self

import zmtpsocket
from loadgen import Recording
from processes import BenchError
from workload import Workload
from zmtpsocket import MORE, Messages, frame


class ZmtpConnection:
    """A DEALER over one TCP connection that sends the requests of a workload in turn, numbered from 0.

    Args:
        endpoint: tcp://HOST:PORT.

    Raises:
        BenchError: nobody there speaks ZMTP 3.
    """

    def __init__(self, endpoint: str, workload: Workload) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._socket, received = zmtpsocket.connect(endpoint)
        self._messages = Messages(received)
        self.sent = 0

    def closed_loop(self, outstanding: int, seconds: float) -> Recording:
        """Keep so many requests in flight for so long.

        Raises:
            BenchError: the server hung up or stopped answering.
        """
        clock, request = time.perf_counter_ns, self._workload.request
        recording = Recording(self.sent)
        sent, answers, tensors = recording.sent_ns, recording.answers, recording.tensors
        recording.due_ns = sent
        gc.disable()
        try:
            begin = clock()
            end = begin + int(seconds * 1e9)
            wanted = outstanding
            while True:
                if wanted:
                    leaving: list[bytes] = []
                    for _ in range(wanted):
                        header, tensor = request(self.sent)
                        self.sent += 1
                        leaving += (frame(header, MORE), frame(tensor))
                    sent += [clock()] * wanted
                    self._socket.sendall(b"".join(leaving))
                if len(answers) >= len(sent):
                    break
                part = zmtpsocket.read(self._socket, self._endpoint)
                now = clock()
                arrived = self._messages.take(part)
                for header, tensor in arrived:
                    answers.append((now, header))
                    tensors.append(tensor)
                if self._messages.pongs:
                    self._socket.sendall(self._messages.pongs)
                    self._messages.pongs = b""
                wanted = len(arrived) if now < end else 0
        except OSError as error:
            raise BenchError(f"{self._endpoint}: {error}") from None
        finally:
            gc.enable()
        recording.seconds = (answers[-1][0] - begin) / 1e9
        return recording

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._socket.close()
