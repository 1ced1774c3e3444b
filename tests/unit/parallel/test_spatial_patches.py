"""What a user loses: independent tiles that answer as the model answers each of them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streaminfer.errors import CaptureError
from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.spatial.patches import Reduce, approximate_tiles
from tests.tiled import assert_same, cutter_of, rows, run

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (13, 18)


class Classifier(nn.Module):
    """Takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Scaled(Classifier):
    """Reads numbers beside the image, and answers twice."""

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        answer = super().forward(x)
        return answer * scale, answer.softmax(1)


def stage_of(model: nn.Module, *inputs: Tensor) -> StageGraph:
    (stage,) = cutter_of(model, *inputs).split([])
    return stage


def tiles(x: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    return [t for row in x.tensor_split(grid[0], 2) for t in row.tensor_split(grid[1], 3)]


def reduced(answers: list[Tensor], reduce: Reduce) -> Tensor:
    if reduce == "sum":
        return torch.stack(answers).sum(0)
    if reduce == "mean":
        return torch.stack(answers).mean(0)
    votes = torch.zeros_like(answers[0])
    for answer in answers:
        for row, best in enumerate(answer.argmax(1).tolist()):
            votes[row, best] += 1 / len(answers)
    return votes


@pytest.mark.parametrize("reduce", ["mean", "sum", "vote"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 2)], ids=str)
def test_each_tile_is_answered_like_an_image_of_its_own(
    grid: tuple[int, int], reduce: Reduce, tmp_path: Path
) -> None:
    model = Classifier()
    stage = stage_of(model, rows(3, *SIZE))
    fan = approximate_tiles(stage, grid, reduce)
    assert len(fan.parts) == grid[0] * grid[1]
    assert fan.gather.outputs == stage.outputs
    sizes = [part.inputs[0].shape[2:] for part in fan.parts]
    for axis in (0, 1):
        lengths = {size[axis] or 0 for size in sizes}
        assert max(lengths) - min(lengths) <= 1, "tiles are not as equal as possible"
    x = rows(3, *SIZE, n=5)
    found, travelled = run(fan, {stage.inputs[0].name: x}, tmp_path)
    cut = [travelled[part.inputs[0].name] for part in fan.parts]
    assert sum(t.shape[2] * t.shape[3] for t in cut) == SIZE[0] * SIZE[1]
    joined = [torch.cat(cut[i : i + grid[1]], 3) for i in range(0, len(cut), grid[1])]
    assert torch.equal(torch.cat(joined, 2), x), "the tiles are not the image"
    assert_same(found, [reduced([model(t) for t in cut], reduce)])


def test_other_inputs_go_to_every_tile_and_every_output_is_reduced() -> None:
    model = Scaled()
    x, scale = rows(3, *SIZE), rows(4)
    stage = stage_of(model, x, scale)
    names = [port.name for port in stage.inputs]
    found, _ = run(
        approximate_tiles(stage, (1, 2), "mean"), dict(zip(names, (x, scale), strict=True))
    )
    answers = [model(t, scale) for t in tiles(x, (1, 2))]
    expected = [torch.stack([a[i] for a in answers]).mean(0) for i in range(2)]
    assert_same(found, expected)


class Flat(nn.Module):
    """Its head counts the places of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE[0] * SIZE[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(x, 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "inputs", "grid", "reduce", "message"),
    [
        (Flat(), [rows(3, *SIZE)], (2, 1), "mean", "does not run on a tile of 6x18 of the image"),
        (
            nn.Conv2d(3, 2, 9), [rows(3, *SIZE)], (2, 1), "mean",
            "does not run on a tile of 6x18 of the image 13x18",
        ),
        (
            nn.Conv2d(3, 2, 3), [rows(3, *SIZE)], (2, 1), "mean",
            "of a tile of 6x18 of the image 13x18 has the shape [samples, 2, 4, 16], of the whole",
        ),
        (
            nn.AdaptiveAvgPool2d(1), [rows(3, *SIZE)], (2, 1), "vote",
            "[samples, 3, 1, 1]: tiles vote on [samples, classes]",
        ),
        (Classifier(), [rows(3, *SIZE)], (14, 1), "mean", "14x1 does not fit an image of 13x18"),
        (Classifier(), [rows(3, *SIZE)], (0, 1), "mean", "0x1 does not fit an image of 13x18"),
        (nn.Linear(4, 4), [rows(4)], (2, 1), "mean", "need one image"),
    ],
)  # fmt: skip
def test_what_a_tile_cannot_answer_is_refused(
    model: nn.Module,
    inputs: list[Tensor],
    grid: tuple[int, int],
    reduce: Reduce,
    message: str,
) -> None:
    stage = stage_of(model, *inputs)
    with pytest.raises(CaptureError) as caught:
        approximate_tiles(stage, grid, reduce)
    assert message in caught.value.message
