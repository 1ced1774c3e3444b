"""Every way of spreading a model can be predicted: else its user buys devices by guess.

Each form is timed, calibrated, simulated and run; the clock is the program's own CPU time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streaminfer.commands import calibration
from streaminfer.commands.simulate import Ask, Outcome, predict
from streaminfer.spec import PipelineSpec, load
from tests import virtual

STAGES = Path(__file__).resolve().parents[3] / "stages" / "digits"
WEIGHTS = {"weights": str(STAGES / "weights.safetensors"), "example": [1, 8, 8]}
MODEL = {"factory": f"{STAGES / 'model.py'}:build", **WEIGHTS}
STEM, HEAD = {"name": "stem", "until": "stem"}, {"name": "head"}
HEADS = '''
from torch import Tensor, nn


class Sure(nn.Module):
    """Sure of every row that is brighter on its left: of some, and not of others."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :4].flatten(1), x[..., 4:].flatten(1)
        sure = 20.0 * (left.sum(1, keepdim=True) > right.sum(1, keepdim=True)).float()
        return nn.functional.pad(sure, (0, 9))


def build() -> nn.Module:
    return Sure()
'''
FORMS: dict[str, dict[str, Any]] = {
    "channels": {
        "stages": [
            STEM,
            {"name": "trunk", "until": "early", "split": {"by": "channels", "parts": 2}},
            HEAD,
        ]
    },
    "tiles": {
        "stages": [
            {"name": "trunk", "until": "down", "split": {"by": "tiles", "grid": [1, 2]}},
            HEAD,
        ]
    },
    "ensemble": {
        "stages": [
            {
                "name": "vote",
                "branches": [
                    {
                        "name": "a",
                        "model": MODEL,
                        "stages": [{"name": "front", "until": "stem"}, {"name": "back"}],
                    },
                    {"name": "b", "model": MODEL},
                ],
            }
        ]
    },
    "exit": {
        "stages": [
            {**STEM, "exit": {"factory": "heads.py:build", "threshold": 0.9}},
            {"name": "back"},
        ]
    },
    "replicas": {
        "stages": [STEM, {"name": "trunk", "until": "early", "replicas": 2, "shares": [2, 1]}, HEAD]
    },
    "balance": {
        "stages": [STEM, {"name": "trunk", "until": "early", "replicas": 2}, HEAD],
        "edges": {"trunk": {"partitioning": "balance"}},
    },
    "hybrid": {
        "stages": [
            {"name": "stem", "until": "stem", "split": {"by": "tiles", "grid": [1, 2]}},
            {"name": "trunk", "until": "early", "replicas": 2},
            {**HEAD, "replicas": 2},
        ],
        "edges": {"trunk": {"dtype": "float16"}, "head": {"transport": "local"}},
    },
    "local": {
        "stages": [STEM, HEAD],
        "edges": {"default": {"transport": "local"}},
    },
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(calibration, "calibrate", partial(calibration.calibrate, seconds=0.5))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def form(folder: Path, **changes: Any) -> PipelineSpec:
    (folder / "heads.py").write_text(HEADS)
    raw = {
        "pipeline": "forms",
        "input": {"topic": "images", "channels": 1},
        "batch": {"max": 8, "wait": "50ms"},
        "output": {"top_k": 3},
        "kafka": {"partitions": 2},
    } | changes
    if "branches" not in raw["stages"][0]:
        raw.setdefault("model", MODEL)
    raw["stages"] = [{"threads": 1, **one} for one in raw["stages"]]
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load(file)


def check(spec: PipelineSpec, folder: Path, **more: Any) -> Outcome:
    ask = Ask(rate=30.0, seconds=4.0, check=True, **more)
    return virtual.run(predict(spec, ask, folder / "plan"))


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_every_form_is_predicted_and_measured_alike(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    for _ in range(3):  # one stall of the machine is the p99 of so few samples
        found = check(form(tmp_path, **changes), tmp_path).to_json()
        predicted, measured = found["predicted"], found["measured"]
        if predicted["p99"] == pytest.approx(measured["p99"], rel=0.5):
            break
    assert set(found["ratio"]) == {"throughput", "p50", "p99"}
    assert set(predicted["busy"]) == set(measured["busy"]) == set(predicted["queues"])
    assert set(measured["batch"]) == set(predicted["batch"])
    assert predicted["throughput"] == pytest.approx(measured["throughput"], rel=0.15)
    assert predicted["p50"] == pytest.approx(measured["p50"], rel=0.35)
    assert predicted["p99"] == pytest.approx(measured["p99"], rel=0.5)
    for name, size in measured["batch"].items():
        assert predicted["batch"][name] == pytest.approx(size, rel=0.35), name


def test_how_many_leave_at_an_exit_is_measured_and_can_be_changed(tmp_path: Path) -> None:
    outcome = check(form(tmp_path, **FORMS["exit"]), tmp_path, what_if=["stem.exit=0"])
    assert outcome.measured is not None
    assert outcome.changed is not None
    part = outcome.measured.busy["back"]
    assert outcome.predicted.busy["back"] == pytest.approx(part, rel=0.5)
    assert outcome.changed.busy["back"] > outcome.predicted.busy["back"]


MODELS = '''
from torch import Tensor, nn


class Named(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Embedding(16, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, dense: Tensor, word: Tensor) -> Tensor:
        return self.last(self.one(dense) + self.two(word).sum(1))


def build() -> nn.Module:
    return Named()
'''


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by place"])
def test_a_model_of_several_inputs_is_fed_all_of_them(tmp_path: Path, by_name: bool) -> None:
    (tmp_path / "models.py").write_text(MODELS)
    dense, word = {"shape": [4]}, {"shape": [5], "dtype": "int64", "max": 16}
    example = {"dense": dense, "word": word} if by_name else [dense, word]
    spec = form(
        tmp_path,
        model={"factory": "models.py:build", "example": example},
        stages=[{"name": "all"}],
        input={"topic": "images", "decode": "tensor"},
        output={"top_k": 0},
    )
    ask = Ask(rate=30.0, seconds=3.0, check=True)
    outcome = virtual.run(predict(spec, ask, tmp_path / "plan", random_weights=True))
    assert outcome.measured is not None
    assert outcome.measured.throughput == pytest.approx(30.0, rel=0.35)
    assert outcome.measured.batch["all"] >= 1
