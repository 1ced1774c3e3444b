"""Every way of joining the same stages gives the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.digits.demo import uncut
from stages.digits.images import scans
from streaminfer import LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.spec.file import load
from tests.e2e.conftest import digits_file

FORMS = {
    "all edges local": {"edges": {"default": {"transport": "local"}}},
    "one edge local": {"edges": {"head": {"transport": "local"}}},
    "float16, zstd": {"edges": {"default": {"dtype": "float16", "compress": "zstd"}}},
    "int8, zstd": {"edges": {"default": {"dtype": "int8", "compress": "zstd"}}},
    "bfloat16, lz4": {"edges": {"default": {"dtype": "bfloat16", "compress": "lz4"}}},
    "a stage twice": {
        "stages": [
            {"name": "stem", "until": "stem"},
            {"name": "trunk", "until": "early", "replicas": 2},
            {"name": "head"},
        ]
    },
    "one stage": {"stages": [{"name": "whole"}]},
    "raw outputs": {"output": {"top_k": 0, "labels": None}},
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
async def test_the_answers_are_those_of_the_whole_model(
    folder: Path, changes: dict[str, object]
) -> None:
    spec = load(digits_file(folder, **changes))
    where, plan = plan_of(spec, folder / "plan", False)
    images = scans()[:300]
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        answers = [a async for a in client.stream((name, value) for name, _, value in images)]
    assert [a.id for a in answers] == [name for name, _, _ in images]
    whole = uncut([value for _, _, value in images])
    for answer, row in zip(answers, whole, strict=True):
        assert answer.status == "ok"
        if plan.top_k:
            assert answer.top1.index == int(row.argmax())
        else:
            (logits,) = answer.outputs.values()
            assert max(range(10), key=logits.__getitem__) == int(row.argmax())
