"""Merging must give everyone their own rows back; one bad sample must not take others along."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import torch

from streaminfer.errors import ConfigError
from streaminfer.metrics import Metrics
from streaminfer.parallel import Program
from streaminfer.plan import StagePlan, TensorSpec
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.steps import Item, Result
from streaminfer.spec import BatchSpec
from streaminfer.transport import Position
from streaminfer.wire import Envelope, Failure, Sample, Tensor, compress, decompress

Compute = Callable[[torch.Tensor], torch.Tensor]
X = TensorSpec(name="x", dtype="F32", shape=(None, 2))
Y = TensorSpec(name="y", dtype="F32", shape=(None, 2))


class Fake:
    """Stands for a stage's program: doubles, and keeps the sizes of the batches it was given."""

    def __init__(self, compute: Compute = lambda x: x * 2) -> None:
        self.compute, self.sizes = compute, list[int]()

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not bool(tensors[0].any()):
            return (tensors[0],)  # warming
        self.sizes.append(len(tensors[0]))
        return (self.compute(tensors[0]),)


@asynccontextmanager
async def forward(
    fake: Fake, *, clock: Callable[[], float] = lambda: 1000.0, most: int = 8, **more: Any
) -> AsyncIterator[Forward]:
    inputs = more.pop("inputs", (X,))
    plan = StagePlan(name="s1", path="s1", layers=("l",), inputs=inputs, outputs=(Y,))
    stage = Stage(
        plan=plan,
        load=lambda: cast(Program, fake),
        device=torch.device("cpu"),
        threads=1,
        batch=BatchSpec(max=most, wait=more.pop("wait", 0.02)),
        **more,
    )
    made = Forward(stage, Metrics("p").stage("s1"), clock=clock)
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def item(first: int, values: Sequence[float], **more: Any) -> Item:
    samples = tuple(
        Sample(first + i, first + i, str(first + i), None, 999_000, **more)
        for i in range(len(values))
    )
    data = struct.pack(f"<{2 * len(values)}f", *[v for v in values for _ in range(2)])
    tensor = Tensor("F32", (len(values), 2), memoryview(data))
    envelope = Envelope(0, samples, "d" * 64, "i", {"x": tensor})
    return Item((Position("t", 0, first),), envelope)


def rows(result: Result) -> dict[int, float]:
    found = {}
    for envelope in result.outputs:
        raw = decompress(envelope.tensors["y"]).data
        values = struct.unpack(f"<{len(raw) // 4}f", raw)
        for i, sample in enumerate(envelope.samples):
            found[sample.offset] = values[2 * i]
    return found


async def test_concurrent_calls_merge_and_each_gets_its_own_rows() -> None:
    fake = Fake()
    async with forward(fake) as step:
        results = await asyncio.gather(
            step([item(0, [1, 2, 3])]), step([item(10, [4])]), step([item(20, [5, 6])])
        )
    assert fake.sizes == [6]
    assert [rows(r) for r in results] == [{0: 2, 1: 4, 2: 6}, {10: 8}, {20: 10, 21: 12}]
    assert [h.batch for r in results for e in r.outputs for h in e.hops] == [6, 6, 6]


async def test_no_device_batch_is_larger_than_batch_max() -> None:
    fake = Fake()
    async with forward(fake, most=4) as step:
        await asyncio.gather(*[step([item(10 * k, [1, 1, 1])]) for k in range(1, 6)])
        await step([item(100, [1] * 11)])
    assert max(fake.sizes) <= 4
    assert sum(fake.sizes) == 26


async def test_unlike_shapes_never_share_a_batch() -> None:
    """Rows of another width would have to be padded, and padding changes numbers."""
    fake = Fake(lambda x: x)
    wide = TensorSpec(name="x", dtype="F32", shape=(None, None))
    async with forward(fake, inputs=(wide,)) as step:
        narrow = item(0, [1, 2])
        assert narrow.envelope is not None
        tensor = Tensor("F32", (2, 1), memoryview(struct.pack("<2f", 7, 8)))
        other = Item((), Envelope(0, narrow.envelope.samples, "d" * 64, "i", {"x": tensor}))
        await asyncio.gather(step([narrow]), step([other]))
    assert fake.sizes == [2, 2]


def poison(x: torch.Tensor) -> torch.Tensor:
    if bool((x == 13).any()):
        raise RuntimeError("unlucky")
    return x * 2


async def test_a_poison_sample_stands_alone_and_the_others_go_through() -> None:
    fake = Fake(poison)
    async with forward(fake) as step:
        one, two = await asyncio.gather(step([item(0, [1, 2])]), step([item(10, [3, 13, 4, 5, 6])]))
    assert rows(one) == {0: 2, 1: 4}
    assert rows(two) == {10: 6, 12: 8, 13: 10, 14: 12}
    (outcome,) = two.outcomes
    (bad,) = outcome.samples
    assert bad.offset == 11
    assert bad.failure == Failure("error", "s1", "compute", "RuntimeError: unlucky")
    assert outcome.tensors == {}
    assert {s.position.offset for s in two.settled} == {10}


async def test_a_poisoned_envelope_of_compressed_rows_is_split_too() -> None:
    bad = item(0, [1.0, 13.0] + [2.0] * 6)
    assert bad.envelope is not None
    packed = {"x": compress(bad.envelope.tensors["x"], "zstd")}
    squeezed = Item(bad.positions, Envelope(0, bad.envelope.samples, "d" * 64, "i", packed))
    async with forward(Fake(poison), compress="zstd") as step:
        result = await step([squeezed])
    assert rows(result) == {0: 2} | dict.fromkeys(range(2, 8), 4)


async def test_too_large_for_the_memory_is_halved_and_remembered() -> None:
    def small(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("no room")
        return x * 2

    fake = Fake(small)
    async with forward(fake) as step:
        assert rows(await step([item(0, [1] * 8)])) == dict.fromkeys(range(8), 2.0)
        tried = len(fake.sizes)
        assert rows(await step([item(8, [1] * 8)])) == dict.fromkeys(range(8, 16), 2.0)
    assert max(fake.sizes[tried:]) <= 3, "what did not fit is not tried again"


async def test_a_batch_that_finds_no_room_at_the_start_is_halved_before_anything_comes() -> None:
    class Small(Fake):
        def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if len(tensors[0]) > 3:
                raise torch.OutOfMemoryError("no room")
            return super().__call__(*tensors)

    fake = Small()
    async with forward(fake) as step:
        assert rows(await step([item(0, [1] * 8)])) == dict.fromkeys(range(8), 2.0)
    assert fake.sizes == [2] * 4


async def test_a_device_without_room_for_one_sample_is_named() -> None:
    def none(_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    class No(Fake):
        def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self.compute(*tensors),)

    with pytest.raises(ConfigError, match=r"'s1': cpu has no room[^$]*--memory"):
        async with forward(No(none)):
            pass


async def test_what_is_late_costs_no_compute() -> None:
    fake = Fake()
    async with forward(fake) as step:
        late = await step([item(0, [1, 2], deadline_ms=999_999)])
        fresh = await step([item(5, [1], deadline_ms=1_000_001)])
    assert fake.sizes == [1]
    assert [s.failure.status for e in late.outcomes for s in e.samples if s.failure] == [
        "expired",
        "expired",
    ]
    assert rows(fresh) == {5: 2}


async def test_a_foreign_tensor_is_an_error_of_its_samples() -> None:
    wrong = item(0, [1, 2])
    assert wrong.envelope is not None
    renamed = {"z": wrong.envelope.tensors["x"]}
    foreign = Item(wrong.positions, Envelope(0, wrong.envelope.samples, "d" * 64, "i", renamed))
    async with forward(Fake()) as step:
        result = await step([foreign])
    assert {s.failure.kind for e in result.outcomes for s in e.samples if s.failure} == {"schema"}


@pytest.mark.parametrize(("dtype", "name"), [("float16", "F16"), ("bfloat16", "BF16")])
async def test_an_edge_of_16_bits_carries_half_and_is_read_back(dtype: str, name: str) -> None:
    async with forward(Fake(), out_dtype=dtype) as step:
        (envelope,) = (await step([item(0, [1, 2])])).outputs
    assert (envelope.tensors["y"].dtype, envelope.tensors["y"].data.nbytes) == (name, 8)
    moved = Envelope(0, envelope.samples, "d" * 64, "i", {"x": envelope.tensors["y"]})
    async with forward(Fake()) as step:
        assert rows(await step([Item((), moved)])) == {0: 4, 1: 8}


async def test_an_edge_of_8_bits_carries_scales_and_is_read_back() -> None:
    """Also out of an envelope that is split for its poison sample."""
    wide = TensorSpec(name="x", dtype="F32", shape=(None, 16))
    values = torch.randn(3, 16) * torch.tensor([[1.0], [100.0], [0.01]])
    samples = item(0, [0, 0, 0]).envelope
    assert samples is not None
    data = memoryview(values.numpy().tobytes())
    sent = Envelope(0, samples.samples, "d" * 64, "i", {"x": Tensor("F32", (3, 16), data)})
    fake = Fake(lambda x: x)
    async with forward(fake, out_dtype="int8", compress="zstd", inputs=(wide,)) as step:
        (envelope,) = (await step([Item((), sent)])).outputs
    raw = {name: decompress(tensor) for name, tensor in envelope.tensors.items()}
    assert {n: (t.dtype, t.shape) for n, t in raw.items()} == {
        "y": ("I8", (3, 16)),
        "y@scale": ("F32", (3,)),
    }
    moved = {"x": envelope.tensors["y"], "x@scale": envelope.tensors["y@scale"]}
    kept: list[torch.Tensor] = []

    def loud(x: torch.Tensor) -> torch.Tensor:
        if bool((x.abs() > 50).any()):
            raise RuntimeError("too loud")
        kept.append(x)
        return x

    async with forward(Fake(loud), inputs=(wide,)) as step:
        result = await step([Item((), Envelope(0, envelope.samples, "d" * 64, "i", moved))])
    assert [s.offset for e in result.outcomes for s in e.samples] == [1]
    found = torch.cat(kept)
    assert torch.allclose(found[0], values[0], atol=float(values[0].abs().max()) / 250)
    assert torch.allclose(found[-1], values[2], atol=float(values[2].abs().max()) / 250)


async def test_an_8_bit_tensor_without_its_scales_is_an_error_of_its_samples() -> None:
    one = item(0, [1])
    assert one.envelope is not None
    bare = {"x": Tensor("I8", (1, 2), memoryview(b"\x01\x02"))}
    async with forward(Fake()) as step:
        result = await step([Item((), Envelope(0, one.envelope.samples, "d" * 64, "i", bare))])
    assert {s.failure.kind for e in result.outcomes for s in e.samples if s.failure} == {"schema"}


async def test_a_part_of_a_batch_waits_no_longer_than_it_was_told() -> None:
    async with forward(Fake(), clock=asyncio.get_running_loop().time, wait=0.05) as step:
        began = asyncio.get_running_loop().time()
        await step([item(0, [1])])
        assert asyncio.get_running_loop().time() - began < 2
