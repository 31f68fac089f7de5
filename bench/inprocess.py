"""Plain torch in a process, as a child of `models.py`: `python bench/inprocess.py NETWORK`.

Each line of stdin asks for one measurement, {"threads": N, "rows": N, "seconds": S}, 0 threads being torch's default.
Each is answered by a line with the milliseconds of all forwards.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from real_networks import NETWORKS


def main() -> None:
    network = NETWORKS[sys.argv[1]]
    net = network.build()
    default = torch.get_num_threads()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"] or default)
        inputs = [
            torch.from_numpy(array).expand(asked["rows"], *array.shape[1:]).contiguous()
            for array in network.example().values()
        ]
        times: list[float] = []
        with torch.inference_mode():
            net(*inputs)
            until = time.perf_counter() + asked["seconds"]
            while not times or time.perf_counter() < until:
                began = time.perf_counter()
                net(*inputs)
                times.append(1e3 * (time.perf_counter() - began))
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
