"""Honest client in a process of its own: `python honest.py ENDPOINT MODEL`.

It keeps one request outstanding and times each. A line on stdin names the phase that begins; the end of stdin ends it.
Then one line of JSON goes to stdout: by phase, the latencies in microseconds and what came that was no result. Before
that it prints "going" once its first answer is there, and "phase" when one has begun and ten of its answers are there.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from dealer import Dealer, rows
from tnxctl.protocol import wire

_CONFIRMED = 10
_PATIENCE_S = 60.0


def main() -> None:
    endpoint, model = sys.argv[1:3]
    phases = ["warm-up"]
    ended = threading.Event()

    def listen() -> None:
        while line := sys.stdin.readline():
            phases.append(line.strip())
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    latencies: dict[str, list[float]] = {}
    failures: dict[str, list[str]] = {}
    inputs = rows(1)
    # Of an address of its own: what strangers do from another one is not to be its affair.
    with Dealer(endpoint.replace("tcp://", "tcp://127.0.0.2:0;")) as dealer:
        while not ended.is_set():
            phase = phases[-1]
            begin = time.perf_counter()
            sent = dealer.predict(inputs, model=model)
            try:
                reply, _ = dealer.receive(_PATIENCE_S)
            except AssertionError as error:
                failures.setdefault(phase, []).append(str(error))
                break
            of_phase = latencies.setdefault(phase, [])
            of_phase.append((time.perf_counter() - begin) * 1e6)
            if not isinstance(reply, wire.Result) or reply.id != sent:
                failures.setdefault(phase, []).append(repr(reply)[:300])
            if phase == "warm-up" and len(of_phase) == 1:
                print("going", flush=True)
            elif phase != "warm-up" and len(of_phase) == _CONFIRMED:
                print("phase", flush=True)
    print(json.dumps({"latencies": latencies, "failures": failures}), flush=True)


if __name__ == "__main__":
    main()
