"""A client that always has requests outstanding: `python bench/saturate.py ENDPOINT NETWORK COUNT`."""

from __future__ import annotations

import sys
from collections import deque

from real_networks import NETWORKS
from tnxctl import Client


def main() -> None:
    endpoint, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    inputs = NETWORKS[name].example()
    with Client(endpoint, timeout=60.0) as client:
        waiting = deque(client.submit(inputs, model=name) for _ in range(count))
        waiting.popleft().result()
        print("ready", flush=True)
        while True:
            waiting.append(client.submit(inputs, model=name))
            waiting.popleft().result()


if __name__ == "__main__":
    main()
