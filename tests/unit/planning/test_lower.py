"""What a user loses: knowing what of a declared form cannot be, where, and what works instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streaminfer.errors import ConfigError, StreaminferError
from streaminfer.planning.build import build
from streaminfer.planning.lower import Draft, lower
from streaminfer.spec import ModelSpec, PipelineSpec


class Net(nn.Module):
    """Two convolutions, a block that mixes all places, a head: [N, 1, 8, 8] → [N, classes]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=4, padding=1)
        self.norm = nn.LayerNorm([8, 2, 2])
        self.head = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.relu(self.down(torch.relu(self.conv(x)))))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


class Skip(nn.Module):
    """Two tensors cross the cut behind `first`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + x  # type: ignore[no-any-return]


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((1, 2, 3))[:, None], x.amax((2, 3))


class Image(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


MADE: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "five": lambda: Net(5),
    "skip": Skip,
    "two": Two,
    "image": Image,
    "exit": lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 10)),
    "map": lambda: nn.Conv2d(4, 2, 1),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 10)),
}


def make(model: ModelSpec) -> nn.Module:
    torch.manual_seed(0)
    made = MADE[model.factory.partition(":")[0]]()
    return made.eval().requires_grad_(requires_grad=False)


def of(name: str, *shape: int) -> dict[str, Any]:
    return {"factory": f"{name}:x", "example": list(shape or (1, 8, 8))}


def drafts(*stages: Mapping[str, Any], **more: Any) -> list[Draft]:
    given: dict[str, Any] = {
        "pipeline": "p", "model": of("net"), "input": {"channels": 1}, "stages": list(stages),
    }  # fmt: skip
    return lower(PipelineSpec.model_validate({**given, **more}), make)


def branches(*names: str, **stage: Any) -> dict[str, Any]:
    found = [{"name": f"b{k}", "model": of(name)} for k, name in enumerate(names)]
    return {"name": "all", "branches": found, **stage}


CONV = {"name": "a", "until": "conv"}
DOWN = {"name": "b", "until": "down"}
END = {"name": "z"}
CHANNELS = {"split": {"by": "channels", "parts": 2}}


def tiles(rows: int, columns: int, **more: Any) -> dict[str, Any]:
    return {"split": {"by": "tiles", "grid": [rows, columns], **more}}


WRONG: dict[str, tuple[list[Mapping[str, Any]], dict[str, Any], list[str]]] = {
    "a layer outside the graph": (
        [{"name": "a", "until": "cnov"}, END], {}, ["'cnov'", "conv"],
    ),
    "a layer that ends the model": (
        [{"name": "a", "until": "head"}, END], {}, ["'head'", "no stage would follow", "norm"],
    ),
    "layers out of order": (
        [{"name": "a", "until": "down"}, {"name": "b", "until": "conv"}, END], {},
        ["'conv'", "'down'", "order of the model"],
    ),
    "a grid finer than the map": (
        [CONV, {**DOWN, **tiles(4, 4)}, END], {},
        ["stages.b.split", "4x4", "finer", "'down'", "finest grid that works is 2x2"],
    ),
    "tiles of what mixes all places": (
        [CONV, {"name": "b", "until": "norm", **tiles(2, 2)}, END], {}, ["norm", "down"],
    ),
    "tiles of what has no map": (
        [{"name": "a", "until": "norm"}, {**END, **tiles(2, 1)}], {},
        ["aten.flatten", "split it in another way"],
    ),
    "channels that are normalised over": (
        [{"name": "a", "until": "down"}, {"name": "b", "until": "norm", **CHANNELS}, END], {},
        ["stages.b.split: the stage of norm cannot be split by channels"],
    ),
    "more parts than channels": (
        [{**CONV, "split": {"by": "channels", "parts": 5}}, END], {}, ["5", "4"],
    ),
    "approximate tiles of a part of the model": (
        [{**CONV, **tiles(2, 2, reduce="mean")}, END], {},
        ["stage 'a'", "whole model", "reduce: exact"],
    ),
    "a model that does not run on tiles": (
        [{"name": "all", **tiles(2, 2, reduce="vote")}], {}, ["4x4", "coarser grid"],
    ),
    "tiles finer than the image": (
        [{"name": "all", **tiles(16, 2, reduce="mean")}], {}, ["16x2", "8x8"],
    ),
    "votes on what has no classes": (
        [{"name": "all", **tiles(2, 2, reduce="vote")}],
        {"model": of("image"), "output": {"top_k": 0}}, ["vote on [samples, classes]", "mean"],
    ),
    "branches of unlike outputs": (
        [branches("net", "five")], {"model": None},
        ["stages.all.branches", "'b1' gives F32 [5]", "'b0' gives F32 [10]", "same shape"],
    ),
    "a branch of two outputs": (
        [branches("net", "two")], {"model": None}, ["'b1'", "one output each"],
    ),
    "a first branch of two outputs": (
        [branches("two", "net")], {"model": None}, ["'b0'", "one output each"],
    ),
    "branches of unlike inputs": (
        [{"name": "all", "branches": [
            {"name": "b0", "model": of("net")}, {"name": "b1", "model": of("linear", 1, 4, 4)}]}],
        {"model": None}, ["stages.all.b1.model.example", "[1, 4, 4]", "[1, 8, 8]", "same input"],
    ),
    "a layer outside a branch": (
        [{"name": "all", "branches": [
            {"name": "b0", "model": of("net"),
             "stages": [{"name": "x", "until": "hed"}, {"name": "y"}]},
            {"name": "b1", "model": of("net")}]}],
        {"model": None}, ["'hed'", "head"],
    ),
    "an exit where two tensors cross": (
        [{"name": "a", "until": "first", "exit": {"factory": "linear:x"}}, END],
        {"model": of("skip", 6), "input": {"decode": "tensor"}},
        ["stages.a.exit", "2 tensors", "streaminfer cut"],
    ),
    "an exit that gives a map": (
        [{**CONV, "exit": {"factory": "map:x"}}, END], {},
        ["stages.a.exit", "[batch, classes]", "[None, 2, 8, 8]"],
    ),
    "an exit in a branch": (
        [{"name": "all", "branches": [
            {"name": "b0", "model": of("net"),
             "stages": [{**CONV, "exit": {"factory": "exit:x"}}, END]},
            {"name": "b1", "model": of("net")}]}],
        {"model": None}, ["exit", "branch has no exit"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_form_that_cannot_be_is_refused_with_place_and_remedy(name: str) -> None:
    stages, more, words = WRONG[name]
    with pytest.raises(StreaminferError) as caught:
        drafts(*stages, **more)
    text = str(caught.value)
    for word in words:
        assert word in text, text


MODEL = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))

def head(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, classes))
"""


def test_an_exit_answers_with_the_models_classes(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)

    def declared(classes: int) -> PipelineSpec:
        head = {"factory": "model.py:head", "kwargs": {"classes": classes}}
        given = {
            "pipeline": "p", "input": {"channels": 1},
            "model": {"factory": "model.py:net", "example": [1, 8, 8]},
            "stages": [{"name": "a", "until": "0", "exit": head}, END],
        }  # fmt: skip
        return PipelineSpec.model_validate(given).at(tmp_path / "pipeline.yaml")

    with pytest.raises(ConfigError, match="has 7 classes, the model 10") as caught:
        build(declared(7), tmp_path / "plan")
    assert caught.value.where == "stages.a.exit"
    assert "the model's classes" in caught.value.hint
    build(declared(10), tmp_path / "plan")


def test_a_split_stage_is_its_parts_and_their_gather() -> None:
    made = drafts(CONV, {**DOWN, **CHANNELS}, END)
    assert [(c.name, c.kind) for c in made] == [
        ("a", "stage"), ("b.0", "part"), ("b.1", "part"), ("b.gather", "gather"), ("z", "stage"),
    ]  # fmt: skip
    gather = made[3]
    assert [s.stage for s in gather.sources] == ["b.0", "b.1"]
    assert {c.gather for c in made[1:3]} == {"b.gather"}


def test_the_first_stage_split_is_given_the_image_by_a_scatter() -> None:
    made = drafts({**CONV, **tiles(2, 2)}, END)
    assert [c.kind for c in made] == ["scatter", *["part"] * 4, "gather", "stage"]
    assert [c.name for c in made if c.pixels] == ["a.0", "a.1", "a.2", "a.3"]
