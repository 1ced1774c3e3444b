"""A .pt2 file is a model like any other, but never read unasked: its reader can unpickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from streaminfer.errors import CaptureError, ConfigError
from streaminfer.planning.build import build
from streaminfer.planning.cuts import list_cuts
from streaminfer.planning.factory import make_model
from streaminfer.planning.source import source_key
from streaminfer.planning.verify import verify
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.norm(self.first(x)))
        return self.last(y.mean((2, 3)))  # type: ignore[no-any-return]


def archived(folder: Path, shapes: Any = ({0: torch.export.Dim.AUTO},)) -> nn.Module:
    torch.manual_seed(0)
    model = Small().eval()
    rows = torch.randn(2, 3, 8, 8)
    torch.export.save(
        torch.export.export(model, (rows,), dynamic_shapes=shapes), folder / "model.pt2"
    )
    return model


def declare(folder: Path) -> PipelineSpec:
    document = {
        "pipeline": "small",
        "model": {"file": "model.pt2", "example": [3, 8, 8]},
        "stages": [{"name": "a", "until": "norm"}, {"name": "b"}],
        "output": {"top_k": 2},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(document))
    return load(file)


def test_an_archive_is_read_only_by_who_says_so(tmp_path: Path) -> None:
    archived(tmp_path)
    spec = declare(tmp_path)
    with pytest.raises(ConfigError) as caught:
        build(spec, tmp_path / "plan")
    assert caught.value.where == "model.file"
    assert "can unpickle" in caught.value.message
    assert "--trust" in caught.value.hint
    with pytest.raises(ConfigError, match="--trust"):
        list_cuts(spec.first_model, spec.path)


def test_an_archive_is_cut_by_its_layers_and_gives_the_bits_of_the_model(tmp_path: Path) -> None:
    model = archived(tmp_path)
    spec = declare(tmp_path).trusted()
    plan = build(spec, tmp_path / "plan")
    assert plan.stages[0].layers == ("first", "norm")
    assert verify(spec, tmp_path / "plan").equal
    again = make_model(spec.first_model, tmp_path, trust=True)
    rows = torch.randn(3, 3, 8, 8)
    assert torch.equal(again(rows), model(rows)), "verify compares with what the archive holds"
    names = [row.layer for row in list_cuts(spec.first_model, spec.path, trust=True)]
    assert names[:2] == ["first", "norm"]


def test_a_new_archive_is_a_new_plan(tmp_path: Path) -> None:
    archived(tmp_path)
    spec = declare(tmp_path)
    before = source_key(spec)
    (tmp_path / "model.pt2").write_bytes(b"another")
    assert source_key(spec) != before
    (tmp_path / "model.pt2").unlink()
    with pytest.raises(ConfigError, match=r"no such file: .*model\.pt2"):
        source_key(spec)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"not an archive")
    with pytest.raises(CaptureError, match=r"model\.pt2: cannot read this archive"):
        make_model(declare(tmp_path).first_model, tmp_path, trust=True)


def test_an_archive_of_a_fixed_batch_is_told_how_to_be_exported(tmp_path: Path) -> None:
    archived(tmp_path, shapes=None)
    with pytest.raises(CaptureError) as caught:
        build(declare(tmp_path).trusted(), tmp_path / "plan")
    assert "fixed the batch size of 'x'" in caught.value.message
    assert "dynamic_shapes" in caught.value.hint
