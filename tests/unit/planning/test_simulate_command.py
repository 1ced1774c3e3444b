"""The command must predict what the engine does: here the engine's own code, on a clock of its own.

Waits are long against any computing, so that the machine's load decides nothing: what is compared
is how micro-batches form, wait, merge and come back.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from streaminfer.commands import calibration, trial
from streaminfer.commands.simulate import Ask, Outcome, predict, print_simulated
from streaminfer.errors import ConfigError
from streaminfer.spec import PipelineSpec, load
from tests import virtual

pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = Path(__file__).resolve().parents[3] / "stages"


def digits(folder: Path, **changes: Any) -> PipelineSpec:
    raw = yaml.safe_load((STAGES / "digits" / "pipeline.yaml").read_text())
    raw["model"]["factory"] = f"{STAGES / 'digits' / 'model.py'}:build"
    raw["model"]["weights"] = str(STAGES / "digits" / "weights.safetensors")
    raw["stages"] = [{**stage, "threads": 1} for stage in raw["stages"]]
    raw |= {"kafka": {"partitions": 2}, **changes}
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load(file)


def asked(spec: PipelineSpec, folder: Path, **more: Any) -> Outcome:
    return virtual.run(predict(spec, Ask(**more), folder / "plan"))


@pytest.mark.parametrize(("busy", "stolen"), [(10.0, 0.0), (0.0, 10.0)])
def test_a_check_that_others_disturbed_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    busy: float,
    stolen: float,
) -> None:
    spec, times = digits(tmp_path), itertools.count()
    monkeypatch.setattr(
        trial, "machine_seconds", lambda: tuple(next(times) * s for s in (busy, stolen))
    )
    outcome = asked(spec, tmp_path, rate=5.0, seconds=5.0, check=True)
    assert outcome.measured is not None
    assert outcome.measured.others > 0.5
    assert "cores busy while it was measured" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("rate", "most", "replicas"), [(10.0, 8, 1), (40.0, 8, 1), (40.0, 16, 2), (60.0, 4, 1)]
)
def test_the_engine_does_what_is_predicted(
    tmp_path: Path, rate: float, most: int, replicas: int
) -> None:
    stages = [
        {"name": "stem", "until": "stem", "threads": 1},
        {"name": "rest", "threads": 1, "replicas": replicas},
    ]
    spec = digits(tmp_path, batch={"max": most, "wait": "200ms"}, stages=stages)
    for _ in range(
        3
    ):  # a stall of the machine is in the timing or the p99 of one run, not of three
        outcome = asked(spec, tmp_path, rate=rate, seconds=20.0, check=True)
        ratios = dict(outcome.ratios())
        if abs(ratios["p99"] - 1.0) <= 0.15 and abs(ratios["p50"] - 1.0) <= 0.1:
            break
    assert outcome.measured is not None
    assert ratios["throughput"] == pytest.approx(1.0, abs=0.05)
    assert ratios["p50"] == pytest.approx(1.0, abs=0.1)
    assert ratios["p99"] == pytest.approx(1.0, abs=0.15)
    for name, batch in outcome.predicted.batch.items():
        assert batch == pytest.approx(outcome.measured.batch[name], rel=0.15)


def test_the_json_has_the_same_keys_for_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "calibrate", partial(calibration.calibrate, seconds=0.5))
    spec = digits(tmp_path)
    outcome = asked(
        spec, tmp_path, rate=20.0, seconds=4.0, check=True, what_if=["trunk.seconds=2x"]
    )
    print_simulated(outcome, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {"throughput", "p50", "p99", "busy"} <= set(found["measured"]) & set(found["predicted"])
    assert set(found["predicted"]["busy"]) == set(found["measured"]["busy"]) == {
        "stem", "trunk", "head",
    }  # fmt: skip
    before, after = found["predicted"]["busy"]["trunk"], found["what_if"]["busy"]["trunk"]
    assert after == pytest.approx(2 * before, rel=0.2)
    print_simulated(outcome)
    assert "trunk.seconds=2x" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rate": 0.0}, "rate is 0"),
        ({"pattern": "possion"}, "poisson"),
        ({"bus": "rabbit"}, "memory or kafka"),
        ({"replicas": "trnk=2"}, "did you mean trunk"),
        ({"devices": "a,b"}, "2 devices for 3 stages"),
        ({"cost": ["cpu=cheap"]}, "'cpu=cheap' is no price"),
        ({"what_if": ["link.alfa=2ms"]}, "link.alpha"),
        ({"check": True, "replicas": "trunk=2"}, "runs the file as it is"),
        ({"rate": 5.0, "concurrency": 5}, "drop one"),
        ({"concurrency": 0}, "1 or more"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    spec = digits(tmp_path)
    with pytest.raises(ConfigError, match=words):
        asked(spec, tmp_path, **wrong)
