"""Images of many sizes mixed in one partition: each its own answer, in order, errors among them."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from streaminfer import Client, LocalPipeline, Prediction
from streaminfer.cli import app
from streaminfer.commands import plan_of
from streaminfer.planning.factory import make_model
from streaminfer.planning.verify import verify
from streaminfer.runtime.postprocess import batch_of
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from tests.e2e.conftest import streaminfer
from tests.e2e.test_replicas import published
from tests.e2e.test_tensors import EXAMPLE, uncut
from tests.e2e.test_tensors import declare as tagger

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Map(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.trunk = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.trunk(torch.relu(self.stem(x)))
        y = F.interpolate(self.head(torch.relu(y)), size=x.shape[-2:], mode="bilinear")
        return {"map": y, "mean": y.mean((2, 3))}
"""
SIZES = ((8, 8), (9, 16), (24, 24), (16, 9), (11, 23), (23, 11), (12, 16))  # height, width
OUTSIDE = ((7, 12), (30, 10), (8, 25))
ROUNDED = 1e-5  # kernels sum in other orders at other batch sizes


def declare(folder: Path, **changes: Any) -> PipelineSpec:
    (folder / "map.py").write_text(MODEL)
    name = f"map-{uuid4().hex[:8]}"
    document = {
        "pipeline": name,
        "model": {"factory": "map.py:Map", "example": [3, "8..24", "8..24"]},
        "input": {"topic": f"{name}.images", "mean": [0.5] * 3, "std": [0.25] * 3},
        "batch": {"max": 8, "wait": "2ms"},
        "stages": [
            {"name": "stem", "until": "stem"},
            {"name": "trunk", "until": "trunk"},
            {"name": "head"},
        ],
        "output": {"topic": f"{name}.maps", "top_k": 0},
        "kafka": {"partitions": 1, "session_timeout": "6s"},
        "metrics": {"port": 0},
        **changes,
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(document))
    return load(file, environ={})


def picture(k: int, height: int, width: int) -> bytes:
    pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def whole(spec: PipelineSpec) -> nn.Module:
    assert spec.path
    return make_model(spec.first_model, spec.path.parent).eval()


def check(answer: Prediction, value: bytes, spec: PipelineSpec, model: nn.Module) -> None:
    with torch.inference_mode():
        expected = model(batch_of([value], spec.input))
    assert answer.status == "ok", answer.error
    for name, tensor in expected.items():
        found = torch.tensor(answer.outputs[name])
        assert found.shape == tensor[0].shape, f"{answer.id}: {name}"
        assert torch.allclose(found, tensor[0], rtol=0, atol=ROUNDED), f"{answer.id}: {name}"


def shuffled(count: int) -> list[tuple[str, tuple[int, int], bytes]]:
    dice = np.random.default_rng(1)
    pool = [*SIZES, *SIZES, *OUTSIDE]
    sizes = [*SIZES, *OUTSIDE, *(pool[i] for i in dice.integers(0, len(pool), count))]
    dice.shuffle(sizes)
    return [(f"{k}", (h, w), picture(k, h, w)) for k, (h, w) in enumerate(sizes)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bus", ["memory", pytest.param("kafka", marks=pytest.mark.kafka)])
async def test_sizes_mixed_in_one_partition_are_answered_each_and_in_order(
    bus: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    spec = declare(tmp_path)
    where, plan = plan_of(spec, tmp_path / "plan", False)
    images, model = shuffled(80), whole(spec)
    named = [(name, value) for name, _, value in images]
    if bus == "memory":
        async with LocalPipeline(spec, plan, where) as local, local.client() as client:
            answers = [a async for a in client.stream(iter(named), timeout=60)]
            order = await published(client.transport, spec.output.topic, len(images))
    else:
        address = request.getfixturevalue("kafka_address")
        command = ("run", str(spec.path), "--kafka", address, "--plan", str(where))
        async with streaminfer(*command, cwd=tmp_path) as run:  # a process for each worker
            await run.line("ready")
            async with Client(address, pipeline=tmp_path / "pipeline.yaml") as client:
                answers = [a async for a in client.stream(iter(named), timeout=60)]
                order = await published(client.transport, spec.output.topic, len(images))
            assert await run.stop() == 0, run.text
    assert order == {0: list(range(len(images)))}, "in order, one outcome each"
    assert [a.id for a in answers] == [name for name, _ in named]
    for answer, (_, size, value) in zip(answers, images, strict=True):
        if size in OUTSIDE:
            height, width = size
            assert answer.status == "error"
            assert f"the image is {width}x{height}" in str(answer.error)
            assert "must be in 8..24" in str(answer.error)
        else:
            check(answer, value, spec, model)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(sizes=st.lists(st.tuples(st.integers(6, 26), st.integers(6, 26)), min_size=1, max_size=24))
def test_any_sizes_in_any_order(
    sizes: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec, plan, where, model = _built(tmp_path_factory)
    images = [(f"{k}", picture(k, *size)) for k, size in enumerate(sizes)]

    async def run() -> tuple[list[Prediction], dict[int, list[int]]]:
        async with LocalPipeline(spec, plan, where) as local, local.client() as client:
            answers = [a async for a in client.stream(iter(images), timeout=60)]
            return answers, await published(client.transport, spec.output.topic, len(images))

    answers, order = asyncio.run(run())
    assert order == {0: list(range(len(images)))}
    for answer, (name, value), size in zip(answers, images, sizes, strict=True):
        assert answer.id == name
        if all(8 <= side <= 24 for side in size):
            check(answer, value, spec, model)
        else:
            assert answer.status == "error"


_BUILT: list[Any] = []


def _built(factory: pytest.TempPathFactory) -> Any:
    if not _BUILT:
        folder = factory.mktemp("any-sizes")
        spec = declare(folder)
        where, plan = plan_of(spec, folder / "plan", False)
        _BUILT.append((spec, plan, where, whole(spec)))
    return _BUILT[0]


async def test_sequences_of_many_lengths_are_answered_like_the_whole_model(tmp_path: Path) -> None:
    example = {name: {**one, "shape": ["2..9"]} for name, one in EXAMPLE.items()}
    spec = tagger(tmp_path, model={"factory": "tagger.py:Tagger", "example": example})
    where, plan = plan_of(spec, tmp_path / "plan", False)
    dice = np.random.default_rng(0)

    def row(words: int, marks: int) -> dict[str, Any]:
        ids, mask = dice.integers(0, 100, words), dice.integers(0, 2, marks)
        return {"input_ids": ids, "attention_mask": mask}

    lengths = [2, 9, 5, 5, 3, 9, 8, 2] * 2
    rows = [row(n, n) for n in lengths]
    bad = {"too long": row(10, 10), "unlike": row(4, 5)}
    sent = [*((f"{k}", one) for k, one in enumerate(rows)), *bad.items()]
    async with LocalPipeline(spec, plan, where) as local, local.client() as client:
        answers = [a async for a in client.stream(iter(sent), timeout=60)]
    for answer, one in zip(answers, rows, strict=False):
        assert answer.status == "ok", answer.error
        assert answer.top1.index == int(uncut(spec, [one])["logits"].argmax())
    texts = [str(a.error) for a in answers[len(rows) :]]
    assert "takes (2..9,)" in texts[0]
    assert "the model takes equal sizes there" in texts[1]


def test_verify_says_at_which_sizes(tmp_path: Path) -> None:
    spec = declare(tmp_path)
    where, _ = plan_of(spec, tmp_path / "plan", False)
    report = verify(spec, where)
    assert report.holds
    assert report.equal, "bit for bit"
    assert {(3, 8, 8), (3, 24, 24)} < set(report.sizes)
    assert any(height % 2 for _, height, _ in report.sizes)
    assert any(height != width for _, height, width in report.sizes)
    batches = [batch_of([picture(0, *size)], spec.input) for size in SIZES[:3]]
    real = verify(spec, where, images=batches, batch_sizes=(1,))
    assert real.holds
    assert real.sizes == tuple((3, *size) for size in SIZES[:3])


def test_the_commands_say_of_which_size_the_bytes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who reads them for a typical image would plan for too much."""
    spec = declare(tmp_path)
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, str(spec.path)])
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    assert "bytes of [3, 24, 24], the largest" in said("cut")
    assert f"{4 * 8 * 12 * 12:,}" in said("cut"), "of half the side"
    assert "x [3, 8..24, 8..24]: bytes are of the largest" in said("build")
    assert "of [3, 8, 8], [3, 24, 24], [3, 14, 14], [3, 21, 11]" in said("verify")
    assert "samples of [3, 24, 24], the largest" in said("profile", "--devices", "cpu")
