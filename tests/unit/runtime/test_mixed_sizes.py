"""Images of unlike sizes: equal ones share a device call, and none is padded to another number."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from streaminfer.metrics import Metrics
from streaminfer.parallel import Program
from streaminfer.plan import Plan, StagePlan, TensorSpec
from streaminfer.ranges import Range
from streaminfer.runtime.flow import Window
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.ingest import Ingest
from streaminfer.runtime.postprocess import batch_of, normalise
from streaminfer.runtime.rows import view
from streaminfer.runtime.steps import Item, Result, chain
from streaminfer.spec import BatchSpec, InputSpec
from streaminfer.transport import Record, TopicPartition
from streaminfer.wire import (
    TENSOR_INPUT,
    Envelope,
    Sample,
    Tensor,
    TensorInput,
    encode_tensor_input,
)
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


# ---- a range of sizes ----------------------------------------------------------------------------

RANGED = TensorSpec(
    name="x", dtype="F32", shape=(None, 3, None, None), ranges=(None, Range(8, 32), Range(8, 32, 8))
)


def ranged(*inputs: TensorSpec, **source: Any) -> Plan:
    stage = STAGE.model_copy(update={"inputs": inputs or (RANGED,)})
    return PLAN.model_copy(update={"stages": (stage,), "input": InputSpec(**source)})


async def ingested(plan: Plan, records: Sequence[Record]) -> Result:
    window, metrics = Window(100), Metrics("p").stage("s0")
    step = Ingest(plan, window, metrics)
    tp = records[0].tp
    window.assign(tp, 0, 0)
    await step.assign({tp: ""})
    try:
        return await step([Item(tuple(r.position for r in records), records=tuple(records))])
    finally:
        await step.stop()


def records_of(values: Sequence[bytes], kind: bytes = b"") -> list[Record]:
    headers = (("content-type", kind),) if kind else ()
    return [Record("images", 0, k, 0, b"%d" % k, v, headers) for k, v in enumerate(values)]


async def test_an_image_keeps_its_size_or_gets_the_nearest_of_the_steps() -> None:
    sizes = ((8, 8), (13, 12), (32, 35), (31, 21), (32, 36), (7, 16), (13, 11))  # height, width
    images = [encode(picture(h, w, seed=k), "PNG") for k, (h, w) in enumerate(sizes)]
    result = await ingested(ranged(), records_of(images))
    found = {
        sample.offset: envelope.tensors["x"].shape[2:]
        for envelope in result.outputs
        for sample in envelope.samples
    }
    assert found == {0: (8, 8), 1: (13, 16), 2: (32, 32), 3: (31, 24), 6: (13, 8)}
    (outcome,) = result.outcomes
    failures = {s.offset: s.failure.message for s in outcome.samples if s.failure}
    assert failures.keys() == {4, 5}
    assert "the image is 36x32; its width must be in 8..32/8" in failures[4]
    assert "the image is 16x7; its height must be in 8..32" in failures[5]
    parts = {e.part for e in (*result.outputs, *result.outcomes)}
    assert parts == {(k, 6) for k in range(6)}, "each size is a part of the micro-batch"


async def test_resize_is_one_step_with_the_rounding() -> None:
    """Scaled twice, an image would lose twice."""
    image = picture(40, 60, seed=3)
    result = await ingested(ranged(resize=20), records_of([encode(image, "PNG")]))
    (envelope,) = result.outputs
    assert envelope.tensors["x"].shape == (1, 3, 20, 32)
    wanted = np.asarray(image.resize((32, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert bytes(envelope.tensors["x"].data) == wanted.tobytes()


async def test_tensors_are_taken_as_they_are_or_not_at_all() -> None:
    length = Range(2, 6, name="n")
    ids, mask = (
        TensorSpec(name=name, dtype="F32", shape=(None, None), ranges=(length,))
        for name in ("ids", "mask")
    )

    def message(first: int, second: int) -> bytes:
        tensors = {
            name: Tensor("F32", (n,), memoryview(bytes(4 * n)))
            for name, n in (("ids", first), ("mask", second))
        }
        return encode_tensor_input(TensorInput(tensors=tensors))

    sizes = ((2, 2), (6, 6), (7, 7), (3, 4), (2, 2))
    values = [message(*pair) for pair in sizes]
    result = await ingested(
        ranged(ids, mask, decode="tensor"), records_of(values, TENSOR_INPUT.encode())
    )
    assert [[s.offset for s in e.samples] for e in result.outputs] == [[0, 4], [1]]
    texts = [s.failure.message for s in result.outcomes[0].samples if s.failure]
    assert texts[0] == "tensor has shape (7,); ids takes (2..6,)"
    assert texts[1].startswith("dimension 0 of mask is 4, but dimension 0 of ids is 3")


async def test_a_worker_warms_up_with_the_smallest_and_the_largest() -> None:
    """Else the first small image of a day waits for kernels to be chosen."""
    model = Conv().eval()
    plan = STAGE.model_copy(update={"inputs": (RANGED,)})
    stage = Stage(
        plan=plan, load=lambda: cast(Program, model), device=CPU, threads=1,
        batch=BatchSpec(max=4, wait=0.0),
    )  # fmt: skip
    step = Forward(stage, Metrics("p").stage("s0"), timed=True)
    await step.start()
    await step.stop()
    assert model.batches[:3] == [(1, 3, 8, 8), (1, 3, 32, 32), (4, 3, 32, 32)]
    assert step.speed is not None


def test_a_plan_counts_the_largest_and_says_nothing_of_ranges_without_one() -> None:
    """A plan of one size keeps its digest; the window must fit the largest image."""
    assert RANGED.row_bytes() == 4 * 3 * 32 * 32
    assert RANGED.row_bytes("int8") == 3 * 32 * 32 + 3 * 4
    fixed = TensorSpec(name="x", dtype="F32", shape=(None, 3, 8, 8))
    assert fixed.model_dump_json() == '{"name":"x","dtype":"F32","shape":[null,3,8,8]}'
    plan = ranged()
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


class Held(Conv):
    """Computes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if bool(x.any()):
            assert self.gate.wait(30)
        return super().forward(x)


def sized(first: int, count: int, side: int) -> Item:
    samples = tuple(Sample(k, k, str(k), None, 0) for k in range(first, first + count))
    data = memoryview(np.ones((count, 3, side, side), np.float32).tobytes())
    tensors = {"x": Tensor("F32", (count, 3, side, side), data)}
    return Item((), Envelope(0, samples, "d" * 64, "i", tensors))


@pytest.mark.parametrize(("patience", "second"), [(60.0, 16), (0.0, 24)])
async def test_full_batches_go_by_a_part_for_a_while_only(
    monkeypatch: pytest.MonkeyPatch, patience: float, second: int
) -> None:
    """A rare size must not cost the frequent ones their batches, nor wait for ever behind them."""
    monkeypatch.setattr("streaminfer.runtime.forward.PATIENCE", patience)
    model = Held().eval()
    stage = Stage(
        plan=STAGE, load=lambda: cast(Program, model), device=CPU, threads=1,
        batch=BatchSpec(max=4, wait=0.0),
    )  # fmt: skip
    step = Forward(stage, Metrics("p").stage("s0"))
    await step.start()
    try:
        calls = []
        # the first is on the device; then a part and two full ones, and one of them is handed over
        for given in (sized(0, 4, 8), sized(10, 1, 24), sized(20, 4, 16), sized(30, 4, 16)):
            calls.append(asyncio.create_task(step([given])))
            await asyncio.sleep(0.05)
        model.gate.set()
        await asyncio.gather(*calls)
    finally:
        model.gate.set()
        await step.stop()
    order = [shape[2] for shape in model.batches]
    assert order[:2] == [8, second]
    assert sorted(order) == [8, 16, 16, 24]
