"""What a user loses: the same numbers from tiles of an image as from the whole of it."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from streaminfer.errors import CaptureError
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.spatial import overhead, split_tiles, tiles_problem
from tests.tiled import (
    assert_same,
    assert_stage_same,
    cutter_of,
    reload,
    rows,
    run,
    whole_stage,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Called(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    pixels: int
    until: str  # "": to the end of the model


def children(model: nn.Module, until: str) -> nn.Module:
    """Keep the first layers of a model whose layers follow each other."""
    names = [name for name, _ in model.named_children()]
    kept = dict(list(model.named_children())[: names.index(until) + 1])
    return nn.Sequential(OrderedDict(kept))


VISION = torchvision.models
NETWORKS = {
    "resnet18 to layer2": Case(lambda: VISION.resnet18(weights=None), 224, "layer2"),
    "resnet18": Case(lambda: VISION.resnet18(weights=None), 224, ""),
    "vgg11": Case(lambda: VISION.vgg11(weights=None).features, 96, ""),
    "googlenet": Case(
        lambda: children(VISION.googlenet(weights=None, init_weights=False), "inception3b"), 96, ""
    ),
    "densenet121": Case(
        lambda: children(VISION.densenet121(weights=None).features, "transition1"), 64, ""
    ),
    "mobilenet_v2": Case(lambda: VISION.mobilenet_v2(weights=None).features[:5], 64, ""),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_tiles_gives_what_the_whole_gives(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    x = rows(3, case.pixels, case.pixels)
    cutter = cutter_of(case.make(), x)
    last = cutter.cuts([case.until])[0] if case.until else len(cutter.captured.nodes) - 1
    stage = whole_stage(cutter, 0, last)
    fan = split_tiles(cutter, 0, last, (2, 2))
    found, _ = run(fan, {stage.inputs[0].name: x}, tmp_path)
    assert_same(found, reload(stage, None)(x))


@functools.cache
def resnet() -> Cutter:
    return cutter_of(torchvision.models.resnet18(weights=None), rows(3, 64, 64))


def at(cutter: Cutter, *untils: str) -> list[int]:
    return cutter.cuts(untils)


def test_every_output_of_a_stage_is_stitched_by_its_own_box() -> None:
    cutter = resnet()
    (cut,) = at(cutter, "layer2.0.conv1")
    stage = whole_stage(cutter, 0, cut)
    assert [port.shape[2:] for port in stage.outputs] == [(16, 16), (8, 8)]
    assert_stage_same(cutter, 0, cut, (3, 2), [rows(3, 64, 64)])


def test_a_stage_in_the_middle_is_split_with_all_that_enters_it() -> None:
    cutter = resnet()
    first, last = at(cutter, "layer1.0.conv1", "layer2.0.conv1")
    assert_stage_same(cutter, first + 1, last, (2, 2), [rows(64, 16, 16), rows(64, 16, 16)])


def test_what_only_passes_through_goes_with_part_0_whole() -> None:
    cutter = resnet()
    first, last = at(cutter, "layer1.0.conv1", "layer1.0.bn2")
    fan = split_tiles(cutter, first + 1, last, (2, 2))
    skipped = next(port for port in fan.gather.inputs if port.shape[2:] == (16, 16))
    assert [skipped in part.outputs for part in fan.parts] == [True, False, False, False]
    assert [skipped in part.inputs for part in fan.parts] == [True, False, False, False]
    assert_stage_same(cutter, first + 1, last, (2, 2), [rows(64, 16, 16), rows(64, 16, 16)])


class TwoInputs(nn.Module):
    """An image, a scale for each channel, and numbers that join behind the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.vector = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(5, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x) * torch.sigmoid(scale)
        vector = self.vector(numbers)
        y = y + vector[:, :, None, None]
        return self.head(torch.cat([y.mean((2, 3)), vector], 1)), y


def test_what_has_no_places_goes_to_each_part_that_reads_it_whole() -> None:
    inputs = rows(3, 11, 14), rows(4, 1, 1), rows(5)
    cutter = cutter_of(TwoInputs(), *inputs)
    last = len(cutter.captured.nodes) - 1
    assert_stage_same(cutter, 0, last, (2, 3), inputs)


def test_a_name_of_the_user_is_not_taken_for_a_tile() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor, x_tile0: Tensor) -> Tensor:
            return self.conv(x) + self.conv(x_tile0)  # type: ignore[no-any-return]

    inputs = rows(3, 9, 9), rows(3, 9, 9, n=2) + 1
    cutter = cutter_of(Named(), *inputs)
    assert_stage_same(cutter, 0, len(cutter.captured.nodes) - 1, (2, 1), inputs)


def test_a_part_gets_its_crop_and_no_more() -> None:
    cutter = resnet()
    (cut,) = at(cutter, "maxpool")
    fan = split_tiles(cutter, 0, cut, (2, 2))
    # 8 rows of the result read 17 of bn1's, of which 1 is padding at the top; those read 37 of
    # the image, of which 3 are padding; from below: rows 15 to 31 read 27 to 63
    assert [part.inputs[0].shape[2:] for part in fan.parts] == [
        (34, 34), (34, 37), (37, 34), (37, 37)
    ]  # fmt: skip


def test_the_work_of_the_busiest_tile_is_known_before_it_runs() -> None:
    cutter = resnet()
    (cut,) = at(cutter, "layer1")
    one = cutter_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), rows(3, 8, 8))
    assert overhead(one, 0, 1, (2, 2)) == 0.25
    none = cutter_of(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), rows(3, 8, 8))
    assert overhead(none, 0, 1, (2, 1)) == 0.5
    assert overhead(cutter, 0, cut, (1, 1)) == 1.0
    assert 0.25 < overhead(cutter, 0, cut, (2, 2)) < 0.6
    assert overhead(cutter, 0, cut, (2, 1)) > overhead(cutter, 0, cut, (2, 2))


# ---- what cannot be ------------------------------------------------------------------------------


class Squeezed(nn.Module):
    """Squeeze and excitation behind a layer that can be split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        self.fc, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * torch.sigmoid(self.fc(self.pool(y))))  # type: ignore[no-any-return]


class Attending(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Places(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[2:])


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, 1)


def behind(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), module)


def halved(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2].mul_(0.5)
    return y


NEAREST = "`until: 1`"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "squeeze and excitation": (
        Squeezed, "aten.mul joins the map with a value that was pooled", "`until: fc`"
    ),
    "attention": (lambda: behind(Attending()), "layer '2' cannot", NEAREST),
    "norm over groups": (lambda: behind(nn.GroupNorm(2, 4)), "normalises over the", NEAREST),
    "norm of instances": (lambda: behind(nn.InstanceNorm2d(4)), "normalises over the", NEAREST),
    "norm over places": (lambda: behind(Places()), "normalises over the whole map", NEAREST),
    "norm by the batch": (
        lambda: behind(nn.BatchNorm2d(4, track_running_stats=False)), "the batch at hand", NEAREST
    ),
    "flatten": (lambda: behind(Flat()), "tiles: aten.flatten: it lays", NEAREST),
    "columns as features": (lambda: behind(nn.Linear(9, 2)), "columns of the map as feat", NEAREST),
    "softmax along rows": (lambda: behind(nn.Softmax(-1)), "other dimensions", NEAREST),
    "mean of rows": (lambda: behind(Called(lambda x: x.mean(3))), "other dimensions", NEAREST),
    "rows cut off": (lambda: behind(Called(lambda x: x[:, :, 2:])), "other dimensions", NEAREST),
    "joined by rows": (
        lambda: behind(Called(lambda x: torch.cat([x, x], 2))), "other dimensions", NEAREST
    ),
    "written in place": (
        lambda: behind(Called(halved)), "writes into memory that others read", NEAREST
    ),
    "circular padding": (
        lambda: behind(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        "'circular'", NEAREST,
    ),
    "corners aligned": (
        lambda: behind(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        "align_corners", NEAREST,
    ),
    "bilinear by 3": (
        lambda: behind(nn.Upsample(scale_factor=3, mode="bilinear")), "power of two", NEAREST
    ),
    "nearest by 1.5": (lambda: behind(nn.Upsample(scale_factor=1.5)), "no whole number", NEAREST),
    "uneven adaptive pool": (
        lambda: behind(nn.AdaptiveAvgPool2d((4, 3))), "9x9 places do not divide evenly into 4x3",
        NEAREST,
    ),
    "transposed convolution": (
        lambda: behind(nn.ConvTranspose2d(4, 4, 2, 2)), "no rule says", NEAREST
    ),
    "maximum of a padded list of numbers": (
        lambda: behind(Called(lambda x: F.max_pool2d(x.to(torch.int32), 3, 1, 1))), "-inf", NEAREST
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_all_of_the_map_is_refused_with_the_nearest_end_that_works(name: str) -> None:
    make, message, hint = REFUSED[name]
    cutter = cutter_of(make(), rows(3, 9, 9))
    last = len(cutter.captured.nodes) - 1
    with pytest.raises(CaptureError) as caught:
        split_tiles(cutter, 0, last, (2, 2))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert tiles_problem(cutter, 0, last, (2, 2)) == caught.value.message
    until = caught.value.hint.split("until: ")[1].rstrip("`")
    (cut,) = cutter.cuts([until])
    assert_stage_same(cutter, 0, cut, (2, 2), [rows(3, 9, 9)])


@pytest.mark.parametrize("until", ["layer4", ""])
def test_a_grid_finer_than_the_map_is_refused_with_the_finest_that_works(until: str) -> None:
    cutter = resnet()
    last = cutter.cuts([until])[0] if until else len(cutter.captured.nodes) - 1
    with pytest.raises(CaptureError) as caught:
        split_tiles(cutter, 0, last, (3, 1))
    assert "a grid of 3x1 is finer than the map of layer 'layer4.1" in caught.value.message
    assert "2x2: the finest grid that works is 2x2" in caught.value.message
    assert "`until: layer3" in caught.value.hint, "all of layer4 is of 2x2"
    assert not tiles_problem(cutter, 0, last, (2, 2))


def test_a_stage_without_an_image_is_refused() -> None:
    cutter = cutter_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), rows(4))
    with pytest.raises(CaptureError, match="nothing to tile"):
        split_tiles(cutter, 0, 1, (2, 2))
    assert "has no tiles" in tiles_problem(resnet(), 0, 5, (0, 2))
