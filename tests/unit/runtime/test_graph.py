"""Stages in one worker: what a user loses when one of them fails while the others are at work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from streaminfer.plan import Source, StagePlan, TensorSpec
from streaminfer.runtime.graph import Graph
from streaminfer.runtime.steps import Item, Plain, Result, Step
from streaminfer.transport import Position
from streaminfer.wire import Envelope, Failure, Sample, Tensor


def stage(name: str, *sources: str, gather: str = "") -> StagePlan:
    return StagePlan(
        name=name,
        path=name,
        inputs=tuple(TensorSpec(name=s, dtype="F32", shape=(None, 1)) for s in sources or ("x",)),
        outputs=(TensorSpec(name=name, dtype="F32", shape=(None, 1)),),
        sources=tuple(Source(stage=s, tensors=(s,)) for s in sources),
        gather=gather,
    )


FAN = [
    stage("stem"),
    stage("t.0", "stem", gather="t.gather"),
    stage("t.1", "stem", gather="t.gather"),
    stage("t.gather", "t.0", "t.1"),
    stage("head", "t.gather"),
]


class Give(Plain):
    """Gives its one tensor; `before` may wait or raise, `bad` are rows that fail."""

    def __init__(
        self,
        name: str,
        before: Callable[[], Awaitable[None]] | None = None,
        bad: Sequence[int] = (),
    ) -> None:
        self.name, self.before, self.bad, self.began = name, before, bad, 0

    async def __call__(self, items: Sequence[Item]) -> Result:
        self.began += 1
        if self.before is not None:
            await self.before()
        outputs, outcomes = [], []
        for item in items:
            assert item.envelope is not None
            failure = Failure("error", self.name, "compute", "bad")
            gone = {s.offset: failure for s in item.envelope.samples if s.offset in self.bad}
            kept = [s for s in item.envelope.samples if s.offset not in gone]
            if gone:
                outcomes.append(item.envelope.outcomes(gone))
            if kept:
                outputs.append(envelope([s.offset for s in kept], self.name))
        return Result(tuple(outputs), tuple(outcomes))


def envelope(offsets: Sequence[int], name: str) -> Envelope:
    samples = tuple(Sample(o, o, f"{o}", None, 0) for o in offsets)
    tensor = Tensor("F32", (len(offsets), 1), memoryview(bytes(4 * len(offsets))))
    return Envelope(0, samples, "d" * 64, "i", {name: tensor})


def item() -> Item:
    return Item((Position("in", 0, 0),), envelope([1, 2, 3], "x"))


def graph(**made: Give) -> Graph:
    steps: dict[str, Step] = {s.name: made.get(s.name.replace(".", ""), Give(s.name)) for s in FAN}
    return Graph(FAN, steps, {})


async def test_what_raises_ends_the_call_and_leaves_nothing_running() -> None:
    """A stage that goes on alone would answer for a worker that was given up."""
    cancelled = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            cancelled.set()
            raise

    async def fail() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("the device is gone")

    head = Give("head")
    before = asyncio.all_tasks()
    with pytest.raises(RuntimeError, match="the device is gone"):
        await graph(t0=Give("t.0", forever), t1=Give("t.1", fail), head=head)([item()])
    assert cancelled.is_set()
    assert asyncio.all_tasks() == before
    assert head.began == 0


async def test_a_cancelled_call_takes_all_its_stages_with_it() -> None:
    started = asyncio.Event()

    async def forever() -> None:
        started.set()
        await asyncio.Event().wait()

    before = asyncio.all_tasks()
    call = asyncio.create_task(graph(t0=Give("t.0", forever))([item()]))
    await started.wait()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert asyncio.all_tasks() == before


async def test_parts_run_side_by_side() -> None:
    """One behind the other, a split on two devices would be no faster than one."""
    both = asyncio.Barrier(2)

    async def meet() -> None:
        async with asyncio.timeout(30):
            await both.wait()

    result = await graph(t0=Give("t.0", meet), t1=Give("t.1", meet))([item()])
    assert len(result.outputs) == 1


async def test_rows_that_fail_in_two_parts_fail_once_and_the_rest_goes_on() -> None:
    result = await graph(t0=Give("t.0", bad=[1, 2]), t1=Give("t.1", bad=[2]))([item()])
    failed = [(s.offset, s.failure and s.failure.stage) for e in result.outcomes for s in e.samples]
    assert sorted(failed) == [(1, "t.0"), (2, "t.0")]
    assert [s.offset for e in result.outputs for s in e.samples] == [3]
    assert [s.position.offset for s in result.settled] == [0]


async def test_when_all_rows_fail_nothing_behind_them_is_run() -> None:
    head = Give("head")
    result = await graph(t1=Give("t.1", bad=[1, 2, 3]), head=head)([item()])
    assert [s.offset for e in result.outcomes for s in e.samples] == [1, 2, 3]
    assert not result.outputs
    assert head.began == 0
    assert len(result.settled) == 1
