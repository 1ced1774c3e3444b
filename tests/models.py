"""Small models, one for each thing that makes cutting hard. Seeded; norms have real statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn


class SkipMLP(nn.Module):
    """Each layer's output is also added far below: many tensors live at every cut."""

    def __init__(self, skips: list[int], width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in skips])
        self.skips = skips

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer, skip in zip(self.layers, self.skips, strict=True):
            seen.append(torch.relu(layer(seen[-1])) + seen[max(0, len(seen) - 1 - skip)])
        return seen[-1]


class Dense(nn.Module):
    """DenseNet's pattern: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4 * (i + 1)) for i in range(4)])
        self.layers = nn.ModuleList([nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(4)])
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(self.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))  # type: ignore[no-any-return]


class Branches(nn.Module):
    """GoogLeNet's pattern: parallel branches of one input, joined by channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        self.three = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.one(x), self.three(x), self.pool(x)], 1)
        return self.head(joined.amax((2, 3)))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A small ViT: a class token, learned positions, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList(
            [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3)]
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class Tagger(nn.Module):
    """Whole numbers in, a dict out, an operator that gives a tuple, an argument left at None."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 8)
        self.lstm = nn.LSTM(8, 8, 2, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, ids: Tensor, scale: Tensor | None = None) -> dict[str, object]:
        hidden, _ = self.lstm(self.words(ids))
        tags = self.out(hidden)
        pooled = tags.mean(1)
        return {"tags": tags, "pool": (pooled if scale is None else pooled * scale, None)}


class Causal(nn.Module):
    """A mask and positions made of sizes alone: they live across every cut and have no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        places = torch.arange(x.shape[0] * 2, device=x.device)[: x.shape[0]].view(-1, 1, 1) * 0
        y = self.first(x) + places
        y = (y @ y.transpose(1, 2) + mask).softmax(-1) @ y
        y = self.second(y) * torch.mul(self.get_buffer("scale"), 2)
        return (y @ y.transpose(1, 2) + mask).softmax(-1) @ y  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Every way in which writing into memory can be seen from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        view = y[:, :3]
        view.mul_(2)  # y changes, too
        z = self.b(y)
        left, right = z.chunk(2, 1)
        before = left.clone()
        z.add_(1)  # both chunks change
        kept = torch.zeros_like(x)
        kept[:, 0] = left[:, 1]  # written through a view
        y.relu_()
        y += 1  # a chain on fresh memory
        return torch.cat([left * before, right, y, kept], 1)


class Aliased(nn.Module):
    """Writes into what it did not make: an operator that had nothing to do returned its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        alias = nn.functional.dropout(y, training=False)  # y itself
        alias.sub_(0.5)
        return torch.add(self.b(y), y)


class Tied(nn.Module):
    """One matrix under two names, and read by two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.c(self.a(x)))  # type: ignore[no-any-return]


class Model(NamedTuple):
    """How to make a model, and n rows of its input."""

    make: Callable[[], nn.Module]
    rows: Callable[[int], Tensor]


def image(pixels: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, 3, pixels, pixels, generator=torch.Generator().manual_seed(n))


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def words(n: int) -> Tensor:
    return torch.randint(0, 50, (n, 7), generator=torch.Generator().manual_seed(n))


MODELS = {
    "mlp": Model(lambda: SkipMLP([0, 1, 2, 3, 0, 5]), numbers(8)),
    "dense": Model(Dense, image(16)),
    "branches": Model(Branches, image(16)),
    "transformer": Model(Transformer, image(32)),
    "tagger": Model(Tagger, words),
    "causal": Model(Causal, numbers(4, 6)),
    "in_place": Model(InPlace, numbers(6)),
    "tied": Model(Tied, numbers(6)),
    "resnet18": Model(lambda: torchvision.models.resnet18(weights=None), image(64)),
    "mobilenet": Model(lambda: torchvision.models.mobilenet_v3_small(weights=None), image(64)),
}


def make(name: str) -> nn.Module:
    """Return a model of MODELS, seeded, in eval mode."""
    torch.manual_seed(0)
    model = MODELS[name].make().eval().requires_grad_(requires_grad=False)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.05)
            norm.running_var.uniform_(0.8, 1.2)
    return model
