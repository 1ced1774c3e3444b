"""Pipeline files to be tried: a copy with names of its own, the whole model's answers, a run."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from stages.digits.images import scans
from streaminfer import Client, LocalPipeline, Prediction
from streaminfer.client import connect
from streaminfer.commands import plan_of
from streaminfer.planning import build as build_module
from streaminfer.planning import reference as reference_module
from streaminfer.planning.example import Inputs
from streaminfer.planning.factory import make_model
from streaminfer.planning.reference import reference
from streaminfer.planning.verify import VerifyReport, verify
from streaminfer.runtime.postprocess import batch_of
from streaminfer.spec import ModelSpec
from streaminfer.spec.file import load
from streaminfer.topology import build
from tests.e2e.conftest import ROOT

STAGES = ROOT / "stages"
DIGITS = STAGES / "digits" / "pipeline.yaml"
COUNT = 60
ROUNDED = 1e-5  # of scores and outputs: workers batch as images come, and kernels sum as they batch

Changes = Mapping[str, Any]
AS_IT_IS: Changes = MappingProxyType({})


def copied(file: Path, folder: Path, changes: Changes = AS_IT_IS) -> Path:
    """Copy a pipeline file with what stands beside it; its topics and ports are its own."""
    copy = folder / file.name
    for beside in (*file.parent.glob("*.py"), *file.parent.glob("*.safetensors")):
        shutil.copy(beside, folder)
    raw = yaml.safe_load(file.read_text())
    name = f"{raw['pipeline']}-{uuid4().hex[:8]}"
    raw |= {"pipeline": name, "metrics": {"port": 0}}
    raw["input"]["topic"] = f"{name}.images"
    raw["output"]["topic"] = f"{name}.predictions"
    raw["kafka"] = {"partitions": 3, "session_timeout": "6s"}
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(raw.get(key), dict) and value else value
        if raw[key] is None:
            del raw[key]
    copy.write_text(yaml.safe_dump(raw))
    return copy


class Made:
    """Keeps what is made with random weights, whose norms need many rows of a large image.

    Files that differ in all but the model share one; its weights are those of the first.
    """

    def __init__(self) -> None:
        self._models: dict[str, nn.Module] = {}

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Let builds and references take their models from here."""
        with patch.object(build_module, "make_model", self._make):  # noqa: SIM117 - too long
            with patch.object(reference_module, "make_model", self._make):
                yield

    def _make(self, model: ModelSpec, *given: Any, **more: Any) -> nn.Module:
        key = f"{model.factory} {model.kwargs}"
        if key not in self._models:
            self._models[key] = make_model(model, *given, **more)
        return self._models[key]


@dataclass(frozen=True)
class Form:
    """One pipeline file with its plan, built once for all tests of it."""

    file: Path
    folder: Path
    random_weights: bool = False
    made: Made | None = None  # models that were made before, instead of others as they

    @cached_property
    def planned(self) -> tuple[Any, Any, Any]:
        """Its spec, the plan's folder and the plan."""
        spec = load(self.file, environ={})
        where, plan = plan_of(spec, self.folder / "plan", self.random_weights)
        return spec, where, plan

    @property
    def images(self) -> Sequence[tuple[str, bytes]]:
        found = [(name, value) for name, _, value in scans()[:COUNT]]
        spec, _, _ = self.planned
        if not spec.first_model.varies:
            return found
        return [(name, _resized(value, k)) for k, (name, value) in enumerate(found)]

    @cached_property
    def report(self) -> VerifyReport:
        """What `streaminfer verify` says of it."""
        sizes = (2,) if self.random_weights else (1, 3, 8)
        with self.making():
            spec, where, _ = self.planned
            return verify(spec, where, batch_sizes=sizes)

    def making(self) -> AbstractContextManager[None]:
        """Take models that were made before, where there are any."""
        return self.made.instead() if self.made else nullcontext()

    def check_topology(self) -> None:
        """Raise AssertionError if a worker keeps what a stage elsewhere waits for."""
        spec, _, plan = self.planned
        for worker in build(spec, plan).workers:
            for stage in worker.stages[:-1]:
                takers = {taker.name for taker, _ in plan.consumers(stage)}
                assert takers <= set(worker.stages), f"{stage} does not reach {takers}"

    @property
    def tolerance(self) -> float:
        """What the outputs may differ by: nothing but rounding, where no edge is of 16 bits."""
        return self.report.tolerance + ROUNDED

    @cached_property
    def whole(self) -> Tensor:
        """What the uncut models say of the images: logits or raw outputs."""
        spec, _, plan = self.planned
        with torch.inference_mode():
            whole, ranges = reference(spec), plan.stages[0].inputs[0].ranges
            values = [value for _, value in self.images]
            # one by one if they are of many sizes
            groups = [[value] for value in values] if ranges else [values]
            batches = [batch_of(group, spec.input, ranges) for group in groups]
            return torch.cat([whole(Inputs((batch,)))[0] for batch in batches])

    async def answers(self, kafka: str | None) -> list[Prediction]:
        """Run every worker in this process, on the memory bus or on Kafka."""
        spec, where, plan = self.planned
        if kafka is None:
            pipeline = LocalPipeline(spec, plan, where)
        else:
            spec = load(self.file, {"kafka.bootstrap": kafka}, environ={})
            pipeline = LocalPipeline(spec, plan, where, transport=connect(spec, replication=1))
        async with pipeline, pipeline.client() as client:
            return await answered(client, self.images)

    def check(self, answers: Sequence[Prediction]) -> None:
        """Raise AssertionError unless these are the answers of the uncut models, one each."""
        assert [a.id for a in answers] == [name for name, _ in self.images]
        spec, _, plan = self.planned
        for answer, row in zip(answers, self.whole, strict=True):
            assert answer.status == "ok", answer.error
            assert answer.raw["partial"] is False
            if not plan.top_k:
                (found,) = answer.outputs.values()
                assert torch.allclose(torch.tensor(found), row, rtol=0, atol=self.tolerance)
                continue
            scores = row.softmax(0)
            best = scores.topk(plan.top_k).values.tolist()
            assert len(answer.predictions) == plan.top_k
            for rank, (given, score) in enumerate(zip(answer.predictions, best, strict=True)):
                close = max(abs(given.score - score), abs(float(scores[given.index]) - score))
                assert close <= self.tolerance, f"{answer.id}, rank {rank}: {given}, not {score}"
                assert given.label == spec.output.labels[given.index]


def _resized(value: bytes, k: int) -> bytes:
    """Return a scan in one of many sizes from 8x8 to 16x16."""
    file = io.BytesIO()
    size = (8 + 5 * k % 9, 8 + 7 * k % 9)
    Image.open(io.BytesIO(value)).resize(size, Image.Resampling.BILINEAR).save(file, "PNG")
    return file.getvalue()


async def answered(client: Client, images: Sequence[tuple[str, bytes]]) -> list[Prediction]:
    return [answer async for answer in client.stream(iter(images), timeout=60)]
