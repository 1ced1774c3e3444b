"""Every form gives what the uncut model gives: every file in stages/, and what they leave out.

On Kafka the workers share this process, but for one file whose workers are processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from streaminfer import Client
from tests.e2e.conftest import streaminfer
from tests.pipelines import own
from tests.pipelines.forms import AS_IT_IS, DIGITS, STAGES, Changes, Form, Made, answered, copied

FILES = sorted(STAGES.glob("*/*.yaml"))
LARGE = {file for file in FILES if file.parent.name == "resnet50"}  # no scans of digits for these
LOCAL = {"default": {"transport": "local"}}


def stages(*given: Any) -> dict[str, Any]:
    return {"stages": list(given)}


def channels(parts: int = 2, form: str = "auto") -> dict[str, Any]:
    return {"split": {"by": "channels", "parts": parts, "form": form}}


def tiles(rows: int, columns: int, reduce: str = "exact") -> dict[str, Any]:
    return {"split": {"by": "tiles", "grid": [rows, columns], "reduce": reduce}}


def members(*, edges: Changes = AS_IT_IS, **stage: Any) -> dict[str, Any]:
    """Two models side by side; `front` of the first is in stages where it is said so."""
    first, second = stage.pop("first", {}), stage.pop("second", {})
    model = {"factory": "model.py:build", "weights": "weights.safetensors", "example": [1, 8, 8]}
    other = {"factory": "members.py:perceptron", "weights": "perceptron.safetensors"}
    branches = [
        {"name": "a", "model": model, **first},
        {"name": "b", "model": {**other, "example": [1, 8, 8]}, **second},
    ]
    ensemble = {"name": "all", "branches": branches, **stage}
    return {"model": None, "edges": dict(edges), **stages(ensemble)}


EXIT = {
    "exit": {
        "factory": "members.py:exit_head",
        "weights": "exit.safetensors",
        "threshold": 0.94,  # some leave and some stay
    }
}


MANY = {"model": {"example": [1, "8..16", "8..16"]}}  # sizes


def many_sizes(**stage: Any) -> dict[str, Any]:
    """Two models that take any size side by side."""
    model = {"factory": "model.py:build", "weights": "weights.safetensors", **MANY["model"]}
    branches = [{"name": "a", "model": model, **STAGED}, {"name": "b", "model": model}]
    return {"model": None, **stages({"name": "all", "branches": branches, **stage})}


STEM, EARLY, HEAD = {"name": "stem", "until": "stem"}, {"until": "early"}, {"name": "head"}
TRUNK = {"name": "trunk", **EARLY}
STAGED = {"stages": [{"name": "front", **EARLY}, {"name": "back"}]}
SPLIT = {"stages": [STEM, {**TRUNK, **channels()}, HEAD]}
QUARTER = {"dtype": "int8", "compress": "zstd"}
HALF = {"dtype": "float16", "compress": "lz4"}

FORMS: dict[str, Changes] = {
    "one stage": stages({"name": "whole"}),
    "all edges local": {"edges": LOCAL},
    "float16, zstd": {"edges": {"default": {"dtype": "float16", "compress": "zstd"}}},
    "int8, zstd": {"edges": {"default": {"dtype": "int8", "compress": "zstd"}}},
    "int8 into shards and out of them": {
        **stages(STEM, {**TRUNK, **channels()}, HEAD),
        "edges": {"default": {"dtype": "int8"}},
    },
    "bfloat16": {"edges": {"default": {"dtype": "bfloat16"}}},
    "raw outputs": {"output": {"top_k": 0, "labels": None}},
    "first split by channels": stages({**STEM, **channels(3)}, HEAD),
    "last split by channels": stages({"name": "stem", "until": "late"}, {**HEAD, **channels()}),
    "split by input channels": stages(
        {"name": "stem", **EARLY}, {"name": "trunk", "until": "down.0", **channels(2, "in")}, HEAD
    ),
    "two splits in a row": stages({**STEM, **channels()}, {**TRUNK, **channels()}, HEAD),
    "tiles, then channels": stages({**STEM, **tiles(2, 2)}, {**TRUNK, **channels()}, HEAD),
    "split with local edges": {**stages(STEM, {**TRUNK, **channels()}, HEAD), "edges": LOCAL},
    "only a split's edge local": {
        **stages(STEM, {**TRUNK, **channels()}, HEAD),
        "edges": {"trunk": {"transport": "local"}},
    },
    "first in tiles": stages({"name": "stem", **EARLY, **tiles(2, 1)}, HEAD),
    "tiles with local edges": {**stages({**STEM, **tiles(1, 2)}, HEAD), "edges": LOCAL},
    "16 bits, lz4 into tiles": {
        **stages(STEM, {"name": "trunk", "until": "late", **tiles(1, 2)}, HEAD),
        "edges": {"default": HALF},
    },
    "16 bits, lz4 into shards": {
        **stages(STEM, {**TRUNK, **channels()}, HEAD),
        "edges": {"default": HALF},
    },
    "int8": {"edges": {"default": {"dtype": "int8"}}},
    "int8, zstd into a linear stage": {
        **stages({"name": "body", "until": "late"}, HEAD), "edges": {"head": QUARTER}
    },
    "int8, zstd into shards and out of them": {
        **stages(STEM, {**TRUNK, **channels()}, HEAD), "edges": {"default": QUARTER}
    },
    "int8 into tiles and out of them": {
        **stages(STEM, {"name": "trunk", "until": "late", **tiles(1, 2)}, HEAD),
        "edges": {"default": {"dtype": "int8"}},
    },
    "int8 into branches": members(edges={"all": QUARTER}, fuse="max", quorum=2),
    "int8, some edges local": {
        **stages(STEM, {**TRUNK, **channels()}, HEAD),
        "edges": {"default": QUARTER, "trunk": {"transport": "local"}},
    },
    "shards of two replicas": stages(STEM, {**TRUNK, **channels(), "replicas": 2}, HEAD),
    "mean of tiles": stages({"name": "whole", **tiles(1, 2, "mean")}),
    "sum of tiles": stages({"name": "whole", **tiles(2, 1, "sum")}),
    "vote of tiles, local": {**stages({"name": "whole", **tiles(2, 2, "vote")}), "edges": LOCAL},
    "vote of tiles, raw": {
        **stages({"name": "whole", **tiles(2, 1, "vote")}),
        "output": {"top_k": 0, "labels": None},
    },
    "weighted mean": members(first={"weight": 3}),
    "mean, local": members(edges=LOCAL),
    "max": members(fuse="max"),
    "vote": members(fuse="vote", first={"weight": 2.5}),
    "a module of the user": members(fuse="own.py:Weighed"),
    "raw mean": {**members(), "output": {"top_k": 0, "labels": None}},
    "16 bits, lz4 into branches": members(edges={"all": HALF}, fuse="max", quorum=2),
    "a branch in stages": members(first=STAGED),
    "a branch in stages, local": members(first=STAGED, edges=LOCAL),
    "a split in a branch": members(first=SPLIT),
    "a split in a branch, local": members(first=SPLIT, edges=LOCAL),
    "tiles in a branch": members(first={"stages": [{**STEM, **tiles(2, 1)}, HEAD]}),
    "tiles in a branch, local": members(
        first={"stages": [{**STEM, **tiles(2, 1)}, HEAD]}, edges=LOCAL
    ),
    "stages, then branches": {
        **stages(
            {"name": "stem"},
            {"name": "all", "fuse": "max", "branches": [
                {"name": k, "model": {"factory": "own.py:rank", "kwargs": {"seed": seed},
                                      "example": [10]}}
                for k, seed in (("a", 1), ("b", 2))
            ]},
        ),
    },
    "an exit": stages({"name": "stem", **EARLY, **EXIT}, HEAD),
    "an exit on local edges": {
        **stages({"name": "stem", **EARLY, **EXIT}, HEAD),
        "edges": LOCAL,
    },
    "an exit, then a split": stages(
        {"name": "stem", **EARLY, **EXIT},
        {"name": "trunk", "until": "down", **channels()},
        HEAD,
    ),
    "many sizes, by channels": {**MANY, **stages(STEM, {**TRUNK, **channels()}, HEAD)},
    "many sizes, first by channels": {**MANY, **stages({**STEM, **channels(3)}, HEAD)},
    "many sizes, local, with an exit": {
        **MANY, **stages({"name": "stem", **EARLY, **EXIT}, HEAD), "edges": LOCAL
    },
    "many sizes, balanced, int8": {
        **MANY,
        **stages(STEM, {**TRUNK, "replicas": 2}, HEAD),
        "edges": {"trunk": {"partitioning": "balance"}, "default": QUARTER},
    },
    "many sizes, branches": many_sizes(fuse="max", quorum=2),
    "two replicas, balanced": {
        **stages(STEM, {**TRUNK, "replicas": 2}, HEAD),
        "edges": {"trunk": {"partitioning": "balance"}},
    },
}  # fmt: skip
ON_KAFKA = (
    "last split by channels",
    "two splits in a row",
    "only a split's edge local",
    "16 bits, lz4 into tiles",
    "int8, zstd into shards and out of them",
    "shards of two replicas",
    "a split in a branch",
    "tiles in a branch",
    "a branch in stages",
    "an exit, then a split",
)  # every kind of worker and topic that no file in stages/ has

SMALL = [file for file in FILES if file not in LARGE]
NAMES = {**{f"{file.parent.name}/{file.name}": (file, {}) for file in FILES},
         **{name: (DIGITS, changes) for name, changes in FORMS.items()}}  # fmt: skip
BUSES = [
    *[pytest.param(name, "memory", id=f"{name}-memory") for name, (file, _) in NAMES.items()
      if file not in LARGE],
    *[pytest.param(name, "kafka", id=f"{name}-kafka", marks=pytest.mark.kafka)
      for name, (file, _) in NAMES.items()
      if file not in LARGE and (name not in FORMS or name in ON_KAFKA)],
]  # fmt: skip


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Form]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a core is busy with the workers' loops and Kafka's clients
    found, shared = {}, Made()
    for name, (file, changes) in NAMES.items():
        folder = tmp_path_factory.mktemp("form")
        shutil.copy(own.__file__, folder)
        made = shared if file in LARGE and file.name != "pipeline.yaml" else None
        found[name] = Form(copied(file, folder, changes), folder, file in LARGE, made)
    yield found
    torch.set_num_threads(threads)


def test_every_form_of_the_readme_has_a_file() -> None:
    names = {file.name for file in SMALL}
    assert names >= {
        "pipeline.yaml", "replicas.yaml", "local.yaml", "channels.yaml", "tiles.yaml",
        "tiles-vote.yaml", "ensemble.yaml", "early-exit.yaml", "balance.yaml", "hybrid.yaml",
        "sizes.yaml",
    }  # fmt: skip
    for file in FILES:
        first = file.read_text().split("\npipeline:")[0]
        assert all(line.startswith("#") for line in first.splitlines())
        assert "When:" in first, f"{file}: when to use it"
    readme = (STAGES / "README.md").read_text()
    assert all(f"]({file.parent.name}/{file.name})" in readme for file in FILES)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if f in LARGE else ()) for n, (f, _) in NAMES.items()],
)
@pytest.mark.timeout(300)
def test_verify_holds(forms: dict[str, Form], name: str) -> None:
    assert forms[name].report.holds, forms[name].report
    forms[name].check_topology()


@pytest.mark.parametrize(("name", "bus"), BUSES)
async def test_the_answers_are_those_of_the_uncut_model(
    forms: dict[str, Form], name: str, bus: str, request: pytest.FixtureRequest
) -> None:
    address = request.getfixturevalue("kafka_address") if bus == "kafka" else None
    form = forms[name]
    form.check(await form.answers(address))


@pytest.mark.kafka
@pytest.mark.timeout(400)
async def test_the_workers_of_a_hybrid_are_processes(
    forms: dict[str, Form], kafka_address: str
) -> None:
    form = forms["digits/hybrid.yaml"]
    path = {"PATH": os.environ["PATH"], "KAFKA_BOOTSTRAP_SERVERS": ""}
    plan = ("--plan", str(form.folder / "plan"))
    command = ("run", str(form.file), "--kafka", kafka_address, *plan)
    async with streaminfer(*command, cwd=form.folder, **path) as run:
        await run.line("ready")
        async with Client(kafka_address, pipeline=form.file) as client:
            form.check(await answered(client, form.images))
        assert await run.stop() == 0, run.text


def test_votes_of_tiles_are_scored_by_their_share(forms: dict[str, Form]) -> None:
    scores = forms["digits/tiles-vote.yaml"].whole.softmax(1)
    assert set(scores.flatten().tolist()) == {0.0, 0.5, 1.0}


def test_an_exit_of_these_tests_lets_some_leave_and_some_stay(forms: dict[str, Form]) -> None:
    """Else the forms above would try one of two roads."""
    every, none = forms["an exit"].whole, forms["all edges local"].whole
    left = (every != none).any(1)
    assert 0.2 < float(left.float().mean()) < 0.8
