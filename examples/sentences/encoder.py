"""The network of all-MiniLM-L6-v2 in plain torch: a BERT of six layers whose tokens are averaged into one vector.

`build.py` puts this file beside the weights, and the daemon calls `encoder`. The names of the parameters are those of
Hugging Face's BERT, so that its checkpoints fit.

J. Devlin, M.-W. Chang, K. Lee, K. Toutanova (2019), "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", https://aclanthology.org/N19-1423. N. Reimers, I. Gurevych (2019), "Sentence-BERT: Sentence Embeddings
using Siamese BERT-Networks", https://aclanthology.org/D19-1410.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 30_522
WIDTH = 384
INNER_WIDTH = 1536
LAYERS = 6
HEADS = 12
MAX_LENGTH = 512
EPSILON = 1e-12


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(WIDTH, EPSILON)


class Embeddings(nn.Module):
    """Token ids, int64 [N, L] -> [N, L, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.position_embeddings = nn.Embedding(MAX_LENGTH, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.LayerNorm = norm()

    def forward(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Args: places: of packed tokens in their sentences."""
        positions = (
            self.position_embeddings.weight[: ids.shape[1]] if places is None else self.position_embeddings(places)
        )
        first_sentence = self.token_type_embeddings.weight[0]  # there is no second one
        embedded: Tensor = self.LayerNorm(self.word_embeddings(ids) + positions + first_sentence)
        return embedded


class Projections(nn.Module):
    """Layers that make queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)


class Residual(nn.Module):
    """A linear layer whose result is added to what came before, and normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, WIDTH)
        self.LayerNorm = norm()

    def forward(self, new: Tensor, old: Tensor) -> Tensor:
        added: Tensor = self.LayerNorm(self.dense(new) + old)
        return added


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self = Projections()
        self.output = Residual(WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)

        query, key, value = (heads(project(x)) for project in (self.self.query, self.self.key, self.self.value))
        attended = functional.scaled_dot_product_attention(query, key, value, bias)
        joined: Tensor = self.output(attended.transpose(1, 2).flatten(2), x)
        return joined

    def packed(self, x: Tensor, ends: list[int]) -> Tensor:
        """The same for tokens [T, WIDTH] of sentences that follow each other; none looks at another's."""

        def heads(projected: Tensor) -> Tensor:
            return projected.view(1, len(x), HEADS, WIDTH // HEADS).transpose(1, 2)

        projected = [
            heads(project(x)).tensor_split(ends, 2) for project in (self.self.query, self.self.key, self.self.value)
        ]
        attended = [functional.scaled_dot_product_attention(*sentence) for sentence in zip(*projected, strict=True)]
        joined: Tensor = self.output(torch.cat(attended, 2).transpose(1, 2).flatten(2)[0], x)
        return joined


class Intermediate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, INNER_WIDTH)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.intermediate = Intermediate()
        self.output = Residual(INNER_WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.after(self.attention(x, bias))

    def packed(self, x: Tensor, ends: list[int]) -> Tensor:
        return self.after(self.attention.packed(x, ends))

    def after(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(functional.gelu(self.intermediate.dense(x)), x)
        return out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, bias)
        return x


class SentenceEncoder(nn.Module):
    """Takes int64 ids [N, L] and int64 mask [N, L], 1 for a token and 0 for padding; L is at most MAX_LENGTH.

    Gives float32 [N, WIDTH]: one vector of length 1 per row. The scalar product of two is their cosine similarity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = Embeddings()
        self.encoder = Stack()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings(ids)
        kept = mask.to(x.dtype)
        # The lowest number instead of minus infinity: a row without a token gives zeros then, not NaN.
        bias = (1.0 - kept[:, None, None, :]) * torch.finfo(x.dtype).min
        x = self.encoder(x, bias)
        total = (x * kept[:, :, None]).sum(1)
        mean = total / kept.sum(1, keepdim=True).clamp(min=1e-9)
        return functional.normalize(mean)


class PackedEncoder(SentenceEncoder):
    """The same network for sentences of all lengths, without padding: their tokens come one after the other.

    Takes int64 ids [T] and int64 offsets [N + 1]: where each sentence begins, and where the last one ends. Gives the
    same as `SentenceEncoder`.
    """

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        lengths = offsets.diff()
        starts = offsets[:-1].repeat_interleave(lengths)
        x = self.embeddings(ids, torch.arange(len(ids), device=ids.device) - starts)
        ends = offsets[1:-1].tolist()
        for layer in self.encoder.layer:
            assert isinstance(layer, Layer)
            x = layer.packed(x, ends)
        means = [sentence.sum(0) / max(len(sentence), 1) for sentence in x.tensor_split(ends)]
        return functional.normalize(torch.stack(means))


def packed_encoder() -> nn.Module:
    """The network that takes sentences one after the other, still without its weights."""
    return PackedEncoder()


def encoder() -> nn.Module:
    """The network, still without its weights."""
    return SentenceEncoder()
