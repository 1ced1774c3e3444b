"""What a user loses: the same numbers from a stage whose channels lie on several devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from streaminfer.errors import CaptureError
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump
from streaminfer.parallel.tensor import split_channels
from streaminfer.parallel.tensor.placement import even
from tests.fans import (
    PIXELS,
    ROUNDED,
    assert_held_once,
    conv,
    difference,
    of,
    operators,
    sequence,
    size,
    span,
    split,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Rule(NamedTuple):
    """A stage; what is left for the gather; the layers that are split."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    gather: tuple[str, ...]  # operators, of 2 parts
    layers: tuple[str, ...]


RULES = {
    # by output channels, so that there are shards
    "conv": Rule(sequence(a=conv(6, 13)), PIXELS, ("cat",), ("a",)),
    "conv1d": Rule(sequence(a=nn.Conv1d(6, 13, 3)), (6, 9), ("cat",), ("a",)),
    "conv3d": Rule(sequence(a=nn.Conv3d(6, 13, 3)), (6, 5, 5, 5), ("cat",), ("a",)),
    "conv same": Rule(
        sequence(a=nn.Conv2d(6, 13, 4, padding="same", bias=False)), PIXELS, ("cat",), ("a",)
    ),
    "linear": Rule(sequence(a=nn.Linear(6, 13)), (6,), ("cat",), ("a",)),
    "linear, tokens": Rule(sequence(a=nn.Linear(6, 13)), (4, 6), ("cat",), ("a",)),
    "transposed": Rule(
        sequence(a=nn.ConvTranspose2d(6, 13, 3, stride=2)), PIXELS, ("cat",), ("a",)
    ),
    "norm, relu, pool": Rule(
        sequence(a=conv(6, 13), b=nn.BatchNorm2d(13), c=nn.ReLU(inplace=True), d=nn.MaxPool2d(2)),
        PIXELS,
        ("cat",),
        ("a",),
    ),
    "activations": Rule(
        of(
            lambda m, x: F.hardswish(F.silu(F.gelu(m.a(x)))) * torch.sigmoid(m.a(x)).clamp(0.1),
            a=conv(6, 13),
        ),
        PIXELS,
        ("cat",),
        ("a",),
    ),
    "means": Rule(
        of(lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1) + m.a(x).mean((2, 3), True), a=conv(6, 9)),
        PIXELS,
        ("cat",),
        ("a",),
    ),
    "max with indices": Rule(
        of(lambda m, x: F.adaptive_max_pool2d(m.a(x), 2), a=conv(6, 13)), PIXELS, ("cat",), ("a",)
    ),
    "flatten": Rule(
        sequence(a=conv(6, 13), b=nn.Flatten()), PIXELS, ("cat",), ("a",)
    ),
    "pad, upsample": Rule(
        of(
            lambda m, x: F.interpolate(F.pad(m.a(x), (1, 2, 0, 1), mode="reflect"), scale_factor=2),
            a=conv(6, 13),
        ),
        PIXELS,
        ("cat",),
        ("a",),
    ),
    "permute": Rule(
        of(lambda m, x: m.a(x).permute(0, 2, 3, 1).transpose(1, 2).unsqueeze(1), a=conv(6, 13)),
        PIXELS,
        ("cat",),
        ("a",),
    ),
    "with a constant": Rule(
        of(lambda m, x: (m.a(x) * 2 - 1) / 3, a=conv(6, 13)), PIXELS, ("cat",), ("a",)
    ),
    "with a whole": Rule(
        of(lambda m, x: m.a(x) * x - x[:, :, :1] + x[:, :1], a=conv(6, 6)), PIXELS, ("cat",), ("a",)
    ),
    "prelu": Rule(sequence(a=conv(6, 13), b=nn.PReLU(13)), PIXELS, ("cat",), ("a",)),
    "instance norm": Rule(
        sequence(a=conv(6, 13), b=nn.InstanceNorm2d(13, affine=True)), PIXELS, ("cat",), ("a",)
    ),
    "group norm": Rule(
        sequence(a=conv(6, 15), b=nn.GroupNorm(5, 15)), PIXELS, ("cat",), ("a",)
    ),
    "two with equal shards": Rule(
        of(lambda m, x: m.a(x) + m.b(x), a=conv(6, 13), b=conv(6, 13, 1)),
        PIXELS,
        ("cat",),
        ("a", "b"),
    ),
    "shards chosen anew": Rule(
        of(
            lambda m, x: m.b(m.a(x)) + m.c(x),
            a=conv(6, 15),
            b=conv(15, 15, groups=5),
            c=conv(6, 15),
        ),
        PIXELS,
        ("cat",),
        ("a", "b", "c"),
    ),
    "concatenated": Rule(
        of(lambda m, x: torch.cat([m.a(x), x, m.b(x)], 1), a=conv(6, 13), b=conv(6, 5, 1)),
        PIXELS,
        ("slice",) * 6 + ("cat",),
        ("a", "b"),
    ),
    "concatenated beside": Rule(
        of(lambda m, x: torch.cat([m.a(x), x], 2), a=conv(6, 6)), PIXELS, ("cat",), ("a",)
    ),
    # groups
    "depthwise": Rule(sequence(a=conv(6, 12, groups=6)), PIXELS, ("cat",), ("a",)),
    "groups after columns": Rule(
        sequence(a=conv(6, 20), b=conv(20, 10, groups=5)), PIXELS, ("cat",), ("a", "b")
    ),
    "transposed groups": Rule(
        sequence(a=nn.ConvTranspose2d(6, 9, 3, groups=3)), PIXELS, ("cat",), ("a",)
    ),
    "weights made of weights": Rule(
        of(
            lambda m, x: torch.relu(m.a(x)) @ m.b.weight.T,
            a=nn.utils.parametrizations.weight_norm(nn.Linear(6, 13)),
            b=nn.Linear(13, 7),
        ),
        (4, 6),
        ("add",),
        (),
    ),
    "products of activations": Rule(
        of(
            lambda m, x: torch.addmm(m.a(x), x, x.T[:, :1].expand(6, 13).contiguous()),
            a=nn.Linear(6, 13),
        ),
        (6,),
        # what has no row per sample is not sent but computed again
        ("cat", "numpy_T", "slice", "expand", "contiguous", "addmm"),
        ("a",),
    ),
    # by input channels, so that there are sums
    "pair": Rule(
        sequence(a=conv(6, 13), b=nn.ReLU(), c=conv(13, 7)), PIXELS, ("add",), ("a", "c")
    ),
    "transposed pair": Rule(
        sequence(a=nn.ConvTranspose2d(6, 13, 3), b=nn.ConvTranspose2d(13, 7, 3)),
        PIXELS,
        ("add",),
        ("a", "b"),
    ),
    "pair over flatten": Rule(
        sequence(a=conv(6, 5), b=nn.MaxPool2d(3), c=nn.Flatten(), d=nn.Linear(45, 7)),
        PIXELS,
        ("add",),
        ("a", "d"),
    ),
    "mlp": Rule(
        of(lambda m, x: x + m.b(F.gelu(m.a(x))), a=nn.Linear(6, 13), b=nn.Linear(13, 6)),
        (4, 6),
        ("add",),
        ("a", "b"),
    ),
    "norm of a sum": Rule(
        sequence(a=conv(6, 13), b=conv(13, 7), c=nn.BatchNorm2d(7), d=nn.AvgPool2d(3)),
        PIXELS,
        ("add",),
        ("a", "b"),
    ),
    "a sum with a whole": Rule(
        of(
            lambda m, x: (
                2 * x - m.b(m.a(x)) * x[:, :1] / 3 + 1 - torch.add(x, m.b(m.a(x)), alpha=3)
            ),
            a=conv(6, 13),
            b=conv(13, 6),
        ),
        PIXELS,
        ("add",),
        ("a", "b"),
    ),
    "a sum with shards": Rule(
        of(lambda m, x: m.b(m.a(x)) + m.c(x), a=conv(6, 13), b=conv(13, 7), c=conv(6, 7, 1)),
        PIXELS,
        ("add",),
        ("a", "b", "c"),
    ),
    "concatenated pair": Rule(
        of(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)),
            a=conv(6, 13),
            b=conv(6, 5),
            c=conv(18, 7),
        ),
        PIXELS,
        ("add",),
        ("a", "b", "c"),
    ),
    "means of a sum": Rule(
        of(lambda m, x: -m.b(m.a(x)).mean((2, 3)).unsqueeze(1), a=conv(6, 13), b=conv(13, 7)),
        PIXELS,
        ("add",),
        ("a", "b"),
    ),
    # what ends the parts
    "relu of a sum": Rule(
        sequence(a=conv(6, 13), b=conv(13, 7), c=nn.ReLU()), PIXELS, ("add", "relu"), ("a", "b")
    ),
    "softmax": Rule(
        sequence(a=nn.Linear(6, 13), b=nn.Softmax(1)), (6,), ("cat", "softmax"), ("a",)
    ),
    "layer norm": Rule(
        sequence(a=nn.Linear(6, 13), b=nn.LayerNorm(13)), (4, 6), ("cat", "layer_norm"), ("a",)
    ),
    "channels mixed": Rule(
        of(lambda m, x: m.a(x).reshape(x.shape[0], 2, 6, 81).transpose(1, 2), a=conv(6, 12)),
        PIXELS,
        ("cat",),
        ("a",),
    ),
}  # fmt: skip


@functools.cache
def ruled(name: str) -> Cutter:
    return split(RULES[name].make(), *RULES[name].shape)


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", RULES)
def test_parts_from_disk_give_the_numbers_of_the_stage(
    name: str, parts: int, tmp_path: Path
) -> None:
    rule, cutter = RULES[name], ruled(name)
    stage = span(cutter)
    try:
        fan = split_channels(cutter, *stage, parts)
    except CaptureError as error:
        assert "too few" in error.message
        assert parts > 2
        return
    assert difference(cutter, stage, fan, tmp_path) <= ROUNDED
    assert_held_once(cutter, stage, fan, rule.layers)
    if parts == 2:
        assert tuple(operators(fan.gather)) == rule.gather
        assert fan.scatter is None or name in ("depthwise", "transposed groups")


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize(
    "layer", [conv(16, 64), conv(64, 128, 1), conv(16, 48, groups=16), nn.Linear(40, 1000)]
)
def test_shards_of_output_channels_have_the_bits_of_the_whole(layer: nn.Module, parts: int) -> None:
    shape = (40,) if isinstance(layer, nn.Linear) else (layer.in_channels, 14, 14)
    cutter = split(sequence(a=layer)(), *shape)
    stage = span(cutter)
    fan = split_channels(cutter, *stage, parts)
    assert difference(cutter, stage, fan, rows=(1, 2, 8)) == 0.0


def test_channels_go_to_parts_as_equally_as_whole_vectors_allow() -> None:
    def shares(channels: int, parts: int, unit: int = 1) -> list[int]:
        return [sum(b - a for a, b in ranges) for ranges in even(channels, parts, unit)]

    assert shares(13, 4) == [4, 3, 3, 3]
    assert shares(12, 3, unit=2) == [4, 4, 4]
    assert shares(10, 3, unit=2) == [4, 4, 2]
    assert shares(64, 3) == [24, 16, 24], "16 | 32 | 16 would wait for the second"
    assert shares(1000, 3) == [336, 336, 328]
    for channels in range(4, 600):
        for parts in (2, 3, 4):
            found = shares(channels, parts)
            assert sum(found) == channels
            assert max(found) <= max(-(-channels // parts) * 9 / 8, min(found) + 1)


# ---- input channels ------------------------------------------------------------------------------

SCATTERED = {
    "conv": (sequence(a=conv(13, 7)), (13, 9, 9), ("add",)),
    "linear": (sequence(a=nn.Linear(13, 7)), (4, 13), ("add",)),
    "norm before": (
        sequence(n=nn.BatchNorm2d(13), r=nn.ReLU(), a=conv(13, 7), m=nn.BatchNorm2d(7)),
        (13, 9, 9),
        ("add",),
    ),
    "flatten before": (
        sequence(p=nn.MaxPool2d(3), f=nn.Flatten(), a=nn.Linear(117, 7), r=nn.ReLU()),
        (13, 9, 9),
        ("add", "relu"),
    ),
    "skip": (of(lambda m, x: x + m.a(x), a=conv(13, 13)), (13, 9, 9), ("add",)),
    "skip that is read whole": (
        of(lambda m, x: torch.relu(m.a(x)) + x, a=conv(13, 13)),
        (13, 9, 9),
        ("cat", "add", "relu", "add"),
    ),
    "depthwise separable": (
        sequence(d=conv(13, 13, groups=13), r=nn.ReLU(), a=conv(13, 7, 1)),
        (13, 9, 9),
        ("add",),
    ),
}


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("name", SCATTERED)
def test_each_part_is_sent_its_input_channels_only(name: str, parts: int, tmp_path: Path) -> None:
    make, shape, gather = SCATTERED[name]
    cutter = split(make(), *shape)
    stage = span(cutter)
    fan = split_channels(cutter, *stage, parts, form="in")
    assert difference(cutter, stage, fan, tmp_path) <= ROUNDED
    assert fan.scatter is not None
    assert [port.name for port in fan.scatter.inputs] == ["x"]
    assert all(len(part.inputs) == 1 for part in fan.parts)
    sent = [torch.empty([1, *port.shape[1:]]).numel() for port in fan.scatter.outputs]  # type: ignore[list-item]
    assert sum(sent) == torch.empty(shape).numel()
    assert max(sent) < 2 * min(sent)
    assert [port.name for port in fan.scatter.outputs] == [f"x_{i}of{parts}" for i in range(parts)]
    if parts == 2:
        assert sorted(operators(fan.gather)) == sorted(gather)
    weighed = [size(part) for part in fan.parts]
    assert max(weighed) < 2 * min(weighed)


def test_the_parts_are_the_same_at_every_build() -> None:
    cutters = [split(sequence(a=conv(6, 13), b=conv(13, 7))(), *PIXELS) for _ in "ab"]
    fans = [split_channels(cutter, *span(cutter), 3) for cutter in cutters]
    graphs = [[dump(graph) for graph in (*fan.parts, fan.gather)] for fan in fans]
    assert graphs[0] == graphs[1]
    assert [port.name for port in fans[0].inputs()] == ["x"]
