"""The commented model.toml that `tnxctl models init` writes."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tnxctl.cli.exits import FileProblem

TEMPLATE = """\
# Settings of a model. The folder of this file is called like the model; beside the file is a folder for each
# version, 1, 2, 3, ..., with one of model.pt2, model.safetensors, model.pt, model.onnx and model.py in it.
#
# Every key stands here, commented out, with its default, or with an example where the default is no value of its own.
# Facts that the weights tell need not be written. tnxd refuses a key that it does not know. After a change:
# tnxctl reload

# The versions to load: "latest", which is the newest one, "all", or a list: [1, 3].
# versions = "latest"

# Most rows that run in one batch. 0: axis 0 does not count rows, and each request runs alone. Default: 64, or as many
# as the weights allow, if axis 0 of every input and output is the same variable; else 0.
# max_batch_size = 64

# Microseconds that a batch smaller than that waits for company. Default: max_delay_us in the daemon's [queue].
# max_delay_us = 0.0

# Where it may run: "cpu"; "cuda", which is any GPU; "cuda:1", which is that one. Default: on every device.
# devices = ["cpu", "cuda"]

# Batches of it that a device may run at a time, over one copy of its weights. 0: as many as the device has lanes. For
# model.py: objects of its class, or processes; 0 is one.
# replicas = 0

# What a batch that hangs or crashes takes with it. "none": the daemon, since a short one may run on the thread that
# serves. "thread": the thread that it runs on, or, where it crashes, the daemon. "process", for model.py: one of the
# processes that run it, which is started again. Default: "thread" for model.py, else "none".
# isolation = "process"

# Memory that each process of a model.py may take, in MiB. 0: any.
# memory_limit_mb = 0.0

# Threads of each batch on a CPU. 1: always one core. More: always so many, however many the batch gains by. 0: one or
# several for each batch, as was measured to be sooner done.
# threads = 0

# The datatype to run in: "float32", "bfloat16" or "float16". Inputs are converted to it, and outputs back to what is
# said below. For model.safetensors and model.pt only. Default: that of the weights.
# dtype = "bfloat16"

# A faster variant of the network, if it gives the same answers: "auto" looks for one where a forward takes 2 ms or
# more; "none" leaves the network as it is; "onnxruntime", "channels_last" and "inductor" name one. For model.pt2 and
# model.safetensors only.
# optimize = "auto"

# Whether a GPU may capture forwards, and start each by one call from then on, where that is as fast.
# graphs = true

# The batch sizes to run before the first request; their times are what the first predictions are made from. Default: 1,
# 2, 4, ... up to max_batch_size. []: none, for a network that takes long: predictions begin with its first requests.
# Values come from example.npz beside the weights, for a network that does not take zeros.
# warm_up = [1, 8, 64]

# Seconds that one batch may run. Default: stall_timeout_s of the daemon.
# time_limit_s = 60.0

# Microseconds after which an answer is worthless, for requests that do not say it themselves. Default: none.
# deadline_us = 50000.0

# 0 (first) to 3 (last), for requests that do not say it themselves.
# priority = 1

# Modules of installed packages to import before the model file is read: what has the operators, or the classes of
# outputs, that it uses. Default: none.
# imports = ["torchvision"]

# "shared": the model keeps something from one request to the next, and that is meant for all of them. Then one request
# runs at a time. "random": it draws its answers, from generators that the daemon does not see. "": a model is refused
# if its answers depend on earlier requests.
# state = ""

# Share of the batches that are computed again in idle time, one request alone, and compared. 0.0: none.
# audit = 0.001

# For model.safetensors: what makes the module that the weights are put into, as "FILE:FUNCTION" without the .py. The
# file is in the folder of the version, or in this one.
# factory = "model:build"

# Inputs and outputs, in order, one block for each tensor. The datatypes are BOOL, UINT8 to UINT64, INT8 to INT64,
# FP16, FP32, FP64, BF16 and BYTES (strings). -1 is an axis of any length; if the model batches, axis 0 of all is -1.
# model.pt2 and model.onnx say it themselves, and what stands here narrows it: -1 to a length. The example of an input
# is a shape that fits, for the warm-up; without one, the lengths that the program was exported with, else 1. Its values
# are what stands in a tensor of that shape: one number, lists of them, or random ones, as here. A file example.npz, in
# the folder of the version or in this one, can have them, too, by the names of the inputs. An optional input may be
# left out by a request: the network gets None, or the number that is the default. model.pt2 and model.onnx need that.
# [[inputs]]
# name = "x"
# datatype = "FP32"
# shape = [-1, 256]
# example = [1, 256]
# values = { low = 0, high = 255 }
# optional = false
# default = 0.0

# [[outputs]]
# name = "y"
# datatype = "FP32"
# shape = [-1, 10]

# Whatever model.py is to read, as context.config.
# [config]
# threshold = 0.5

# Axes whose lengths differ from request to request, and how requests share a batch all the same: by input the axis, and
# the number that fills a shorter one up; the input that is 0 where there is padding; by output the axis that is cut
# back. packed: the network takes all tokens in one row, and their offsets. max_tokens: of one batch. Default: only
# requests of equal lengths share a batch.
# [ragged]
# max_length = 512
# mask = "mask"
# inputs = { ids = { axis = 1, pad = 0 }, mask = { axis = 1, pad = 0 } }
# outputs = { hidden = 1 }
# max_tokens = 32768
# packed = false

# Translation of the keys of model.safetensors to those of the network: a prefix that is taken from them, one that is
# put before them, and patterns of those that need not be on both sides.
# [weights]
# strip_prefix = "module."
# add_prefix = ""
# ignore = ["*.inv_freq"]

# The first split of requests that name no version, by weights relative to their sum, and the version that gets
# copies of them without answering. Default: the newest version takes all, and there is no shadow.
# [traffic]
# weights = { "1" = 95, "2" = 5 }
# shadow = "3"
"""

FILES = {
    "pt2": "model.pt2",
    "safetensors": "model.safetensors",
    "torchscript": "model.pt",
    "onnx": "model.onnx",
    "python": "model.py",
}
"""Format -> name of the file with the weights."""

# Blocks, by their first lines, that must be written since the weights do not tell them.
_NEEDED = {
    "safetensors": ("# factory", "# [[inputs]]", "# [[outputs]]"),
    "torchscript": ("# [[inputs]]", "# [[outputs]]"),
    "python": ("# [[inputs]]", "# [[outputs]]"),
}


def render(kind: str) -> str:
    """The template for a format. The keys that it needs are no comments, but examples to change."""
    blocks = []
    for block in TEMPLATE.split("\n\n"):
        lines = block.splitlines()
        start = next((at for at, line in enumerate(lines) if line.startswith(_NEEDED.get(kind, ()))), len(lines))
        blocks.append("\n".join([*lines[:start], *(line.removeprefix("# ") for line in lines[start:])]))
    return "\n\n".join(blocks) + "\n"


def write(directory: str, kind: str, force: bool) -> tuple[Path, Path]:
    """Write DIRECTORY/model.toml, and make the folders on the way to it.

    Nobody but the owner may write to what is made here, whatever the umask: the daemon would refuse it.

    Returns:
        The file, and where the weights of the first version go.

    Raises:
        click.UsageError: the daemon would not take a model of that name.
        FileProblem: there is one and `force` is not set, or it cannot be written.
    """
    from tnxctl.protocol.wire import MODEL_NAME

    folder = Path(directory)
    name = os.path.basename(os.path.abspath(folder))
    if not MODEL_NAME.fullmatch(name):
        raise click.UsageError(
            f"{name!r} is no name for a model: up to 64 letters, digits, '.', '_' and '-', a letter or digit first."
        )
    path = folder / "model.toml"
    flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
    try:
        for missing in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
            missing.mkdir(0o755)
        with os.fdopen(os.open(path, flags, 0o644), "w", encoding="utf-8") as file:
            file.write(render(kind))
    except FileExistsError:
        raise FileProblem(f"{path} is there already: --force replaces it") from None
    except OSError as error:
        raise FileProblem(f"cannot write {path}: {error.strerror or error}") from None
    return path, folder / "1" / FILES[kind]
