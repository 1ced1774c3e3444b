"""If these fail, a planned split is a promise: the file it writes does not run, or not with it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streaminfer.errors import ConfigError
from streaminfer.planning import profiler
from streaminfer.planning.build import build
from streaminfer.planning.drawing import Turn, schedule
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import Pool, Request, plan
from streaminfer.planning.predict import Candidate, How, Machine
from streaminfer.planning.profile import Link, Profile
from streaminfer.planning.profiler import Captured, capture_model, places
from streaminfer.planning.splitting.parts import Parts
from streaminfer.planning.subject import Subject, subject
from streaminfer.spec.file import load
from streaminfer.topology import build as lay_out
from tests.unit.planning.planned import answered, planned, streaminfer, work_in

MODEL = """
import torch
from torch import nn

def wide(width=1024):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 256),
        nn.ReLU(), nn.Linear(256, 5),
    )

def large(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 3, stride=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5),
    )
"""
WIDE = ("model.py:wide", "--example", "64", "--batch", "2")
LARGE = ("model.py:large", "--example", "3x96x96", "--batch", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, MODEL, monkeypatch)


def split_of(file: Path) -> dict[str, Any]:
    found = next(s for s in yaml.safe_load(file.read_text())["stages"] if "split" in s)
    assert isinstance(found, dict)
    return found


def test_a_layer_too_large_for_a_device_runs_as_shards(folder: Path) -> None:
    """The two wide layers are 1.05 MB each; a device has 0.9."""
    answer = planned(*WIDE, "--devices", "cpu,cpu,cpu,cpu", "--memory", "900kB", "-o", "p.yaml")
    best = answer["best"]
    assert "split by channels x2" in best["form"]
    split = next(stage for stage in best["stages"] if stage["split"])
    assert split["split"]["whole"] > 900e3
    assert all(stage["memory"] <= 900e3 for stage in best["stages"])
    assert any("a device allows 900.0 kB" in line for line in answer["why"])
    declared = split_of(folder / "p.yaml")
    assert declared["split"] == {"by": "channels", "parts": 2}
    assert "replicas" not in declared
    spec = load(folder / "p.yaml", environ={})
    built = build(spec, folder / "plan")
    parts = [stage for stage in built.stages if stage.kind == "part"]
    assert [part.path for part in parts[:2]] == [split["name"]] * 2
    assert all(part.weight_bytes <= split["memory"] for part in parts[:2])
    assert answered(folder / "p.yaml") == 8


def test_activations_too_large_for_a_device_run_as_tiles(folder: Path) -> None:
    answer = planned(*LARGE, "--devices", "cpu,cpu,cpu,cpu,cpu", "--memory", "2MB", "-o", "p.yaml")
    assert "split in tiles" in answer["best"]["form"]
    assert split_of(folder / "p.yaml")["split"]["by"] == "tiles"
    assert all(stage["memory"] <= 2e6 for stage in answer["best"]["stages"])
    assert answered(folder / "p.yaml") == 8


def test_too_few_devices_are_told_how_many_would_do(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no plan fits") as error:
        streaminfer("plan", *WIDE, "--devices", "cpu", "--memory", "900kB")
    assert "weights of '2'" in str(error.value) or "weights of '4'" in str(error.value)
    assert "devices like these may do, with a stage split by channels x" in str(error.value)
    with pytest.raises(ConfigError, match="too little"):
        streaminfer("plan", *WIDE, "--devices", "cpu,cpu,cpu", "--memory", "10kB")


def test_trials_and_the_report_show_a_split(folder: Path) -> None:
    answer = planned(
        *WIDE, "--devices", "cpu,cpu,cpu,cpu", "--memory", "900kB", "--try", "--report", "r.html"
    )
    real = answer["best"]["measured"]
    assert real["throughput"] > 0
    assert set(real["busy"]) == {stage["name"] for stage in answer["best"]["stages"]}
    assert all(0 < share <= 1 for share in real["busy"].values())
    text = Path("r.html").read_text()
    assert answer["best"]["form"] in text
    assert "channels x2" in text
    for part in text.split("<svg")[1:]:
        ET.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")  # noqa: S314 - our own


def test_the_tables_fit_a_terminal(folder: Path) -> None:
    shown = streaminfer("plan", *WIDE, "--devices", "cpu,cpu,cpu,cpu", "--memory", "900kB")
    assert shown.exit_code == 0
    assert "÷2" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80


def test_edges_beside_a_split_stay_native(folder: Path) -> None:
    flags = (*WIDE, "--devices", "cpu,cpu,cpu,cpu", "--memory", "900kB", "--codec", "auto")
    answer = planned(*flags, "--max-drop", "100%", "--link", "100kB/s", "-o", "p.yaml")
    stages = answer["best"]["stages"]
    for before, after in pairwise(stages):
        if before["split"] or after["split"]:
            assert answer["edges"][after["name"]] == {"dtype": "native", "compress": "none"}
    assert any("edges beside a split stay native" in line for line in answer["why"])
    assert answered(folder / "p.yaml") == 8


# ---- a bound on latency, where the cores are not the limit -------------------------------------


def asked(names: int, **options: Any) -> tuple[Subject, Captured, Profile, Request]:
    """Plan the wide model for devices that each have a core of their own."""
    known = subject("model.py:wide", '{"width": 65536}', "64")
    captured = capture_model(known.spec)
    found = profiler.profile(captured, places(["cpu", "cpu"]), batches=(1,), cached=False)
    pool = Pool(found.devices[0], ("cpu",) * names, 8e9)
    link = Link(name="near", alpha=1e-5, per_byte=1e-10, source="made up")
    request = Request((pool,), link, Machine(64), splitter=Parts(captured), **options)
    return known, captured, found, request


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_bound_that_only_a_split_keeps_is_kept_and_runs(folder: Path) -> None:
    known, _, found, request = asked(8)
    plain = plan(found, replace(request, splitter=None))
    least = min(c.p99 for c in (plain.best, *plain.others))
    answer = plan(found, replace(request, slo_p99=0.9 * least))
    assert any(stage.split for stage in answer.best.stages), answer.best.form
    assert answer.best.p99 <= 0.9 * least
    file = folder / "p.yaml"
    file.write_text(pipeline_file(known, answer.best, {}, answer.why, folder))
    assert split_of(file)["split"]["by"] == "channels"
    assert answered(file) == 8


def test_the_parts_are_measured_as_they_run(folder: Path) -> None:
    _, captured, found, request = asked(2)
    first, last = 0, len(captured.graph.nodes) - 1
    assert request.splitter is not None
    assert "no layer" not in request.splitter.problem(first, last, How(2))
    cut = next(c.position for c in found.cuts if c.layer == "1")
    end = next(c.position for c in found.cuts if c.layer == "4")
    whole = sum(node.weight_bytes for node in found.nodes[cut + 1 : end + 1])
    two = request.splitter.figures(cut + 1, end, How(2), 1, found.devices[0])
    four = request.splitter.figures(cut + 1, end, How(4), 1, found.devices[0])
    assert two is not None
    assert four is not None
    assert two.weights == pytest.approx(whole / 2, rel=0.01)
    assert four.weights == pytest.approx(whole / 4, rel=0.01)
    assert two.takes == (256 * 4,) * 2
    assert two.shared
    assert two.gives == (256 * 4,) * 2  # sums of all channels
    assert two.peak >= 65536 // 2 * 4
    assert four.part < two.part < two.whole


def test_tiles_are_measured_with_their_halo_and_all_weights(folder: Path) -> None:
    captured = capture_model(subject("model.py:large", "{}", "3x96x96").spec)
    found = profiler.profile(captured, places(["cpu", "cpu"]), batches=(1,), cached=False)
    end = next(c.position for c in found.cuts if c.layer == "1")
    parts = Parts(captured)
    assert parts.images
    assert "finer than the map" in parts.problem(0, end, How(200, (200, 1)))
    two = parts.figures(0, end, How(2, (2, 1)), 1, found.devices[0])
    assert two is not None
    row, map_row = 3 * 96 * 4, 16 * 96 * 4  # bytes of a row of the image, and of the map behind
    assert two.takes == (49 * row,) * 2  # a row of halo each
    assert two.gives == (48 * map_row,) * 2
    assert not two.shared
    assert two.scatter > 0
    assert two.weights == sum(node.weight_bytes for node in found.nodes[: end + 1])
    whole = max(node.peak_bytes for node in found.nodes[: end + 1])
    assert 0.5 * whole <= two.peak < 0.75 * whole


def short_of_memory(devices: int) -> Candidate:
    """Return the best plan where the two wide layers have to be in three parts or more."""
    _, _, found, request = asked(devices)
    pools = tuple(replace(pool, memory=0.4 * found.weight_bytes) for pool in request.pools)
    return plan(found, replace(request, pools=pools)).best


def test_the_parts_of_a_stage_are_drawn_side_by_side(folder: Path) -> None:
    best = short_of_memory(6)
    at = next(k for k, stage in enumerate(best.stages) if stage.split)
    parts = len(best.stages[at].devices)
    by_batch: dict[int, list[Turn]] = {}
    for turn in schedule(best):
        if turn.stage == at:
            by_batch.setdefault(turn.batch, []).append(turn)
    for turns in by_batch.values():
        assert len({turn.lane for turn in turns}) == len(turns) == parts
        assert len({turn.start for turn in turns}) == 1
    _no_overlap(best)


def _no_overlap(candidate: Candidate) -> None:
    lanes: dict[int, list[tuple[float, float]]] = {}
    for turn in schedule(candidate):
        lanes.setdefault(turn.lane, []).append((turn.start, turn.end))
    for spans in lanes.values():
        ordered = sorted(spans)
        assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(ordered))


def test_devices_are_listed_part_by_part(folder: Path) -> None:
    best = short_of_memory(6)
    split = next(stage for stage in best.stages if stage.split)
    names = tuple(f"cuda:{k}" for k in range(len(split.devices)))
    stages = (replace(s, devices=names) if s is split else s for s in best.stages)
    known = subject("model.py:wide", "{}", "64")
    file = folder / "p.yaml"
    file.write_text(pipeline_file(known, replace(best, stages=tuple(stages)), {}, (), folder))
    assert split_of(file)["device"] == list(names)
    spec = load(file, environ={})
    layout = lay_out(spec, build(spec, folder / "plan"))
    parts = [f"{split.name}.{k}" for k in range(len(names))]
    assert [layout.worker(part).device(part, 0) for part in parts] == list(names)
