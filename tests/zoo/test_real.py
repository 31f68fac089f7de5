"""Ten real networks with random weights, in the formats that they can be had in."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from zoo.case import FACTORY, PT2, SCRIPT, UNBATCHED, Case, Exhibit, Input, exhibits, mask, numbers
from zoo.keeper import Keeper
from zoo.networks import real

PICTURES = (Input("picture", ("rows", 3, 64, 64)),)
IDS = Input("input_ids", ("rows", "length"), numbers(1, 99))
LENGTHS = {"length": (7, 12)}
FEW: dict[str, Any] = {"toml": "max_batch_size = 8\n", "over": 10, "heavy": True, "noise": 1e-3}
"""For all: they take their time."""

TIMM = [
    Case("resnet", real.ResNet, PICTURES, formats=(PT2, SCRIPT, FACTORY), **FEW),
    Case("mobilenet", real.MobileNet, PICTURES, formats=(PT2, FACTORY), **FEW),
    Case("efficientnet", real.EfficientNet, PICTURES, formats=(PT2, FACTORY), **FEW),
    Case("convnext", real.ConvNext, PICTURES, formats=(PT2, FACTORY), **FEW),
    Case("vision-transformer", real.VisionTransformer, PICTURES, formats=(PT2, SCRIPT, FACTORY), **FEW),
    Case("swin", real.Swin, (Input("picture", ("rows", 3, 56, 56)),), formats=(PT2, FACTORY), **FEW),
]
TRANSFORMERS = [
    Case(
        "bert",
        real.Bert,
        (IDS, Input("attention_mask", ("rows", "length"), mask)),
        formats=(FACTORY,),
        sizes=LENGTHS,
        **FEW,
    ),
    Case("generator", real.Generator, (IDS,), formats=(FACTORY,), sizes=LENGTHS, **FEW),
    Case("whisper", real.Whisper, (Input("input_features", ("rows", 16, 100)),), formats=(PT2, FACTORY), **FEW),
    Case(
        "clip",
        real.Clip,
        (Input("input_ids", ("rows", 12), numbers(1, 100)), Input("pixel_values", ("rows", 3, 32, 32))),
        may=(UNBATCHED,),
        formats=(FACTORY,),
        heavy=True,
        over=10,
    ),
]


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.mark.skipif(missing("timm"), reason="not installed: timm")
@pytest.mark.parametrize("exhibit", exhibits(TIMM))
def test_a_network_of_timm_is_served(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []


@pytest.mark.skipif(missing("transformers"), reason="not installed: transformers, see tests/zoo/requirements.txt")
@pytest.mark.parametrize("exhibit", exhibits(TRANSFORMERS))
def test_a_network_of_transformers_is_served(serving: Keeper, exhibit: Exhibit) -> None:
    assert serving.examine(exhibit) == []
