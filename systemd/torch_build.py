"""Chooses the build of torch that is installed: prints options for pip, and says on stderr what they bring.

What pip finds on Linux by itself comes with CUDA and takes more than 5 GB. Where this machine has no GPU, the build
without CUDA does the same in a tenth of that; PyTorch has an index of its own for it. In the environment, TORCH=cpu or
TORCH=cuda says which, and TORCH_INDEX is another address for the former. What pip is configured to use counts as well:
this only adds an index to it.
"""

from __future__ import annotations

import os
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"

DEVICE_FILES = Path("/dev")
DEVICES = ("nvidia0", "nvidiactl", "dxg")
"""Files there that the driver of a GPU makes; dxg is that of the Windows Subsystem for Linux."""

REACH_SECONDS = 5


def is_installed() -> bool:
    """Whether the pinned version is there, of whatever build: pip will keep it."""
    try:
        found = version("torch").partition("+")[0]
    except PackageNotFoundError:
        return False
    return f"torch=={found}" in CONSTRAINTS.read_text().splitlines()


def can_be_reached(index: str) -> bool:
    try:
        urllib.request.urlopen(f"{index}/torch/", timeout=REACH_SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def options(wish: str, index: str) -> tuple[list[str], str]:
    """Options for pip, and a sentence about them.

    Args:
        wish: "cpu", "cuda", or "" to have it as the machine is.
    """
    if wish not in ("", "cpu", "cuda"):
        raise SystemExit(f"TORCH={wish}: it is cpu or cuda")
    if wish == "cuda" or (not wish and any((DEVICE_FILES / name).exists() for name in DEVICES)):
        return [], "torch as pip finds it, on Linux the build for CUDA; TORCH=cpu installs the one without"
    why = "as asked" if wish else "there is no NVIDIA GPU here"
    if can_be_reached(index):
        return ["--extra-index-url", index], f"torch without CUDA ({why}); TORCH=cuda installs the build with it"
    return [], (
        f"torch as pip is configured to find it: the index of builds without CUDA ({index}) cannot be reached. "
        "On Linux it may bring CUDA along, more than 5 GB; TORCH_INDEX names another index"
    )


if __name__ == "__main__":
    if not is_installed():
        chosen, said = options(os.environ.get("TORCH", ""), os.environ.get("TORCH_INDEX", CPU_INDEX).rstrip("/"))
        print(f"installing {said}.", file=sys.stderr)
        print(*chosen)
