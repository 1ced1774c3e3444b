"""One capture for samples of all sizes of a range: the same numbers, or a refusal that helps."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from streaminfer.errors import CaptureError
from streaminfer.parallel import load
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump
from streaminfer.parallel.spatial import split_tiles, tiles_problem
from streaminfer.ranges import Range


class Scaled(nn.Module):
    """A map of half the size, scaled up to the image, with a way around."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.down, self.same = (
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.head, self.skip = nn.Conv2d(8, 3, 1), skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.down(x))
        y = self.head(y + self.same(y))
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return {"map": y + x if self.skip else y}


class Halves(nn.Module):
    """A map that is halved, doubled and laid beside itself: even sides only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.interpolate(F.max_pool2d(x, 2), scale_factor=2)], 1)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.shape[2] > 12 else x.amax((2, 3))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + x.transpose(2, 3))


class Positions(nn.Module):
    """What it adds follows from the size alone: it is computed anew behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[2])[:, None] / x.shape[2]
        y = torch.relu(self.conv(x))
        return torch.relu(F.adaptive_avg_pool2d(y + rows, 3)) * x.shape[3]


class Turned(nn.Module):
    """Tokens of an image: what crosses a cut lies otherwise in memory than it travels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 64, 4, stride=4), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.conv(x).flatten(2).transpose(1, 2)).mean(1)  # type: ignore[no-any-return]


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.words(ids)) * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))  # type: ignore[no-any-return]


def cutter(model: nn.Module, sides: Range) -> Cutter:
    torch.manual_seed(0)
    image = torch.randn(2, 3, sides.high, sides.high)
    return Cutter(capture(model.eval(), (image,), ranges=[(None, sides, sides)]))


def run(stages: Sequence[StageGraph], *inputs: Tensor) -> list[Tensor]:
    values = list(inputs)
    for stage in stages:
        program = load(dump(stage), stage.weights)
        values = [value.contiguous() for value in program(*values)]
    return values


def sizes_of(sides: Range) -> list[tuple[int, int]]:
    low, high = sides.low, sides.high
    return [(low, low), (high, high), (low, high), (sides.between(0.7), sides.between(0.3))]


def check(model: nn.Module, made: Cutter, sides: Range, cuts: Sequence[Sequence[int]]) -> None:
    for chosen in cuts:
        stages = made.split(chosen)
        for height, width in sizes_of(sides):
            image = torch.randn(3, 3, height, width)
            with torch.inference_mode():
                whole = [t for t in pytree.tree_leaves(model(image)) if isinstance(t, Tensor)]
                found = run(stages, image)
            assert all(map(torch.equal, whole, found)), (chosen, height, width)


@pytest.mark.parametrize(
    ("model", "sides"),
    [
        (Scaled(skip=True), Range(5, 40)),
        (Scaled(skip=False), Range(5, 40)),
        (Halves(), Range(4, 32, 2)),
        (Positions(), Range(6, 30)),
        (Turned(), Range(8, 64)),
        (nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
         Range(3, 33)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)  # fmt: skip
def test_every_cut_gives_the_bits_of_the_whole_at_every_size(
    model: nn.Module, sides: Range
) -> None:
    made = cutter(model, sides)
    assert made.legal
    check(model, made, sides, [[cut] for cut in made.legal] + [made.legal])


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("build", "until"),
    [
        (torchvision.models.resnet18, ("layer1", "layer3.0")),
        (torchvision.models.segmentation.lraspp_mobilenet_v3_large,
         ("backbone.4", "classifier.cbr")),
    ],
    ids=["resnet18", "lraspp"],
)  # fmt: skip
def test_torchvisions_networks_are_cut_for_all_sizes(
    build: type[nn.Module], until: Sequence[str]
) -> None:
    torch.manual_seed(0)
    extra = {} if build is torchvision.models.resnet18 else {"weights_backbone": None}
    model = build(weights=None, **extra).eval()
    sides = Range(33, 96)
    made = cutter(model, sides)
    check(model, made, sides, [made.cuts(until)])


def test_a_size_travels_as_a_shape_without_values() -> None:
    made = cutter(Scaled(skip=False), Range(5, 40))
    (cut,) = made.cuts(["same"])
    front, back = made.split([cut])
    sizes = next(port for port in back.inputs if port.name == "sizes")
    assert sizes.shape == (None, 0, None, None)
    assert sizes.ranges[1:] == (Range(5, 40), Range(5, 40))
    first, second = (run([front], torch.randn(2, 3, 8, side)) for side in (7, 8))
    at = [port.name for port in front.outputs].index("sizes")
    assert first[1 - at].shape == second[1 - at].shape, "the maps alone do not tell 7 from 8"
    assert first[at].numel() == 0
    assert first[at].shape != second[at].shape, "so workers do not merge them"
    whole = [p for p in front.outputs if p.name != "sizes"]
    assert made.row_bytes(cut) == sum(4 * 8 * 20 * 20 for _ in whole)


def test_what_asks_for_no_size_sends_none() -> None:
    made = cutter(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), Range(8, 16))
    names = {port.name for stage in made.split(made.legal) for port in stage.inputs}
    assert "sizes" not in names
    *_, last = made.split(made.legal)
    assert last.inputs[0].ranges == (None, Range(6, 14), Range(6, 14))


@pytest.mark.parametrize(
    ("model", "sides", "words", "hint"),
    [
        (Flat(), Range(8, 16), "x [3, 8, 8]: the model does not run on it", "needs one size"),
        (Halves(), Range(4, 32), "[3, 5, 32]: the model does not run on it",
         "[3, 4..32/2, 4..32/2] would do"),
        (Halves(), Range(5, 32), "does not run", "[3, 6..32/2, 6..32/2] would do"),
        (Halves(), Range(4, 33), "on the example [2, 3, 33, 33]", "end the range elsewhere"),
        (Asks(), Range(8, 16), "takes another road there", "or begin the range higher"),
    ],
    ids=["flat", "halves", "odd low", "odd high", "asks"],
)  # fmt: skip
def test_a_model_that_does_not_take_a_size_is_refused_with_its_line(
    model: nn.Module, sides: Range, words: str, hint: str
) -> None:
    with pytest.raises(CaptureError) as error:
        cutter(model, sides)
    assert words in error.value.message
    assert hint in error.value.hint
    assert "test_capture_sizes.py:" in error.value.where


def test_two_sizes_that_the_model_takes_for_one_have_one_name() -> None:
    made = cutter(Square(), Range(4, 9))
    (image,) = made.split([])[0].inputs
    _, height, width = image.ranges
    assert height == width
    assert height is not None
    assert height.name
    with pytest.raises(CaptureError, match=r"5\.\.9.*only where it equals another size") as error:
        capture(Square(), (torch.randn(2, 3, 9, 9),), ranges=[(None, Range(4, 9), Range(5, 9))])
    assert "the same range" in error.value.hint


def test_sequences_of_many_lengths_and_their_masks() -> None:
    torch.manual_seed(0)
    model, length = Masked().eval(), Range(3, 12)

    def rows(n: int, size: int) -> dict[str, Tensor]:
        return {
            "mask": torch.randint(0, 2, (n, size)),  # not in the order of the arguments
            "ids": torch.randint(0, 20, (n, size)),
        }

    made = Cutter(capture(model, (), rows(2, 12), [(length,), (length,)]))
    first = made.split(made.legal)[0]
    names = {port.ranges[0].name for port in first.inputs if port.ranges and port.ranges[0]}
    assert len(names) == 1
    assert names != {""}
    for size in (3, 7, 12):
        given = rows(4, size)
        with torch.inference_mode():
            (found,) = run(made.split(made.legal), *(given[p.name] for p in first.inputs))
            assert torch.equal(found, model(**given))


def test_tiles_of_many_sizes_are_refused() -> None:
    made = cutter(Scaled(skip=False), Range(8, 16))
    last = made.cuts(["same"])[0]
    assert "images of one size" in tiles_problem(made, 0, last, (2, 2))
    with pytest.raises(CaptureError, match="images of one size") as error:
        split_tiles(made, 0, last, (2, 2))
    assert "by: channels" in error.value.hint
