"""Images of unlike sizes: equal ones share a device call, and none is padded to another number."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import cast

import torch
from torch import nn

from streaminfer.metrics import Metrics
from streaminfer.parallel import Program
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.runtime.flow import Window
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.ingest import Ingest
from streaminfer.runtime.postprocess import batch_of, normalise
from streaminfer.runtime.rows import view
from streaminfer.runtime.steps import Item, chain
from streaminfer.spec import BatchSpec, InputSpec
from streaminfer.transport import Record, TopicPartition
from tests.corpus import encode, picture

SIZES = ((24, 16), (16, 24), (40, 40))  # height, width
CPU = torch.device("cpu")
INPUT = InputSpec(channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
STAGE = StagePlan(
    name="s0",
    path="s0",
    pixels=True,
    layers=("conv",),
    inputs=(TensorSpec(name="x", dtype="F32", shape=(None, 3, None, None)),),
    outputs=(TensorSpec(name="y", dtype="F32", shape=(None, 5)),),
)
PLAN = Plan(
    pipeline="p", digest="d" * 64, source="", model="toy", model_version="1",
    input=INPUT, stages=(STAGE,), top_k=0,
)  # fmt: skip


class Conv(nn.Module):
    """Takes any size; what is padded comes out as other numbers. Notes the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.batches.append(tuple(x.shape))
        return (self.head(self.conv(x).relu()).mean((2, 3)),)


async def test_equal_sizes_meet_and_nothing_is_padded() -> None:
    torch.manual_seed(0)
    model = Conv().eval()
    dice = random.Random(0)
    sizes = [dice.choice(SIZES) for _ in range(48)]
    images = [
        encode(picture(height, width, seed=k), "PNG") for k, (height, width) in enumerate(sizes)
    ]
    partitions = [TopicPartition("images", p) for p in range(3)]
    window, metrics = Window(100), Metrics("p").stage("s0")
    stage = Stage(
        plan=STAGE, load=lambda: cast(Program, model), device=CPU, threads=1,
        batch=BatchSpec(max=16, wait=0.2), before=normalise(INPUT, CPU),
    )  # fmt: skip
    step = chain(Ingest(PLAN, window, metrics), Forward(stage, metrics))
    for tp in partitions:
        window.assign(tp, 0, 0)
    await step.assign(dict.fromkeys(partitions, ""))
    await step.start()
    try:
        records = [
            Record("images", k % 3, k // 3, 0, b"%d" % k, image) for k, image in enumerate(images)
        ]
        items = [
            Item(tuple(r.position for r in part), records=tuple(part))
            for part in (records[p::3] for p in range(3))
        ]
        results = await asyncio.gather(*[step([item]) for item in items])
    finally:
        await step.stop()
    batches = model.batches
    assert sum(shape[0] for shape in batches) == len(images), "no row was made up"
    counts = Counter(sizes)
    for height, width in SIZES:
        found = [shape[0] for shape in batches if shape[2:] == (height, width)]
        assert sum(found) == counts[height, width]
        assert len(found) <= -(-counts[height, width] // 16) + 1, "equal sizes share calls"
    assert all(not result.outcomes for result in results)
    with torch.inference_mode():
        for envelope in (e for result in results for e in result.outputs):
            for sample, row in zip(envelope.samples, view(envelope.tensors["y"]), strict=True):
                image = images[3 * sample.offset + envelope.partition]
                torch.testing.assert_close(row, model(batch_of([image], INPUT))[0][0])
