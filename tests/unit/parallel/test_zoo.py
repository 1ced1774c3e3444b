"""What a user loses: models that others wrote, cut as they are, by torchvision, timm, transformers.

One for each way of building a model; all of them are in `make bench ONLY=zoo`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from tests.models import SkipMLP, numbers
from tests.zoo import attempt, entries, reload, run

CHOSEN = {
    "torchvision": [
        "resnet18",  # skips
        "densenet121",  # every layer reads all before it
        "googlenet",  # branches, auxiliary outputs in training only
        "mobilenet_v3_small",  # in-place activations, squeeze and excite
        "efficientnet_b0",
        "shufflenet_v2_x0_5",  # chunk and shuffle
        "swin_t",  # windows, rolled and padded
        "vit_b_16",  # a class token
        "maxvit_t",  # attention over a grid
    ],
    "segmentation": ["fcn_resnet50+aux"],  # a dict of outputs
    "timm": ["levit_128s"],
    "transformers": ["bert-tiny", "llama"],  # several inputs by name
}


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
    result = attempt(entry, tmp_path)
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
