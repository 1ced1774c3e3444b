"""A quorum is bought for answers in time: how many come without the slow member must be foreseen.

The pipeline is timed, calibrated, simulated and run; the clock is the program's own CPU time. What
a call of the slow member takes here sets the rate and the deadline, so that a part of the answers
is late on every machine.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from pathlib import Path

import pytest
import torch
import yaml

from streaminfer.commands import trial
from streaminfer.commands.simulate import Ask, predict
from streaminfer.spec import PipelineSpec, load
from tests import virtual

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = """
from torch import nn


def quick():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def slow():
    layers = [nn.Conv2d(1, 96, 3, padding=1)]
    layers += [nn.Conv2d(96, 96, 3, padding=1) for _ in range(120)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 64, 10))
"""


def seconds_of(file: Path) -> float:
    """Return what one row takes the slow member."""
    spec = importlib.util.spec_from_file_location("quorum_models", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, row, took = module.slow().eval(), torch.zeros(1, 1, 8, 8), []
    with torch.inference_mode():
        for _ in range(15):
            began = time.thread_time()
            model(row)
            took.append(time.thread_time() - began)
    return statistics.median(took)


def ensemble(folder: Path, deadline: float) -> PipelineSpec:
    def branch(name: str, factory: str) -> dict[str, object]:
        return {"name": name, "model": {"factory": f"models.py:{factory}", "example": [1, 8, 8]}}

    raw = {
        "pipeline": "quorum",
        "input": {"topic": "images", "channels": 1},
        "batch": {"max": 1, "wait": "1ms"},
        "stages": [
            {
                "name": "vote",
                "threads": 1,
                "quorum": 2,
                "deadline": f"{deadline * 1e3:.1f}ms",
                "branches": [branch("a", "quick"), branch("b", "quick"), branch("c", "slow")],
            }
        ],
        "output": {"top_k": 3},
        "kafka": {"partitions": 2},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load(file)


@pytest.mark.parametrize("late", [0.5, 1.5, 2.0])
def test_as_many_are_partial_as_is_predicted(
    tmp_path: Path, late: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline of half a slow call, of one and a half, and of two: most make it."""
    monkeypatch.setattr(trial, "CALIBRATE", 0.5)
    (tmp_path / "models.py").write_text(MODELS)
    call = seconds_of(tmp_path / "models.py")
    spec = ensemble(tmp_path, late * call)
    ask = Ask(rate=0.5 / call, seconds=240 * call, check=True)
    for _ in range(3):  # a stall of the machine is the p50 of one run, not of three
        outcome = virtual.run(predict(spec, ask, tmp_path / "plan", random_weights=True))
        assert outcome.measured is not None
        wrong = abs(outcome.predicted.partial - outcome.measured.partial) > 0.15
        if not wrong and abs(dict(outcome.ratios())["p50"] - 1) <= 0.2:
            break
    predicted, measured = outcome.predicted, outcome.measured
    assert measured is not None
    assert predicted.partial == pytest.approx(measured.partial, abs=0.15)
    assert predicted.throughput == pytest.approx(measured.throughput, rel=0.1)
    assert predicted.p50 == pytest.approx(measured.p50, rel=0.2)
    assert predicted.failed == 0.0
