"""Networks whose axis 0 is no batch, or whose rows look at each other."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 8


class Layer(nn.Module):
    def __init__(self, into: int = WIDTH) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, into)


class PointCloud(nn.Module):
    """Features of points, with the maximum over all points beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Linear(3, 16)
        self.whole = nn.Linear(32, 4)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.local(points))
        most = features.amax(0, keepdim=True).expand_as(features)
        return self.whole(torch.cat([features, most], 1))


class Graph(Layer):
    """Passes messages along edges, [edges, 2]."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        messages = self.layer(x)
        return x + torch.zeros_like(x).index_add(0, edges[:, 1], messages[edges[:, 0]])


class GraphEdges(Layer):
    """The same, with edges [2, edges] as in PyTorch Geometric."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        messages = self.layer(x)
        return x + torch.zeros_like(x).index_add(0, edges[1], messages[edges[0]])


class Set(Layer):
    """Deep sets: what each element has beyond the mean of its set."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x - x.mean(0)))


class Pairwise(Layer):
    """Distances between all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cdist(self.layer(x), self.layer(x) + 1, compute_mode="use_mm_for_euclid_dist")


class Contrastive(Layer):
    """Similarity of each picture to each text, as CLIP gives it."""

    def forward(self, picture: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.layer(picture), dim=1) @ nn.functional.normalize(text, dim=1).T


class Softmax(Layer):
    """Attention over all rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).softmax(0)


class Sort(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sort(0).values


class CumulativeSum(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).cumsum(0)


class Flip(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).flip(0)


class Roll(Layer):
    """Each row gets its neighbour's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x.roll(1, 0)


class Normalized(Layer):
    """Subtracts the mean of the batch and divides by its deviation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) - x.mean(0)) / (x.std(0, correction=0) + 0.1)


class LargestNorm(Layer):
    """Scales everything by the largest value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / x.abs().max()


class SlightMean(Layer):
    """Subtracts a thousandth of the mean: little, and more than noise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.001 * x.mean(0)


class Position(Layer):
    """Adds the number of the row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + torch.arange(x.shape[0], device=x.device)[:, None]


class FirstRow(Layer):
    """Compares each row with the first one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) - x[:1]


class LastRowOnly(Layer):
    """Adds something to the last row, as a decoder with a class token at its end might."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = torch.arange(x.shape[0]) == x.shape[0] - 1
        return self.layer(x) + last[:, None] * 3.0


class Count(Layer):
    """Divides by the number of rows, as a mean loss does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / x.shape[0]


class Rank(Layer):
    """The place of each row among all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1).argsort().argsort()


class SequenceFirst(nn.Module):
    """An LSTM as torch makes it: time is axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class Backwards(nn.Module):
    """A GRU backwards over axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, 16, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(x)[0]


class Attention(nn.Module):
    """Self-attention over axis 0, as torch's own module has it for one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Signal(nn.Module):
    """A filter over a signal of any length, [samples]."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, signal: torch.Tensor) -> torch.Tensor:
        return self.filter(signal[None, None])[0, 0]


class Difference(Layer):
    """Difference from each row to the next."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.diff(self.layer(x), dim=0, prepend=x[:1])


class Covariance(Layer):
    """Whitens with the covariance of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(0)
        covariance = centred.T @ centred / x.shape[0]
        return centred @ (covariance + torch.eye(WIDTH))


class Nonzero(Layer):
    """The positions of what is positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).nonzero()


class Positive(Layer):
    """The rows whose first value is positive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[x[:, 0] > 0])


class Unique(nn.Module):
    """The numbers that there are."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.unique(ids)


class Suppression(nn.Module):
    """Non-maximum suppression: the boxes that are left."""

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        order = scores.argsort(descending=True)
        kept: list[torch.Tensor] = []
        while len(order):
            best, order = order[0], order[1:]
            kept.append(best)
            if len(order):
                low = torch.maximum(boxes[best, :2], boxes[order, :2])
                high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
                overlap = (high - low).clamp(min=0).prod(1)
                area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
                order = order[overlap / (area[best] + area[order] - overlap) < 0.3]
        return boxes[torch.stack(kept)]


class UntilAllAreDone(nn.Module):
    """Doubles until every row is beyond 50: [rows, steps], and how many steps depends on the company."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = [x[:, 0].abs() + 1]
        while bool((steps[-1] < 50).any()):
            steps.append(steps[-1] * 2)
        return torch.stack(steps, 1)


class UntilFirstIsDone(nn.Module):
    """The same, until the first row is, and padded to 8 steps with what the last step was."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.abs() + 1
        for _ in range(8):
            if bool((state[0] > 20).all()):
                break
            state = state * 2
        return state


class Trimmed(nn.Module):
    """Cuts its output at the longest row of the batch, as tokenizers' padding would have it."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        longest = int((ids != 0).sum(1).max())
        return ids[:, :longest] * 2


class Segments(nn.Module):
    """Frames of clips, four rows each, as in a temporal shift module: no other number of rows will do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clips = x.reshape(x.shape[0] // 4, 4, WIDTH)
        return self.layer(clips + clips.roll(1, 1)).reshape(x.shape)


class Pairs(nn.Module):
    """Compares the first half of the rows with the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[0] // 2
        return self.layer(x) - torch.cat([x[half:], x[:half]])


class Guidance(nn.Module):
    """Runs two halves and mixes them, as diffusion models do: half as many rows come out as go in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain, guided = self.layer(x).chunk(2)
        return plain + 3 * (guided - plain)


class Ragged(nn.Module):
    """An embedding bag with offsets: values and offsets have lengths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, WIDTH, mode="sum")

    def forward(self, ids: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.bag(ids, offsets)


class BoxesOfPicture(nn.Module):
    """One picture and any number of boxes in it: rows of the second input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, picture: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        return self.layer(boxes) + picture.mean((0, 1))


class QueryAndKeys(nn.Module):
    """Looks queries up among keys; there are as many of both by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (self.layer(queries) @ keys.T).softmax(-1) @ keys


class MixesBeyond(Layer):
    """Rows look at each other only where a value is beyond 500, as no trial has them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out / x.amax() if bool((x > 500).any()) else out


class MixesFromEleven(Layer):
    """Rows look at each other only in batches of more than ten rows, as with a chunked kernel that has a mistake."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        return out - out.mean(0) if x.shape[0] > 10 else out
