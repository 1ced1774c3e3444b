"""If these fail, `streaminfer plan` writes files that do not run, or refuses without a remedy."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from streaminfer.errors import ConfigError
from streaminfer.planning import profiler
from streaminfer.planning.build import build
from streaminfer.planning.verify import verify
from streaminfer.spec.file import load
from tests.unit.planning.planned import planned, streaminfer, work_in

MODEL = """
from torch import nn

def build(width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(width * 49, 5),
    )
"""
MODEL_FLAGS = ("model.py:build", "--example", "3x16x16", "--batch", "2")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return work_in(tmp_path, MODEL, monkeypatch)


def test_the_file_builds_and_verifies_as_it_is(folder: Path) -> None:
    answer = planned(
        *MODEL_FLAGS, "--devices", "cpu,cpu", "--stages", "2", "-o", "out/planned.yaml"
    )
    assert len(answer["best"]["stages"]) == 2
    spec = load(folder / "out" / "planned.yaml")
    assert [stage.name for stage in spec.stages] == ["stem", "head"]
    assert spec.stages[0].until == answer["best"]["stages"][0]["until"]
    assert (spec.batch.max, spec.output.top_k, spec.input.crop) == (2, 5, 16)
    build(spec, folder / "plan")
    assert verify(spec, folder / "plan").holds


def test_a_pipeline_file_keeps_all_that_is_not_the_plans(folder: Path) -> None:
    Path("labels.txt").write_text("a\nb\nc\nd\ne\n")
    Path("given.yaml").write_text(
        """pipeline: mine
model: {factory: "model.py:build", kwargs: {width: 4}, example: [3, 16, 16], version: "7"}
input: {topic: pictures, crop: 16, resize: 16, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
batch: {max: 4, wait: 9ms}
stages: [{name: one, until: "1"}, {name: two}]
edges: {two: {dtype: float16}}
output: {topic: answers, labels: labels.txt}
"""
    )
    planned("given.yaml", "--devices", "cpu,cpu", "--stages", "2", "-o", "other/planned.yaml")
    old, new = load(Path("given.yaml")), load(folder / "other" / "planned.yaml")
    assert new.input == old.input
    assert new.batch.wait == old.batch.wait
    assert (new.pipeline, new.first_model.kwargs, new.first_model.version) == (
        "mine",
        {"width": 4},
        "7",
    )
    assert new.edges == {}
    assert new.resolve("labels.txt").parent.name == "other"
    build(new, folder / "plan")  # finds the model and the labels from where it lies
    assert verify(new, folder / "plan").holds


def test_the_file_says_why(folder: Path) -> None:
    planned(*MODEL_FLAGS, "--devices", "cpu", "-o", "planned.yaml")
    lines = Path("planned.yaml").read_text().splitlines()
    assert lines[0].startswith("# Planned: one device")
    assert any("wins nothing" in line for line in lines if line.startswith("#"))
    assert yaml.safe_load("\n".join(lines))["stages"][0]["device"] == "cpu"


def test_trials_rank_by_what_was_measured(folder: Path) -> None:
    answer = planned(*MODEL_FLAGS, "--devices", "cpu,cpu", "--try")
    tried = [row for row in (answer["best"], *answer["others"]) if row["measured"]]
    assert len(tried) >= 3
    most = max(row["measured"]["throughput"] for row in tried)
    assert answer["best"]["measured"]["throughput"] >= 0.97 * most
    for row in tried:
        assert set(row["measured"]) == set(row["predicted"])
        assert 0 < row["measured"]["p50"] <= row["measured"]["p99"]
        assert set(row["measured"]["busy"]) == {stage["name"] for stage in row["stages"]}


def test_dtypes_are_chosen_by_drift(folder: Path) -> None:
    Path("images").mkdir()
    for k in range(5):
        Image.effect_noise((20, 20), 20.0 * (k + 1)).convert("RGB").save(f"images/{k}.png")
    flags = (*MODEL_FLAGS, "--devices", "cpu,cpu", "--stages", "2", "--codec", "auto")
    lossy = planned(*flags, "--calibrate", "images", "--max-drop", "50%", "-o", "planned.yaml")
    assert lossy["edges"]["head"]["dtype"] in ("float16", "bfloat16", "int8")
    saved = {row["dtype"]: row["saved"] for row in lossy["dtypes"]}
    assert saved["float16"] == saved["bfloat16"] == 2
    assert 2.5 < saved["int8"] < 4
    (chosen,) = [row["dtype"] for row in lossy["dtypes"] if row["chosen"]]
    assert chosen == lossy["edges"]["head"]["dtype"]
    assert lossy["drift"]["samples"] == 5
    assert load(Path("planned.yaml")).edge("head").dtype == lossy["edges"]["head"]["dtype"]
    assert any("top-1 answers change" in line for line in lossy["why"])


def test_what_a_slow_link_makes_worth_compressing_is_compressed(folder: Path) -> None:
    flags = (*MODEL_FLAGS, "--devices", "cpu,cpu", "--stages", "2", "--codec", "auto")
    fast = planned(*flags)
    slow = planned(*flags, "--link", "100kB/s")
    assert fast["edges"]["head"]["compress"] == "none"
    assert slow["edges"]["head"]["compress"] != "none"
    assert slow["link"]["per_byte"] == pytest.approx(1e-5)


def test_int8_travels_where_bytes_cost_and_answers_may_change(folder: Path) -> None:
    flags = (*MODEL_FLAGS, "--devices", "cpu,cpu", "--stages", "2", "--codec", "auto")
    loose = planned(*flags, "--link", "100kB/s", "--max-drop", "100%", "-o", "planned.yaml")
    assert loose["edges"]["head"]["dtype"] == "int8"
    narrow = next(row for row in loose["dtypes"] if row["dtype"] == "int8")
    assert narrow["drift"]["max_abs"] > 0
    spec = load(folder / "planned.yaml")
    build(spec, folder / "plan")
    assert verify(spec, folder / "plan").holds
    strict = planned(*flags, "--link", "100kB/s", "--max-drop", "0%")
    allowed = [r["dtype"] for r in strict["dtypes"] if r["drift"]["drop"] == 0]
    assert strict["edges"]["head"]["dtype"] in [*allowed, "native"]


class _Page(HTMLParser):
    """Collects what a page would load, and its figures."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "data") and v]
        self.loads += [tag] if tag in ("script", "link", "iframe") else []


def test_the_report_is_whole_in_itself(folder: Path) -> None:
    planned(*MODEL_FLAGS, "--devices", "cpu,cpu", "--stages", "2", "--report", "report.html")
    text = Path("report.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.loads == []
    assert "url(" not in text
    figures = [part.partition("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    assert len(figures) == 2
    for figure in figures:
        ET.fromstring("<svg" + figure)  # noqa: S314 - our own
    assert "stem ✂ head" in figures[0]


def test_a_batch_that_is_asked_for_is_measured_however_long_it_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "LONGEST", 0.0)  # every larger batch would be left out
    answer = planned(*MODEL_FLAGS[:3], "--devices", "cpu,cpu", "--batch", "2")
    assert answer["best"]["batch"] == 2
    alone = streaminfer("profile", *MODEL_FLAGS[:3], "--batch", "4", "--json", "--fresh")
    timings = json.loads(alone.stdout)["devices"][0]["timings"]
    assert [timing["batch"] for timing in timings] == [1, 4]


def test_a_batch_that_no_memory_holds_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(*MODEL_FLAGS[:3])  # what was profiled with more memory is kept
    monkeypatch.setattr(profiler, "available_memory", lambda device: 100_000)
    with pytest.raises(ConfigError, match="batch 64 does not fit on cpu") as error:
        streaminfer("plan", *MODEL_FLAGS[:3], "--batch", "64")
    assert error.value.where == "--batch"


def test_tables_fit_a_terminal(folder: Path) -> None:
    shown = streaminfer("plan", *MODEL_FLAGS, "--devices", "cpu,cpu", "-o", "planned.yaml")
    assert shown.exit_code == 0
    assert "replicate x2" in shown.output
    assert "streaminfer verify planned.yaml" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    profile = streaminfer("profile", *MODEL_FLAGS[:3])
    assert "samples/s" in profile.output
    assert "link memory" in profile.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.py:build",), "no example input"),
        (("model.py:build", "--example", "3x0x2"), "'3x0x2' is no example input"),
        (("model.py:build", "--example", "3x16x16,4:int65"), "not what a model takes"),
        (("model", "--example", "3x16x16"), "neither a pipeline file nor a model"),
        (("model.py:other", "--example", "3x16x16"), "has no 'other'"),
        ((*MODEL_FLAGS, "--kwargs", "["), "no JSON"),
        ((*MODEL_FLAGS, "--devices", "cuda:71"), "no device 'cuda:71'"),
        ((*MODEL_FLAGS, "--slo", "p50=1s"), "is no bound"),
        ((*MODEL_FLAGS, "--link", "fast"), "memory, kafka, or a rate"),
        ((*MODEL_FLAGS, "--codec", "gzip"), "no codec 'gzip'"),
        ((*MODEL_FLAGS, "--memory", "cuda:0=1GB"), "none of the devices"),
        ((*MODEL_FLAGS, "--memory", "much"), "expected a size"),
        ((*MODEL_FLAGS, "--memory", "1kB"), "too little"),
        ((*MODEL_FLAGS, "--stages", "2"), "2 stages need 2 devices; 1 are named"),
    ],
)
def test_bad_input_is_refused_with_a_reason(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        streaminfer("plan", *arguments)
    assert said in str(error.value)
