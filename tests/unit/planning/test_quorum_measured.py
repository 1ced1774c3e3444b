"""A quorum is bought for answers in time: how many come without the slow member must be foreseen.

The pipeline is timed, calibrated, simulated and run; the clock is the program's own CPU time. A
call of the slow member takes so much of it, whatever the machine does: its thread counts it off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from streaminfer.commands import calibration
from streaminfer.commands.simulate import Ask, predict
from streaminfer.runtime import forward
from streaminfer.runtime.device import Device, Done
from streaminfer.spec import PipelineSpec, load
from streaminfer.wire import Envelope
from tests import virtual

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = 0.03  # seconds of CPU time
MODELS = """
from torch import nn


def quick():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


class Slow(Device):
    """The device of the third member."""

    def compute(self, envelopes: Sequence[Envelope]) -> list[Done]:
        began = time.thread_time()
        results = super().compute(envelopes)
        while self._stage.plan.name == "vote.c" and time.thread_time() - began < CALL:
            pass
        return results


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
                "branches": [branch("a", "quick"), branch("b", "quick"), branch("c", "quick")],
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
    monkeypatch.setattr(calibration, "CALIBRATE", 0.5)
    monkeypatch.setattr(forward, "Device", Slow)
    (tmp_path / "models.py").write_text(MODELS)
    spec = ensemble(tmp_path, late * CALL)
    ask = Ask(rate=0.5 / CALL, seconds=240 * CALL, check=True)
    for _ in range(3):  # a stall of the machine is the p50 of one run, not of three
        outcome = virtual.run(predict(spec, ask, tmp_path / "plan", random_weights=True))
        assert outcome.measured is not None
        wrong = abs(outcome.predicted.partial - outcome.measured.partial) > 0.08
        if not wrong and abs(dict(outcome.ratios())["p50"] - 1) <= 0.2:
            break
    predicted, measured = outcome.predicted, outcome.measured
    assert measured is not None
    assert predicted.partial == pytest.approx(measured.partial, abs=0.08)
    assert predicted.throughput == pytest.approx(measured.throughput, rel=0.1)
    assert predicted.p50 == pytest.approx(measured.p50, rel=0.2)
    assert predicted.failed == 0.0
