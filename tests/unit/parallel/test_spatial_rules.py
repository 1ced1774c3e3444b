"""What a user loses: each operator by tiles of the image gives what it gives of the whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.spatial import split_tiles, tiles_problem
from tests.tiled import (
    assert_same,
    assert_stage_same,
    cutter_of,
    reload,
    rows,
    run,
    settled,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [(1, 2), (2, 1), (2, 2), (3, 2)]


class Apply(nn.Module):
    """A function between two convolutions, so that halos add up."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        self.last = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 6, 5, padding=2)
        self.down = nn.Conv2d(3, 6, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.norm(self.a(x))))
        return torch.relu(y + self.down(x)) - 0.5 * y  # type: ignore[no-any-return]


class Joined(nn.Module):
    """Branches of unlike reach, joined by channels; one is read again further down."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.five = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 5, padding=2)
        self.pool, self.last = nn.MaxPool2d(3, 1, 1), nn.Conv2d(7, 3, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        far = self.five(x)
        joined = torch.cat([self.one(x), far, self.pool(x)], 1)
        return torch.cat((self.last(joined), far), dim=1)


class Weights(nn.Module):
    """Weights for each channel, for each place, for each column; numbers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.places = nn.Parameter(torch.randn(1, 4, 13, 17))
        self.columns = nn.Parameter(torch.randn(17))
        self.slope = nn.PReLU(4, init=0.3)
        self.last = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.scale + self.places
        return self.last(self.slope(y * self.columns - 0.25))  # type: ignore[no-any-return]


class Head(nn.Module):
    """A pool over the whole map and what follows."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 6, 3, 2, 1), pool
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.flatten(self.pool(torch.relu(self.conv(x))), 1)
        return self.head(self.drop(y)).softmax(-1)  # type: ignore[no-any-return]


def chunked(x: Tensor) -> Tensor:
    a, b = F.pad(x, (1, 0, 0, 1)).chunk(2, 1)
    c, d = torch.split(x, [1, 3], dim=1)
    return torch.cat([F.avg_pool2d(a, 2, 1), F.max_pool2d(b, 2, 1), c * d], 1)


def looked_at(x: Tensor) -> Tensor:
    """CBAM's map of places: from all channels of each."""
    most, mean = x.amax(1, keepdim=True), x.mean(1, keepdim=True)
    return x * torch.sigmoid(most + mean) + F.softmax(x, dim=1)


def conv(*args: int | tuple[int, int], **options: object) -> nn.Module:
    return nn.Conv2d(3, 4, *args, **options)  # type: ignore[arg-type]


def then(first: nn.Module, *args: int | tuple[int, int]) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(4, 4, *args))  # type: ignore[arg-type]


def padded(padding: nn.Module) -> nn.Module:
    return nn.Sequential(padding, conv(3))


RULES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: conv(3, padding=1),
    "conv without padding": lambda: conv(4),
    "conv by 2": lambda: then(conv(3, 2, 1), 3, 2, 1),
    "conv by more than its kernel": lambda: conv(2, 3),
    "conv of an even kernel": lambda: conv(4, 2, 1),
    "conv dilated": lambda: then(conv(3, 1, 2, 2), 3, 1, 3, 3),
    "conv of a flat kernel": lambda: then(conv((1, 7), 1, (0, 3)), (3, 1), (2, 1)),
    "conv padded far beyond its kernel": lambda: conv(1, padding=2),
    "conv padded same": lambda: conv(4, padding="same", dilation=(1, 2)),
    "conv padded valid": lambda: conv(3, padding="valid"),
    "conv grouped": lambda: nn.Sequential(
        conv(1), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
    ),
    "conv padded by reflection": lambda: conv(5, 2, 2, padding_mode="reflect"),
    "conv padded by replication": lambda: conv(5, padding=2, padding_mode="replicate"),
    "padding of one side": lambda: nn.Sequential(nn.ZeroPad2d((0, 2, 1, 0)), conv(3, 2)),
    "padding with a number": lambda: padded(nn.ConstantPad2d((3, -2, -1, 1), 0.7)),
    "reflection far into the image": lambda: padded(nn.ReflectionPad2d((5, 4, 6, 3))),
    "replication far beyond the image": lambda: padded(nn.ReplicationPad2d(9)),
    "max pool": lambda: Apply(nn.MaxPool2d(3, 2, 1)),
    "max pool dilated": lambda: Apply(nn.MaxPool2d(2, 1, 1, dilation=2)),
    "max pool that rounds up": lambda: Apply(nn.MaxPool2d(3, 2, ceil_mode=True)),
    "max pool padded that rounds up": lambda: Apply(nn.MaxPool2d(2, 2, 1, ceil_mode=True)),
    "mean pool": lambda: Apply(nn.AvgPool2d(3, 2, 1)),
    "mean pool of what is there": lambda: Apply(nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "mean pool that rounds up": lambda: Apply(nn.AvgPool2d(4, 3, 1, ceil_mode=True)),
    "mean pool of what is there that rounds up": lambda: Apply(nn.AvgPool2d(2, 2, 0, True, False)),
    "mean pool by a number": lambda: Apply(nn.AvgPool2d(3, 2, 1, divisor_override=5)),
    "mean pool to the same size": lambda: Apply(nn.AdaptiveAvgPool2d((13, 17))),
    "residual": lambda: Residual(1),
    "residual by 2": lambda: Residual(2),
    "branches": Joined,
    "weights": Weights,
    "activations": lambda: Apply(lambda x: F.gelu(F.hardswish(F.silu(x)).clamp(-1, 2)) ** 2),
    "chunks": lambda: Apply(chunked, 7),
    "channels cut out": lambda: Apply(lambda x: x[:, 1:3, :, :], 2),
    "across channels": lambda: Apply(looked_at),
    "gated": lambda: Apply(lambda x: F.glu(x, 1), 2),
    "nearest by 2": lambda: Apply(nn.Upsample(scale_factor=2)),
    "nearest by 3 and 1": lambda: Apply(lambda x: F.interpolate(x, (39, 17), mode="nearest-exact")),
    "bilinear by 2": lambda: Apply(nn.Upsample(scale_factor=2, mode="bilinear")),
    "bilinear by 4": lambda: Apply(lambda x: F.interpolate(x, (52, 68), mode="bilinear")),
    "float64": lambda: Apply(lambda x: x.double().sigmoid().float()),
}  # fmt: skip
HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive": nn.AdaptiveAvgPool2d(1),
    "adaptive pair": nn.AdaptiveAvgPool2d((1, 1)),
    "mean": lambda x: x.mean((2, 3)),
    "mean from behind": lambda x: x.mean((-1, -2), keepdim=True),
    "sum": lambda x: x.sum((2, 3)),
    "maximum": lambda x: x.amax((2, 3)),
    "minimum": lambda x: x.amin((-2, -1), keepdim=True),
    "window as large as the map": lambda x: F.avg_pool2d(x, (7, 9)),
    "maximum of a window as large as the map": lambda x: F.max_pool2d(x, (7, 9)),
    "both": lambda x: x.mean((2, 3)) + x.amax((2, 3)),
}


@functools.cache
def small(name: str) -> Cutter:
    module = RULES[name]() if name in RULES else Head(HEADS[name])
    return cutter_of(module, rows(3, 13, 17))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [*RULES, *HEADS])
def test_tiles_from_disk_give_what_the_whole_gives(
    name: str, grid: tuple[int, int], tmp_path: Path
) -> None:
    cutter = small(name)
    last = len(cutter.captured.nodes) - 1
    (stage,) = cutter.split([])
    fan = split_tiles(cutter, 0, last, grid)
    assert len(fan.parts) == grid[0] * grid[1]
    assert fan.gather.outputs == stage.outputs
    (image,) = stage.inputs
    for n in (1, 3):
        x = rows(3, 13, 17, n=n)
        found, travelled = run(fan, {image.name: x}, tmp_path)
        assert_same(found, reload(stage, None)(x))
        if name in HEADS:
            sizes = {travelled[port.name].numel() for port in fan.gather.inputs}
            assert sizes == {n * 6}, "more than vectors travel"


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Skip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, int]]:
    """A random stack of layers with skips, and the size of its image."""
    size = draw(pairs(5, 20))
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 5))):
        kernel = draw(pairs(1, 4))
        padding = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
        stride, yes, no = draw(pairs(1, 3)), draw(st.booleans()), draw(st.booleans())
        make: dict[str, Callable[..., nn.Module]] = {
            "conv": lambda k, s, p, yes, no: nn.Conv2d(3, 3, k, s, p, 1 + yes, 1 + 2 * no),
            "max": lambda k, s, p, yes, _: nn.MaxPool2d(k, s, p, ceil_mode=yes),
            "mean": nn.AvgPool2d,
            "pad": lambda k, s, p, *_: nn.ConstantPad2d((k[0] - 2, s[0] - 2, p[0], p[1]), 0.5),
            "skip": lambda *_: Skip(nn.Conv2d(3, 3, 3, padding=1)),
            "act": lambda *_: nn.SiLU(),
            "norm": lambda *_: nn.BatchNorm2d(3),
            "up": lambda *_: nn.Upsample(scale_factor=2),
        }
        layers.append(make[draw(st.sampled_from(sorted(make)))](kernel, stride, padding, yes, no))
    if draw(st.booleans()):
        layers.append(Called(lambda x: x.mean((2, 3))))
    return nn.Sequential(*layers), size


@settings(max_examples=30, deadline=None)
@given(stack=stacks(), grid=pairs(1, 4))
def test_any_stack_by_any_grid_is_refused_or_the_same(
    stack: tuple[nn.Module, tuple[int, int]], grid: tuple[int, int]
) -> None:
    module, size = stack
    x = rows(3, *size)
    try:
        with torch.no_grad():
            settled(module)(x)
    except RuntimeError:
        return  # no such network: a window larger than its input
    cutter = cutter_of(module, x)
    last = len(cutter.captured.nodes) - 1
    problem = tiles_problem(cutter, 0, last, grid)
    if problem:
        assert "finer than the map" in problem
    else:
        assert_stage_same(cutter, 0, last, grid, [x])
