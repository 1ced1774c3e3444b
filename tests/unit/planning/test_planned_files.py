"""A planned file that does not run as it is would have to be written by hand after all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from streaminfer.commands.asked import Asked
from streaminfer.commands.planning import make_plan, write
from streaminfer.errors import ConfigError
from streaminfer.planning.build import build
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import plan
from streaminfer.planning.subject import subject
from streaminfer.spec.file import load
from streaminfer.topology import build as lay_out
from tests.unit.planning.planned import answered, work_in
from tests.unit.planning.profiles import made, request

MODEL = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(100, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, ids, mask):
        x = torch.tanh(self.mix(self.words(ids)))
        return self.head((x * mask.unsqueeze(-1)).sum(1))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, MODEL, monkeypatch)


@pytest.mark.parametrize(("stages", "codec"), [(1, None), (2, "auto"), (2, "int8")])
def test_models_of_several_inputs_are_planned_and_run(
    folder: Path, stages: int, codec: str | None
) -> None:
    asked = Asked(
        "model.py:Two", ["cpu", "cpu"], example="6:int64<100,6:int64", stages=stages, batch=2,
        codec=codec,
    )  # fmt: skip
    outcome = make_plan(asked, quiet=True)
    write(outcome, folder / "planned.yaml", None)
    spec = load(folder / "planned.yaml", environ={})
    assert [one.max for one in spec.first_model.examples().values()] == [100, 2]
    assert len(spec.stages) == stages
    assert answered(folder / "planned.yaml") == 8


def test_replicas_of_a_planned_file_run(folder: Path) -> None:
    asked = Asked("model.py:Two", ["cpu", "cpu"], example="6:int64,6:int64", batch=2)
    outcome = make_plan(asked, quiet=True)
    twice = next(c for c in outcome.candidates if c.form == "replicate x2")
    (folder / "twice.yaml").write_text(
        pipeline_file(outcome.subject, twice, {}, (), folder, outputs=5)
    )
    assert load(folder / "twice.yaml", environ={}).stages[0].replicas == 2
    assert answered(folder / "twice.yaml") == 8


def test_trials_take_several_inputs(folder: Path) -> None:
    asked = Asked(
        "model.py:Two", ["cpu", "cpu"], example="6:int64,6:int64", batch=2, tries=True
    )  # fmt: skip
    outcome = make_plan(asked, quiet=True)
    assert outcome.measured[0].throughput > 0


def test_unlike_devices_of_one_stage_get_shares_by_their_speed(folder: Path) -> None:
    """With equal parts the slow one would set the pace of both."""
    profile = made([10, 10], devices=[("cuda:0", 3.0), ("cpu", 1.0)])
    best = plan(profile, request(profile, ("cuda:0",), ("cpu",), stages=1)).best
    known = subject("model.py:Two", "{}", "6:int64,6:int64")
    file = folder / "mixed.yaml"
    file.write_text(pipeline_file(known, best, {}, (), folder))
    (declared,) = yaml.safe_load(file.read_text())["stages"]
    assert declared["device"] == ["cuda:0", "cpu"]
    assert declared["replicas"] == 2
    assert declared["shares"] == [3.0, 1.0]
    spec = load(file, environ={})
    assert lay_out(spec, build(spec, folder / "plan")).worker("all").shares == (3.0, 1.0)


@pytest.mark.parametrize("text", ["6:int65", "6:int64<", "6:float32<5", "6:int8<1000", "0:int64"])
def test_examples_that_no_model_takes_are_refused_where_they_stand(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        subject("model.py:Two", "{}", text)
    assert error.value.where == "--example"
