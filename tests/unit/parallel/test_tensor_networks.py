"""What a user loses: blocks of real networks split with one exchange, in any stage that may be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from streaminfer.parallel.tensor import split_channels
from streaminfer.parallel.tensor.layout import Form
from tests.fans import (
    IMAGE,
    ROUNDED,
    assert_held_once,
    assert_refused_or_equal,
    conv,
    difference,
    networked,
    operators,
    resnet18,
    sequence,
    size,
    span,
    split,
    torchvision_model,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Attention(nn.Module):
    """Query, key and value from layers of their own, as in BERT; 6 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        heads = [
            layer(x).view(x.shape[0], x.shape[1], 6, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        y = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], mask)
        return x + self.out(y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class Matrix(nn.Module):
    """A product with a matrix that no layer holds."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def resnext() -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    model: nn.Module = torchvision.models.ResNet(block, [1, 1, 1, 1], 10, True, 32, 4)
    return model


class Network(NamedTuple):
    """A stage of a model, and what each part is sent and gives."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    behind: str | None
    until: str | None
    sent: int
    gives: int
    gather: tuple[str, ...]
    layers: tuple[str, ...]


NETWORKS = {
    "resnet18 block": Network(
        resnet18,
        IMAGE,
        "maxpool",
        "layer1.0",
        1,
        1,
        ("add", "relu"),
        ("layer1.0.conv1", "layer1.0.conv2"),
    ),
    "resnet18 block that halves": Network(
        resnet18,
        IMAGE,
        "layer1",
        "layer2.0",
        1,
        1,
        ("add", "relu"),
        ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"),
    ),
    "resnext50 grouped": Network(
        resnext,
        IMAGE,
        "maxpool",
        "layer1.0",
        1,
        1,
        ("add", "relu"),
        ("layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3", "layer1.0.downsample.0"),
    ),
    "mobilenet_v2 inverted residual": Network(
        lambda: torchvision_model("mobilenet_v2"),
        IMAGE,
        "features.1",
        "features.2",
        1,
        1,
        ("add",),
        ("features.2.conv.0.0", "features.2.conv.1.0", "features.2.conv.2"),
    ),
    "vit_b_16 mlp": Network(
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 12, 768, 3072, num_classes=5),
        (3, 32, 32),
        "encoder.layers.encoder_layer_0.ln_2",
        "encoder.layers.encoder_layer_0",
        2,
        1,
        ("add",),
        ("encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3"),
    ),
    "vgg11 classifier": Network(
        lambda: torchvision_model("vgg11", init_weights=False),
        (3, 32, 32),
        "avgpool",
        "classifier.5",
        1,
        1,
        ("add", "relu", "dropout"),
        ("classifier.0", "classifier.3"),
    ),
    "attention": Network(
        Attention, (5, 24), None, None, 1, 1, ("add",), ("query", "key", "value", "out")
    ),
    "gpt2 mlp": Network(
        sequence(a=Conv1D(24, 60), b=nn.GELU(), c=Conv1D(60, 24)),
        (5, 24),
        None,
        None,
        1,
        1,
        ("add",),
        ("a", "c"),
    ),
    "matrices": Network(
        sequence(a=Matrix(24, 60), b=nn.GELU(), c=Matrix(60, 24)),
        (5, 24),
        None,
        None,
        1,
        1,
        ("add",),
        ("a", "c"),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_split_with_one_exchange_per_block(name: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    cutter = networked(network.make, network.shape)
    stage = span(cutter, network.behind, network.until)
    folder = None if name.startswith("vgg") else tmp_path  # half a gigabyte
    total = size(cutter.stage(*stage))
    for parts in (2, 3):
        fan = split_channels(cutter, *stage, parts)
        assert difference(cutter, stage, fan, folder, rows=(2,)) <= ROUNDED
        assert_held_once(cutter, stage, fan, network.layers)
        assert [len(part.outputs) for part in fan.parts] == [network.gives] * parts
        assert max(len(part.inputs) for part in fan.parts) == network.sent
        assert len(fan.parts[1].inputs) == 1, "a skip connection is only added once"
        if parts == 2:
            assert tuple(operators(fan.gather)) == network.gather
            assert all(size(part) < 0.6 * total for part in fan.parts)


# ---- any network ---------------------------------------------------------------------------------


class Random(nn.Module):
    """Layers by number, and skips; in float64, where an error of the algebra cannot hide."""

    def __init__(self, codes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.skips = [skip for _, skip in codes]
        channels = 8
        for code, skip in codes:
            width = (6, 8, 12, 15)[skip]
            made, channels = self.layer(code, channels, width)
            self.layers.append(made)
        self.head = nn.Linear(channels, 10)
        self.double()

    def layer(self, code: int, i: int, o: int) -> tuple[nn.Module, int]:
        same: list[Callable[[], nn.Module]] = [
            nn.ReLU, nn.GELU, nn.Identity, lambda: nn.MaxPool2d(3, 1, 1),
            lambda: nn.BatchNorm2d(i), lambda: conv(i, i, groups=i), lambda: nn.AvgPool2d(3, 1, 1),
            lambda: nn.GroupNorm(2 if i % 2 == 0 else 1, i), lambda: nn.Softmax2d(),
        ]  # fmt: skip
        if code < len(same):
            return same[code](), i
        if code < 11:
            return conv(i, o, 1), o
        return conv(i, o, groups=2 if i % 2 == o % 2 == 0 and code == 11 else 1), o

    def forward(self, x: Tensor) -> Tensor:
        for layer, skip in zip(self.layers, self.skips, strict=True):
            y = layer(x)
            if y.shape == x.shape:
                y = (y, y + x, y * x, x - 2 * y)[skip]
            elif skip == 3:
                y = torch.cat([y, x], 1)[:, : y.shape[1]] if y.shape[1] < 3 else y
            x = y
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@settings(max_examples=15, deadline=None)
@given(
    codes=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 3)), min_size=2, max_size=7).filter(
        lambda codes: any(code > 8 for code, _ in codes)
    ),
    spans=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=3, max_size=8),
    parts=st.integers(2, 4),
)
def test_any_stage_of_any_network_is_refused_or_equal(
    codes: list[tuple[int, int]], spans: list[tuple[int, int]], parts: int
) -> None:
    cutter = split(Random(codes), 8, 5, 5)
    cuts = [-1, *cutter.legal, len(cutter.captured.nodes) - 1]
    for ends in [*spans, (0, len(cuts) - 1)]:
        before, behind = sorted(end % len(cuts) for end in ends)
        if before < behind:
            for form in FORMS:
                assert_refused_or_equal(cutter, (cuts[before] + 1, cuts[behind]), parts, form)


FORMS: tuple[Form, ...] = ("auto", "in")
