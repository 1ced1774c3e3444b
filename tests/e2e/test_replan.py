"""Advice about a running pipeline: it must reach its workers, and its file must run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.digits.images import scans
from streaminfer import LocalPipeline
from streaminfer.commands import plan_of, print_advice, replan
from streaminfer.commands.asked import Asked
from streaminfer.commands.planning import make_profile
from streaminfer.commands.replan import _changed, _layers, addresses
from streaminfer.errors import ConfigError
from streaminfer.planning import advice as advice_module
from streaminfer.planning import profiler
from streaminfer.planning.advice import Advice, Change
from streaminfer.planning.profile import FOLDER, kept
from streaminfer.planning.source import model_key
from streaminfer.planning.verify import verify
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from streaminfer.topology import build
from tests.e2e.conftest import digits_file


@asynccontextmanager
async def busy(pipeline: LocalPipeline) -> AsyncIterator[None]:
    """Keep a pipeline at work."""

    async def work() -> None:
        async with pipeline.client() as client:
            async for _ in client.stream(cycle(images)):
                pass

    images = [value for _, _, value in scans()[:256]]
    working = asyncio.create_task(work())
    try:
        yield
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def test_a_running_pipeline_is_read_and_judged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = load(digits_file(folder, batch={"max": 8, "wait": "1ms"}))
    where, plan = plan_of(spec, folder / "plan", False)
    out = folder / "new.yaml"
    async with LocalPipeline(spec, plan, where, port=0) as pipeline:
        targets = folder / "targets.json"
        targets.write_text(json.dumps([{"targets": [pipeline.address.removeprefix("http://")]}]))
        idle = await replan(spec, [pipeline.address], over=0.2, folder=where)
        assert idle.verdict == "measure longer"
        async with busy(pipeline):
            for over in ("2s", "10s", "60s"):  # a busy machine computes fewer in as long
                advice = await replan(spec, [str(targets)], over=over, folder=where, out=out)
                if advice.verdict != "measure longer":
                    break
    assert advice.verdict in ("change", "leave"), advice.why
    assert advice.stages is not None
    assert list(advice.stages) == ["stem", "trunk", "head"]
    for cell in advice.stages.values():
        assert cell.samples >= 200
        assert 0 < cell.each < 1
        assert cell.bytes_out > 0
    assert 0 < advice.busy <= 1.1
    assert advice.rate > 0
    assert advice.capacity >= 0.5 * advice.rate  # the law holds
    assert out.exists() == (advice.change is not None)
    print_advice(advice, as_json=True)
    assert json.loads(capsys.readouterr().out)["bottleneck"] in advice.stages
    print_advice(advice, out=out)
    assert advice.bottleneck in capsys.readouterr().out


FAN = [
    {"name": "stem", "until": "stem"},
    {"name": "trunk", "until": "early", "split": {"by": "channels", "parts": 2}},
    {"name": "head"},
]
THREE = [
    {"name": "stem", "until": "stem"},
    {"name": "trunk", "until": "early", "replicas": 2, "device": ["cpu", "cpu"], "shares": [2, 1]},
    {"name": "head"},
]


@pytest.mark.parametrize(
    ("stages", "change", "found"),
    [
        (THREE, Change("replica", "trunk", "", 1.0, 1.0, 3), "stem 1 trunk 3 head 1"),
        (THREE, Change("cut", "trunk", "", 1.0, 1.0, until="down"), "stem 1 trunk 2 head 1"),
        (THREE, Change("whole", "", "", 1.0, 1.0, 4), "whole 4"),
        (FAN, Change("replica", "trunk", "", 1.0, 1.0, 2), "stem 1 trunk.0 2 trunk.1 2 head 1"),
        (FAN, Change("replica", "head", "", 1.0, 1.0, 2), "stem 1 trunk.0 1 trunk.1 1 head 2"),
    ],
)
def test_the_changed_file_runs(
    folder: Path, stages: list[dict[str, Any]], change: Change, found: str
) -> None:
    spec, plan = planned(folder, stages)
    file = folder / "new.yaml"
    file.write_text(_changed(spec, plan, change))
    new = load(file)
    _, made = plan_of(new, folder / "new", False)
    workers = build(new, made).workers[:-1]
    assert " ".join(f"{worker.name} {worker.replicas}" for worker in workers) == found
    if change.kind == "cut":
        assert made.stages[1].layers[-1] == change.until


def planned(folder: Path, stages: list[dict[str, Any]]) -> tuple[PipelineSpec, Any]:
    digits_file(folder)
    raw = yaml.safe_load((folder / "pipeline.yaml").read_text())
    raw["stages"] = stages
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(raw))
    spec = load(folder / "pipeline.yaml")
    return spec, plan_of(spec, folder / "plan", False)[1]


def test_addresses_are_urls_ports_or_the_file_of_targets(folder: Path) -> None:
    file = folder / "x.targets.json"
    file.write_text(json.dumps([{"targets": ["a:1"], "labels": {}}, {"targets": ["b:2"]}]))
    assert addresses([str(file), "http://c:3", "http://a:1/metrics", "d:4/own"]) == [
        "http://a:1/metrics", "http://b:2/metrics", "http://c:3/metrics", "http://d:4/own",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "more", "words"),
    [
        (["http://127.0.0.1:1"], {}, "refused"),
        (["nothing.json"], {}, "No such file"),
        (["ftp://a:1"], {}, "no address of a worker"),
        ([], {}, "no worker is named"),
        (["a:1"], {"worth": "much"}, "'much' is no gain"),
        (["a:1"], {"over": "0s"}, "nothing is measured"),
        (["a:1"], {"over": "soon"}, "duration"),
        (["a:1"], {"out": Path("/elsewhere/x.yaml")}, "another folder"),
    ],
)
async def test_what_cannot_be_measured_is_said(
    folder: Path, sources: list[str], more: dict[str, Any], words: str
) -> None:
    spec = load(digits_file(folder))
    with pytest.raises(ConfigError, match=words):
        await replan(spec, sources, folder=folder / "plan", **more)


async def test_the_file_that_runs_is_not_overwritten(folder: Path) -> None:
    spec = load(digits_file(folder))
    with pytest.raises(ConfigError, match="the file which runs"):
        await replan(spec, ["a:1"], out=folder / "pipeline.yaml")


HEAVY = """
from torch import nn


def build():
    def conv():
        return nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())

    layers = {"first": nn.Conv2d(3, 24, 3, padding=1)}
    layers |= {f"l{k}": conv() for k in range(6)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "last": nn.Linear(24, 4)}
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net.eval()
"""


def unequal(folder: Path, model: str = HEAVY) -> PipelineSpec:
    """Write a pipeline whose second stage has nearly all of the work."""
    (folder / "model.py").write_text(model)
    raw = {
        "pipeline": "unequal",
        "model": {"factory": "model.py:build", "example": [3, 32, 32]},
        "input": {"topic": "images", "resize": 32, "crop": 32},
        "batch": {"max": 4, "wait": "1ms"},
        "stages": [{"name": "a", "until": "l0", "threads": 1}, {"name": "b", "threads": 1}],
        "output": {"top_k": 2},
        "kafka": {"partitions": 4},
        "metrics": {"port": 0},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return load(file)


@pytest.fixture
def profiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the folder, and let a profile be kept however busy the machine is."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(profiler, "BUSY", float("inf"))
    monkeypatch.setattr("streaminfer.commands.planning.BATCHES", (1, 4))
    monkeypatch.setattr("streaminfer.planning.timing.SECONDS", 0.0)
    return folder


async def test_a_profiled_model_is_advised_where_to_cut_it(
    profiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all of it is one process here: the event loop takes a part of what is the device's in others
    monkeypatch.setattr(advice_module, "HOT", 0.05)
    spec = unequal(profiled)
    where, plan = plan_of(spec, profiled / "plan", True)
    out = profiled / "new.yaml"
    async with LocalPipeline(spec, plan, where, port=0) as pipeline:

        async def advised(**more: Any) -> Advice:
            """Measure for as long as it takes here."""
            for seconds in (3.0, 6.0, 12.0, 24.0):
                found = await replan(
                    spec,
                    [pipeline.address],
                    over=seconds,
                    folder=where,
                    random_weights=True,
                    **more,
                )
                if found.verdict != "measure longer":
                    break
            return found

        async with busy(pipeline):
            blind = await advised()
        asked = Asked(str(spec.path), ["cpu"], random_weights=True)
        await asyncio.to_thread(make_profile, asked, quiet=True)
        async with busy(pipeline):
            advice = await advised(worth="10%", out=out)
            calm = await advised(worth="900%")
    assert "`streaminfer profile PIPELINE`" in " ".join(blind.notes)
    assert not any(change.kind == "cut" for change in (blind.change, *blind.others) if change)
    assert not any("streaminfer profile" in note for note in advice.notes)
    (cut,) = [c for c in (advice.change, *advice.others) if c and c.kind == "cut"]
    assert cut.until in [layer.until for layer in _layers(spec, plan)]
    assert "(now l0)" in cut.text
    assert cut.capacity == pytest.approx(advice.capacity * (1 + cut.gain))
    # what it gains depends on what else runs on this machine; the verdict has to follow from it
    assert (advice.verdict == "change") == (advice.change is not None) == out.exists()
    best = max(change.gain for change in (advice.change, *advice.others) if change)
    assert advice.verdict == "leave" or best >= 0.1
    assert calm.verdict == "leave"  # the same pipeline, and nobody turns it over for less
    assert calm.change is None
    assert "less than 900%" in calm.why


EVEN = """
from torch import nn


def build():
    net = nn.Sequential()
    net.add_module("wide", nn.Conv2d(3, 32, 3, padding=1))
    for k in range(12):
        net.add_module(f"l{k}", nn.Conv2d(32, 32, 3, padding=1))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("last", nn.Linear(32, 4))
    return net.eval()
"""


async def test_a_bad_cut_is_moved_and_a_good_one_is_kept(profiled: Path) -> None:
    """The way a user goes: profile, be advised, verify the new file, run it, be left alone."""
    spec = unequal(profiled, EVEN)
    out = profiled / "new.yaml"
    asked = Asked(str(spec.path), ["cpu", "cpu"], random_weights=True)
    await asyncio.to_thread(make_profile, asked, quiet=True)
    bad = await advised(spec, profiled / "plan", out)
    assert bad.verdict == "change", bad.why
    assert bad.bottleneck == "b"
    assert bad.change is not None
    assert (bad.change.kind, bad.change.stage) == ("cut", "a")
    assert bad.change.until in ("l3", "l4", "l5", "l6", "l7")
    assert bad.change.gain > 0.4  # of 92 % of the work on one device, 60 at most are left
    assert bad.change.capacity == pytest.approx(bad.capacity * (1 + bad.change.gain))
    new = load(out)
    where, _ = plan_of(new, profiled / "new", True)
    assert (await asyncio.to_thread(verify, new, where)).holds
    good = await advised(new, where, None)
    assert good.verdict == "leave", good.why
    assert good.change is None


async def advised(spec: PipelineSpec, folder: Path, out: Path | None) -> Advice:
    """Run a pipeline at full load, and ask for as long as it takes here."""
    where, plan = plan_of(spec, folder, True)
    async with LocalPipeline(spec, plan, where, port=0) as pipeline, busy(pipeline):
        for seconds in (4.0, 8.0, 16.0, 32.0):
            found = await replan(
                spec, [pipeline.address], worth="30%", over=seconds, folder=where, out=out,
                random_weights=True,
            )  # fmt: skip
            if found.verdict != "measure longer":
                break
    return found


def test_only_the_profile_of_this_very_model_counts(profiled: Path) -> None:
    spec = unequal(profiled)
    _, plan = plan_of(spec, profiled / "plan", True)
    assert _layers(spec, plan) == []
    make_profile(Asked(str(spec.path), ["cpu"], random_weights=True), quiet=True)
    found = _layers(spec, plan)
    assert [layer.until for layer in found][-2:] == ["flat", ""]
    assert {f"l{k}" for k in range(6)} < {layer.until for layer in found}
    assert all(layer.seconds >= 0 for layer in found)
    (profiled / "model.py").write_text(HEAVY.replace("range(6)", "range(3)"))
    _, other = plan_of(spec, profiled / "other", True)
    assert _layers(spec, other) == []
    for file in FOLDER.glob("*.json"):
        file.write_text("{}")  # of another version
    assert kept(model_key(spec, True)) == []
