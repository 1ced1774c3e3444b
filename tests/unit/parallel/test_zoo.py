"""What a user loses: models that others wrote, cut as they are, by torchvision, timm, transformers.

One for each way of building a model; all of them are in `make bench ONLY=zoo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from tests.models import SkipMLP, numbers
from tests.zoo import Entry, attempt, entries, reload, run

CHOSEN = {
    "torchvision": [
        "resnet18",  # skips
        "densenet121",  # every layer reads all before it
        "googlenet",  # branches, auxiliary outputs in training only
        "mobilenet_v3_small",  # in-place activations, squeeze and excite
        "efficientnet_b0",
        "shufflenet_v2_x0_5",  # chunk and shuffle
        "swin_t",  # windows, rolled and padded
    ],
    "segmentation": ["fcn_resnet50+aux"],  # a dict of outputs
    "timm": ["levit_128s"],
    "transformers": ["bert-tiny", "llama"],  # several inputs by name
}


def narrow_vit() -> nn.Module:
    made: nn.Module = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128
    )
    return made


def narrow_maxvit() -> nn.Module:
    made: nn.Module = torchvision.models.MaxVit(
        (56, 56), 16, partition_size=7, block_channels=[16, 32], block_layers=[2, 1], head_dim=8,
        stochastic_depth_prob=0.2,
    )  # fmt: skip
    return made


def images(pixels: int, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {"": torch.randn(n, 3, pixels, pixels, generator=generator)}


# torchvision's classes behind vit_b_16 and maxvit_t, which as they are take half a minute
NARROW = [
    Entry("vit", "torchvision", narrow_vit, partial(images, 64)),  # a class token
    Entry("maxvit", "torchvision", narrow_maxvit, partial(images, 56)),  # attention over a grid
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The bits do not depend on it, but other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in CHOSEN for name in CHOSEN[family]]
)
def test_a_model_as_it_is_gives_the_same_bits_in_two_three_and_four_stages(
    family: str, name: str, tmp_path: Path
) -> None:
    if family in ("timm", "transformers"):
        pytest.importorskip(family, reason=f"{family} is not installed: pip install {family}")
    (entry,) = [entry for entry in entries([family]) if entry.name == name]
    check(entry, tmp_path)


@pytest.mark.parametrize("entry", NARROW, ids=lambda entry: entry.name)
def test_a_large_model_s_classes_made_narrow_give_the_same_bits_too(
    entry: Entry, tmp_path: Path
) -> None:
    check(entry, tmp_path)


def check(entry: Entry, folder: Path) -> None:
    result = attempt(entry, folder)
    assert result.equal, result
    assert result.cuts > 20


def test_a_model_cut_behind_every_layer_at_once_is_the_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SkipMLP([0, 1, 2, 3, 0, 5, 1, 7]).eval()
    cutter = Cutter(capture(model, (numbers(8)(2),)))
    ends = {layer.last for layer in cutter.captured.layers}
    cuts = [cut for cut in cutter.legal if cut in ends]
    assert len(cuts) == 8, "behind each of the layers"
    for chosen in (cuts, list(cutter.legal)):  # and behind every operator
        programs = reload(cutter.split(chosen), tmp_path)
        assert len(programs) == len(chosen) + 1
        for n in (1, 2, 5):
            rows = numbers(8)(n)
            (found,) = run(programs, [rows])
            assert torch.equal(found, model(rows))
