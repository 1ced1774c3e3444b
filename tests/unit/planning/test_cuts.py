"""What a user loses: a list of cuts whose every mark is true, so that the next file works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stages.digits.model import build
from streaminfer.commands import print_cuts
from streaminfer.errors import CaptureError
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.spatial import split_tiles
from streaminfer.parallel.tensor import split_channels
from streaminfer.planning.cuts import CutRow, list_cuts
from streaminfer.spec import ModelSpec
from tests.e2e.conftest import ROOT

MODEL = ModelSpec(factory="model.py:build", example=(1, 8, 8))
FILE = ROOT / "stages" / "digits" / "pipeline.yaml"


@pytest.fixture(scope="module")
def rows() -> list[CutRow]:
    return list_cuts(MODEL, FILE, random_weights=True)


def works(split: Callable[[], object]) -> bool:
    try:
        split()
    except CaptureError:
        return False
    return True


def test_every_mark_is_what_the_split_itself_says(rows: list[CutRow]) -> None:
    cutter = Cutter(capture(build().eval(), (torch.randn(2, 1, 8, 8),)))
    first = 0
    for row in rows:
        last = row.position
        for mark, split in (
            (row.channels, lambda a=first, b=last: split_channels(cutter, a, b, 2)),
            (row.tiles, lambda a=first, b=last: split_tiles(cutter, a, b, (2, 2))),
            (row.tiles_up_to_here, lambda b=last: split_tiles(cutter, 0, b, (2, 2))),
        ):
            assert mark == works(split), row
        first = last + 1


def test_marks_tell_layers_apart(rows: list[CutRow]) -> None:
    named = {row.layer: row for row in rows}
    assert named["down.0"].channels
    assert not named["down"].channels, "a ReLU has no channels to split"
    assert named["late"].tiles_up_to_here
    assert not named["head.1"].tiles_up_to_here, "what is flattened has no places"


def test_attention_and_mlp_of_a_vision_transformer_are_marked_as_a_whole() -> None:
    """Their rows hold what is behind the last linear layer alone, which has nothing to split."""
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "num_heads": 6, "depth": 1}
    kwargs = {"model_name": "vit_tiny_patch16_224", **sizes}
    model = ModelSpec(factory="timm:create_model", kwargs=kwargs, example=(3, 32, 32))
    named = {row.layer: row for row in list_cuts(model, random_weights=True)}
    for layer in ("blocks.0.attn", "blocks.0.mlp"):
        assert named[layer].channels_of_layer
        assert not named[layer].channels
    assert not named["blocks"].channels_of_layer, "a block has two exchanges"


def test_the_table_and_the_progress_name_every_cut(
    rows: list[CutRow], capsys: pytest.CaptureFixture[str]
) -> None:
    print_cuts(rows)
    text = capsys.readouterr().out
    assert all(row.layer in text for row in rows)
    (line,) = (line for line in text.splitlines() if " down.0 " in line)
    assert line.split("│")[-2].split() == ["C", "T", "…T"]
    told: list[tuple[int, int]] = []
    list_cuts(MODEL, FILE, random_weights=True, seen=lambda done, total: told.append((done, total)))
    assert told == [(k, len(rows)) for k in range(len(rows))]
