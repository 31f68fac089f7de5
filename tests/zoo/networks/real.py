"""Real networks of timm and transformers, small, with random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn


class Timm(nn.Module):
    """A network of timm. Attributes: title: its name there. arguments: what makes it small."""

    title = ""
    arguments: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        from zoo_timm import timm

        self.network = timm.create_model(self.title, pretrained=False, num_classes=10, **self.arguments)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.network(picture)
        return result


class ResNet(Timm):
    title = "resnet18"


class MobileNet(Timm):
    title = "mobilenetv3_small_050"


class EfficientNet(Timm):
    title = "efficientnet_lite0"


class ConvNext(Timm):
    title = "convnext_atto"


class VisionTransformer(Timm):
    title = "vit_tiny_patch16_224"
    arguments: ClassVar[dict[str, Any]] = {"img_size": 64, "depth": 2}


class Swin(Timm):
    title = "swin_tiny_patch4_window7_224"
    arguments: ClassVar[dict[str, Any]] = {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}


class Transformers(nn.Module):
    """A network of transformers; what it returns is a class of that library."""

    def __init__(self) -> None:
        super().__init__()
        self.network = self.make()

    def make(self) -> nn.Module:
        raise NotImplementedError


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


class Bert(Transformers):
    def make(self) -> nn.Module:
        from transformers import BertConfig, BertModel

        return BertModel(BertConfig(vocab_size=100, **SMALL))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.network(input_ids=input_ids, attention_mask=attention_mask)


class Generator(Transformers):
    """A GPT-2, which returns its cache of keys and values unless it is told not to."""

    def make(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.network(input_ids=input_ids, use_cache=False)


class Whisper(Transformers):
    """The encoder of a whisper."""

    def make(self) -> nn.Module:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder(
            WhisperConfig(
                d_model=32,
                encoder_layers=2,
                encoder_attention_heads=2,
                encoder_ffn_dim=64,
                num_mel_bins=16,
                max_source_positions=50,
            )
        )

    def forward(self, input_features: torch.Tensor) -> Any:
        return self.network(input_features)


class Clip(Transformers):
    """Both towers of a CLIP: its logits are of every picture and every text."""

    def make(self) -> nn.Module:
        from transformers import CLIPConfig, CLIPModel

        tower = {**SMALL, "projection_dim": 16}
        return CLIPModel(
            CLIPConfig(
                text_config={**tower, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99},
                vision_config={**tower, "image_size": 32, "patch_size": 16},
                projection_dim=16,
            )
        )

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.network(input_ids=input_ids, pixel_values=pixel_values)
        return {"logits_per_image": found.logits_per_image, "text": found.text_embeds}
