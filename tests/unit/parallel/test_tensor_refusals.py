"""What a user loses: being told which layer forbids a split, why, and what works instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation

from streaminfer.errors import CaptureError
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.tensor import channels_problem, split_channels
from streaminfer.parallel.tensor.layout import Form
from tests.fans import (
    IMAGE,
    PIXELS,
    ROUNDED,
    Span,
    conv,
    difference,
    networked,
    resnet18,
    sequence,
    span,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Block(nn.Module):
    """A vision transformer's block, with its two exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.up, self.down = nn.Linear(24, 60), nn.Linear(60, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.last(x))))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, head: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, head, batch_first=True)
        self.head = nn.Linear(head, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


class WrittenThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, :3].mul_(2)
        return self.b(y)  # type: ignore[no-any-return]


class Refusal(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    behind: str | None
    until: str | None
    parts: int
    form: Form
    message: tuple[str, ...]
    hint: str


REFUSALS = {
    "two blocks": Refusal(
        resnet18, IMAGE, "maxpool", "layer1", 2, "auto",
        ("stage of layer1 ", "layer1.1.conv1 (conv2d)", "layer1.0.relu (relu)", "needs the sum"),
        "end the stage at layer1.0",
    ),
    "three convolutions": Refusal(
        sequence(a=conv(6, 13), b=conv(13, 8), n=nn.BatchNorm2d(8), r=nn.ReLU(), c=conv(8, 6)),
        PIXELS, None, None, 2, "auto",
        ("c (conv2d)", "the parts end before it, at r (relu)"),
        "end the stage at r",
    ),
    "a sum into a convolution": Refusal(
        sequence(a=conv(6, 13), b=conv(13, 8), c=conv(8, 6)), PIXELS, None, None, 2, "auto",
        ("c (conv2d)", "needs the sum"),
        "end the stage at b",
    ),
    "nothing with weights": Refusal(
        resnet18, IMAGE, "conv1", "maxpool", 2, "auto",
        ("no convolution or linear layer",),
        "end the stage at layer1.0.conv1",
    ),
    "layer norm between": Refusal(
        sequence(a=nn.Linear(6, 13), n=nn.LayerNorm(13), b=nn.Linear(13, 6)), (6,), None, None, 2,
        "auto", ("b (linear)", "at n (layer_norm)", "all channels"), "end the stage at n",
    ),
    "softmax between": Refusal(
        sequence(a=nn.Linear(6, 13), n=nn.Softmax(1), b=nn.Linear(13, 6)), (6,), None, None, 2,
        "auto", ("b (linear)", "at n (softmax)", "all channels"), "end the stage at n",
    ),
    "more parts than channels": Refusal(
        sequence(a=conv(6, 3)), PIXELS, None, None, 4, "auto",
        ("a (conv2d)", "3 channels are too few for 4 parts"), "parts: 3",
    ),
    "more parts than groups": Refusal(
        sequence(a=conv(6, 12), b=conv(12, 12, groups=2)), PIXELS, None, None, 3, "auto",
        ("b (conv2d)", "2 groups are too few for 3 parts"), "parts: 2",
    ),
    "one channel": Refusal(
        sequence(a=conv(6, 8), b=conv(8, 1), c=nn.Sigmoid(), d=conv(1, 1)), PIXELS, "b", None, 2,
        "auto", ("d (conv2d)", "1 channels are too few for 2 parts"), "",
    ),
    "one part": Refusal(
        sequence(a=conv(6, 13)), PIXELS, None, None, 1, "auto", ("1 is no number of parts",),
        "parts: 2",
    ),
    "recurrent": Refusal(
        lambda: Recurrent(8), (4, 6), None, None, 2, "auto",
        ("lstm (lstm)", "all channels of the step before"), "begin the stage behind lstm",
    ),
    "no way out": Refusal(
        sequence(a=nn.ReLU(), b=nn.GELU()), (6,), None, None, 2, "auto",
        ("no convolution or linear layer",), "replicas",
    ),
    "attention and mlp": Refusal(
        Block, (5, 24), None, None, 2, "auto",
        ("up (linear)", "at last (layer_norm)", "needs the sum"),
        "end the stage at last, or begin the stage behind attention",
    ),
    "squeeze and excitation": Refusal(
        sequence(
            up=conv(6, 12, 1), deep=conv(12, 12, groups=12), se=SqueezeExcitation(12, 4),
            down=conv(12, 6, 1),
        ), PIXELS, None, None, 2, "auto",
        ("se.fc2 (conv2d)", "the parts end before it, at se.activation (relu)"),
        "end the stage at se.activation, or begin the stage behind se.fc1",
    ),
    "written in place": Refusal(
        WrittenThroughAView, (6,), None, None, 2, "auto",
        ("written in place",), "end the stage at a",
    ),
    "input channels behind a norm": Refusal(
        sequence(n=nn.LayerNorm(6), a=nn.Linear(6, 13)), (6,), None, None, 2, "in",
        ("a (linear)", "no input of the stage"), "form: auto",
    ),
    "input channels of a block": Refusal(
        resnet18, IMAGE, "maxpool", "layer1.0", 2, "in",
        ("layer1.0.conv2 (conv2d)", "at layer1.0.relu"),
        "end the stage at layer1.0.bn1, or form: auto",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_algebra_forbids_is_answered_with_what_works(name: str) -> None:
    case = REFUSALS[name]
    cutter = networked(case.make, case.shape)
    stage = span(cutter, case.behind, case.until)
    with pytest.raises(CaptureError) as caught:
        split_channels(cutter, *stage, case.parts, case.form)
    for text in case.message:
        assert text in caught.value.message
    assert case.hint in caught.value.hint
    problem = channels_problem(cutter, *stage, case.parts, case.form)
    assert problem
    assert problem in caught.value.message
    assert_remedy_works(cutter, stage, case, caught.value.hint)


def assert_remedy_works(cutter: Cutter, stage: Span, case: Refusal, hint: str) -> None:
    for tried in hint.split(", or "):
        assert_works(cutter, stage, case, tried)


def assert_works(cutter: Cutter, stage: Span, case: Refusal, tried: str) -> None:
    (first, last), layers = stage, cutter.captured.layers
    word = tried.rsplit(" ", 1)[-1]
    parts, form = case.parts, case.form
    if tried.startswith("end the stage at"):
        last = layers.find(word).last
    elif tried.startswith("begin the stage behind"):
        first = layers.find(word).last + 1
    elif tried.startswith("parts: "):
        parts = int(word)
    elif tried == "form: auto":
        form = "auto"
    else:
        assert "replicas" in tried
        return
    fan = split_channels(cutter, first, last, parts, form)
    assert difference(cutter, (first, last), fan, rows=(2,)) <= ROUNDED
    assert channels_problem(cutter, first, last, parts, form) == ""
