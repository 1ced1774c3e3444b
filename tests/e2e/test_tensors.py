"""Models that take no image: several tensors by name, and several outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from streaminfer import LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.errors import ConfigError, WireError
from streaminfer.planning.cuts import list_cuts
from streaminfer.planning.factory import make_model
from streaminfer.planning.verify import verify
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load

MODEL = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(100, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, input_ids, weights=None, *, attention_mask):
        x = torch.tanh(self.mix(self.words(input_ids)))
        if weights is not None:
            x = x * weights.unsqueeze(-1)
        x = (x * attention_mask.unsqueeze(-1)).sum(1)
        return {"logits": self.head(x), "pooled": x}

class Renamed(Tagger):
    def forward(self, input_ids, attention_mask):
        found = super().forward(input_ids, attention_mask=attention_mask)
        return {"first": found["logits"], "pooled": found["pooled"]}
"""
EXAMPLE: dict[str, Any] = {
    # not in the order of the forward's arguments
    "attention_mask": {"shape": [6], "dtype": "int64", "max": 2},
    "input_ids": {"shape": [6], "dtype": "int64", "max": 100},
}


def declare(folder: Path, **changes: Any) -> PipelineSpec:
    (folder / "tagger.py").write_text(MODEL)
    file = folder / "pipeline.yaml"
    document = {
        "pipeline": "tagger",
        "model": {"factory": "tagger.py:Tagger", "example": EXAMPLE},
        "input": {"decode": "tensor"},
        "stages": [{"name": "words", "until": "words"}, {"name": "rest"}],
        "output": {"top_k": 2},
        **changes,
    }
    file.write_text(yaml.safe_dump(document))
    return load(file)


def sentences(n: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    dice = np.random.default_rng(0)
    return [
        {"input_ids": dice.integers(0, 100, 6), "attention_mask": dice.integers(0, 2, 6)}
        for _ in range(n)
    ]


def uncut(spec: PipelineSpec, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    assert spec.path
    model = make_model(spec.first_model, spec.path.parent)
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    found = model(**batch)
    assert isinstance(found, dict)
    return found


async def test_tensors_by_name_are_answered_like_the_whole_model(tmp_path: Path) -> None:
    spec = declare(tmp_path)
    where, plan = plan_of(spec, tmp_path / "plan", False)
    assert {port.name for port in plan.stages[0].inputs} == set(EXAMPLE)
    rows = sentences(20)
    logits = uncut(spec, rows)["logits"]
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        answers = [a async for a in client.stream((f"{k}", row) for k, row in enumerate(rows))]
        torches = {name: torch.from_numpy(value) for name, value in rows[7].items()}
        again = await client.predict(torches)
    assert [a.id for a in answers] == [str(k) for k in range(20)]
    assert [a.top1.index for a in answers] == logits.argmax(1).tolist()
    assert again.top1.index == answers[7].top1.index
    assert len(again.predictions) == 2


async def test_raw_outputs_have_the_names_that_the_model_gives_them(tmp_path: Path) -> None:
    spec = declare(tmp_path, output={"top_k": 0})
    where, plan = plan_of(spec, tmp_path / "plan", False)
    (row,) = sentences(1)
    whole = uncut(spec, [row])
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        answer = await client.predict(row)
    assert set(answer.outputs) == {"logits", "pooled"}
    for name, value in whole.items():
        assert answer.outputs[name] == value[0].tolist()


async def test_what_is_wrong_with_tensors_is_their_own_outcome(tmp_path: Path) -> None:
    spec = declare(tmp_path)
    where, plan = plan_of(spec, tmp_path / "plan", False)
    (good,) = sentences(1)
    bad = {
        "tensors.attention_mask: is missing": {"input_ids": good["input_ids"]},
        "tensors.input_id: the model has no such input; did you mean input_ids?": {
            "input_id": good["input_ids"]
        },
        "tensor has dtype F32; input_ids takes I64": {
            **good,
            "input_ids": np.zeros(6, np.float32),
        },
        "tensor has shape (7,); attention_mask takes (6,)": {
            **good,
            "attention_mask": np.zeros(7, np.int64),
        },
        "one tensor, but the model takes": good["input_ids"],
        "this pipeline takes tensors": b"\xff\xd8\xff a photo",
    }
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        for says, value in bad.items():
            answer = await client.predict(value)
            assert answer.status == "error"
            assert answer.error is not None
            assert answer.error.kind == "schema"
            assert says in answer.error.message
        with pytest.raises(WireError, match="complex64"):
            await client.predict(np.zeros(3, np.complex64))
        assert (await client.predict(good)).status == "ok"


def test_a_model_of_several_inputs_is_verified_and_its_cuts_are_listed(tmp_path: Path) -> None:
    spec = declare(tmp_path)
    where, _ = plan_of(spec, tmp_path / "plan", False)
    report = verify(spec, where)
    assert report.holds
    assert report.equal
    assert "words" in [row.layer for row in list_cuts(spec.first_model, spec.path)]


async def test_tensors_by_position_have_the_names_of_the_arguments(tmp_path: Path) -> None:
    example = [EXAMPLE["input_ids"], EXAMPLE["attention_mask"]]
    model = {"factory": "tagger.py:Renamed", "example": example}
    spec = declare(tmp_path, model=model, output={"top_k": 2, "logits": "first"})
    where, plan = plan_of(spec, tmp_path / "plan", False)
    assert [port.name for port in plan.stages[0].inputs] == ["input_ids", "attention_mask"]
    assert verify(spec, where).equal
    rows = sentences(5)
    logits = uncut(spec, rows)["first"]
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        answers = [a async for a in client.stream(rows)]
    assert [a.top1.index for a in answers] == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (
            {"top_k": 2},
            ["output.top_k", "first [None, 5], pooled [None, 8]", "output.logits: first"],
        ),
        ({"top_k": 2, "logits": "frist"}, ["output.logits", "'frist'", "did you mean first?"]),
    ],
)
def test_an_output_to_rank_that_is_not_clear_is_asked_for(
    tmp_path: Path, output: dict[str, Any], says: list[str]
) -> None:
    model = {"factory": "tagger.py:Renamed", "example": EXAMPLE}
    spec = declare(tmp_path, model=model, output=output)
    with pytest.raises(ConfigError) as caught:
        plan_of(spec, tmp_path / "plan", False)
    for words in says:
        assert words in str(caught.value)
