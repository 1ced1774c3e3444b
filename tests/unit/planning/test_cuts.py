"""What a user loses: a list of cuts whose every mark is true, so that the next file works."""

from __future__ import annotations

from collections.abc import Callable

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


def test_the_table_and_the_progress_name_every_cut(
    rows: list[CutRow], capsys: pytest.CaptureFixture[str]
) -> None:
    print_cuts(rows)
    text = capsys.readouterr().out
    assert all(row.layer in text for row in rows)
    (line,) = (line for line in text.splitlines() if " down.0 " in line)
    assert "C T …T" in line
    told: list[tuple[int, int]] = []
    list_cuts(MODEL, FILE, random_weights=True, seen=lambda done, total: told.append((done, total)))
    assert told == [(k, len(rows)) for k in range(len(rows))]
