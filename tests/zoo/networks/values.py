"""Networks that do not take every value: zeros least of all."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import rnn

WIDTH = 8


class Packed(nn.Module):
    """An LSTM over sequences with their lengths, which must be at least 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 16, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return out


class FromOne(nn.Module):
    """Indices count from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids - 1)


class Entropy(nn.Module):
    """Probabilities, which torch.distributions checks."""

    def forward(self, probabilities: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(probs=probabilities).entropy()


class Inverse(nn.Module):
    """Inverts a matrix per row."""

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(matrix)


class Cholesky(nn.Module):
    """Decomposes a positive definite matrix per row."""

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(matrix)


class Longest(nn.Module):
    """The mean of the first few of each row, of which there has to be one."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(x.shape[1])[None] < lengths[:, None])[:, :, None]
        counts = mask.sum(1, keepdim=True)
        if bool((counts == 0).any()):
            raise ValueError("an empty row")
        return (x * mask).sum(1, keepdim=True) / counts


class EndToken(nn.Module):
    """Takes the state at the end token, 42, which every row must have exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        ends = (ids == 42).sum(1)
        if bool((ends != 1).any()):
            raise ValueError("every row needs exactly one end token")
        return self.table(ids).cumsum(1)[ids == 42]


class Boxes(nn.Module):
    """Areas of boxes, which must not be empty."""

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError("an empty box")
        return (boxes[:, 2:] - boxes[:, :2]).prod(1)


class Finite(nn.Module):
    """Normalizes, and refuses what is not finite."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x / x.norm(dim=1, keepdim=True)
        if not bool(out.isfinite().all()):
            raise FloatingPointError("not finite")
        return out


class Scripted(nn.Module):
    """Looks ids up; TorchScript says what was wrong in its last line."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


class Dates(nn.Module):
    """Months count from 1 to 12, by one_hot of the month before."""

    def forward(self, months: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(months - 1, 12).float().cumsum(1)


class Width(nn.Module):
    """Wants an even number of columns, at least 16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 9, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] % 2:
            raise ValueError("odd")
        return self.conv(x[:, None])[:, 0]
