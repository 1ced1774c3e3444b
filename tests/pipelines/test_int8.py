"""Edges of 8 bits, through workers: trained digits keep their answers, and fewer bytes travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.digits.images import scans
from streaminfer import LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.planning.example import Inputs
from streaminfer.planning.reference import reference
from streaminfer.runtime.postprocess import batch_of
from streaminfer.spec.file import load
from tests.pipelines.forms import DIGITS, copied

SPLIT = {"split": {"by": "channels", "parts": 2}}
STEM, TRUNK, HEAD = {"name": "stem", "until": "stem"}, {"name": "trunk"}, {"name": "head"}
FORMS: dict[str, Any] = {
    "into a linear stage": [{"name": "body", "until": "late"}, HEAD],
    "into shards and out of them": [STEM, {**TRUNK, "until": "early", **SPLIT}, HEAD],
}
SENT = "streaminfer_stage_sent_bytes_total"


async def run(folder: Path, stages: Any, edge: dict[str, str]) -> tuple[list[int], float]:
    """Return the top-1 of every scan, and the bytes that stages sent."""
    spec = load(copied(DIGITS, folder, {"stages": stages, "edges": {"default": edge}}), environ={})
    where, plan = plan_of(spec, folder / "plan", False)
    images = [(name, value) for name, _, value in scans()]
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:
        answers = [a async for a in client.stream(iter(images), timeout=60)]
        last = plan.stages[-1].name
        sent = sum(
            value
            for name, labels, value in pipeline.metrics.readings()
            if name == SENT and labels["stage"] not in (last, "sink")
        )
    assert [a.id for a in answers] == [name for name, _ in images]
    return [a.top1.index for a in answers], sent


def whole() -> list[int]:
    spec = load(DIGITS, environ={})
    with torch.inference_mode():
        batch = batch_of([value for _, _, value in scans()], spec.input)
        best: list[int] = reference(spec)(Inputs((batch,)))[0].argmax(1).tolist()
    return best


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.timeout(180)
async def test_99_of_100_scans_keep_their_digit_and_the_bytes_fall(
    tmp_path: Path, name: str
) -> None:
    exact = whole()
    for kind in ("int8", "native"):
        (tmp_path / kind).mkdir()
    found, small = await run(tmp_path / "int8", FORMS[name], {"dtype": "int8", "compress": "zstd"})
    agreed = sum(a == b for a, b in zip(exact, found, strict=True))
    assert agreed >= 0.99 * len(exact)
    native, large = await run(tmp_path / "native", FORMS[name], {"dtype": "native"})
    assert native == exact
    assert small < 0.55 * large, "scans are 8x8: headers are half of what travels"
