"""Whole pipelines of fans with made-up numbers: any shape, any order of events, workers that die.

Each stage's number of a row is a hash of the numbers that it was given, so a row that was joined
with a neighbour's, cut wrongly or fed to the wrong stage comes out as another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.metrics import Metrics
from streaminfer.plan import Plan, StagePlan
from streaminfer.runtime.gather import Gather, Patience
from streaminfer.runtime.graph import Graph
from streaminfer.runtime.outbox import Outbox
from streaminfer.runtime.receive import Envelopes
from streaminfer.runtime.steps import Item, Plain, Result, Settled, Step, chain
from streaminfer.runtime.tracker import Tracker
from streaminfer.spec import PipelineSpec
from streaminfer.topology import WorkerSpec, build
from streaminfer.transport import Commit, Outgoing, Record, TopicPartition
from streaminfer.wire import Envelope, Failure, Hop, Sample, Tensor, decompress, records
from tests.plans import pipelines

PARTITIONS = 2
Poison = frozenset[tuple[str, int]]  # (stage, offset) that fails there


def number(name: str, inputs: Sequence[bytes]) -> bytes:
    return hashlib.md5(b"|".join([name.encode(), *inputs]), usedforsecurity=False).digest()


class Hash(Plain):
    """A stage whose numbers are hashes; it is slow or fast as the dice say."""

    def __init__(self, stage: StagePlan, poison: Poison, dice: random.Random) -> None:
        self.stage, self.poison, self.dice = stage, poison, dice

    async def __call__(self, items: Sequence[Item]) -> Result:
        results = [await self.one(item.envelope) for item in items if item.envelope]
        return Result(
            tuple(e for r in results for e in r.outputs),
            tuple(e for r in results for e in r.outcomes),
            settled=tuple(Settled(p) for item in items for p in item.positions),
        )

    async def one(self, envelope: Envelope) -> Result:
        for _ in range(self.dice.randrange(4)):
            await asyncio.sleep(0)
        if envelope.samples[0].failure:
            return Result(outcomes=(envelope,))
        rising(envelope)
        name = self.stage.name
        bad = Failure("error", name, "compute", "poison")
        gone = {s.offset: bad for s in envelope.samples if (name, s.offset) in self.poison}
        hops = (*envelope.hops, Hop(name, 1, 1, 1))
        outcomes = (replace(envelope.outcomes(gone), hops=hops),) if gone else ()
        kept = [k for k, s in enumerate(envelope.samples) if s.offset not in gone]
        if not kept:
            return Result(outcomes=outcomes)
        inputs = [cut(envelope.tensors[spec.name]) for spec in self.stage.inputs]
        tensors = {
            spec.name: stacked([number(spec.name, [rows[k] for rows in inputs]) for k in kept])
            for spec in self.stage.outputs
        }
        samples = tuple(envelope.samples[k] for k in kept)
        made = replace(envelope, samples=samples, tensors=tensors, hops=hops)
        return Result((made,), outcomes)


def cut(tensor: Tensor) -> list[bytes]:
    data = bytes(decompress(tensor).data)
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def stacked(rows: Sequence[bytes]) -> Tensor:
    return Tensor("F32", (len(rows), 4), memoryview(b"".join(rows)))


def rising(envelope: Envelope) -> None:
    offsets = [sample.offset for sample in envelope.samples]
    assert offsets == sorted(set(offsets)), "rows out of order"
    assert all(tensor.shape[0] == len(offsets) for tensor in envelope.tensors.values())
    stages = [hop.stage for hop in envelope.hops]
    assert len(stages) == len(set(stages)), "a stage stands twice in an answer's timing"


def whole(plan: Plan, offset: int, poison: Poison) -> bytes | None:
    """Return what the uncut model makes of a row; None: it fails."""
    found = {"image": b"%016d" % offset}
    for stage in plan.stages:
        if (stage.name, offset) in poison:
            return None
        inputs = [found[spec.name] for spec in stage.inputs]
        found |= {spec.name: number(spec.name, inputs) for spec in stage.outputs}
    return found[plan.stages[-1].outputs[0].name]


# ---- a cluster ---------------------------------------------------------------------------------


class Log:
    """All topics."""

    def __init__(self) -> None:
        self.topics: dict[TopicPartition, list[Record]] = defaultdict(list)

    async def send_many(self, outgoing: Sequence[Outgoing]) -> asyncio.Future[None]:
        for out in outgoing:
            assert out.partition is not None
            kept = self.topics[TopicPartition(out.topic, out.partition)]
            kept.append(
                Record(out.topic, out.partition, len(kept), 0, out.key, out.value, out.headers)
            )
        acked = asyncio.get_running_loop().create_future()
        acked.set_result(None)
        return acked


@dataclass
class Node:
    """A worker whose every move is somebody else's: what it dies between, too."""

    role: WorkerSpec
    plan: Plan
    poison: Poison
    log: Log
    dice: random.Random
    commits: dict[TopicPartition, Commit | None] = field(default_factory=dict)

    async def boot(self) -> None:
        metrics = Metrics("p").stage(self.role.name)
        self.tracker, self.pending = Tracker(), list[Result]()
        tps = [TopicPartition(self.role.source, p) for p in range(PARTITIONS)]
        begin = {tp: self.commits.get(tp) for tp in tps}
        self.cursors = {tp: commit.offset if commit else 0 for tp, commit in begin.items()}
        self.tracker.assign(begin)
        self.intake = Envelopes("s", self.plan.digest, metrics, max_bytes=1 << 20)
        self.outbox = Outbox(
            self.log,  # type: ignore[arg-type]
            metrics,
            self.role.routes,
            max_record_bytes=200,
            partitions=PARTITIONS,
        )
        self.step = self.made()
        await self.step.assign({tp: c.metadata if c else "" for tp, c in begin.items()})

    def made(self) -> Step:
        stages = [self.plan.stage(name) for name in self.role.stages]
        steps = {s.name: Hash(s, self.poison, self.dice) for s in stages}
        graph = steps[stages[0].name] if len(stages) == 1 else Graph(stages, steps, {})
        if not self.role.gathers:
            return graph
        self.gather = Gather(stages[0], Patience(1e9), Metrics("p").stage(self.role.name))
        return chain(self.gather, graph)

    def unread(self) -> list[TopicPartition]:
        return [tp for tp, at in self.cursors.items() if at < len(self.log.topics[tp])]

    async def read(self) -> None:
        tp = self.dice.choice(self.unread())
        record = self.log.topics[tp][self.cursors[tp]]
        self.cursors[tp] += 1
        self.tracker.deliver([record.position])
        self.intake.add([record])
        self.tracker.settle([Settled(p) for p in self.intake.settled()], {})
        for item in self.intake.take():
            self.pending.append(await self.step([item]))

    async def finish(self) -> None:
        result = self.pending.pop(self.dice.randrange(len(self.pending)))
        for envelope in (*result.outputs, *result.outcomes):
            rising(envelope)
        await self.outbox.publish(result)
        if self.dice.random() < 0.1:
            return await self.boot()  # died between ack and settle
        self.tracker.settle(result.settled, result.notes)
        if result.acked is not None:
            self.tracker.settle(*result.acked())
        return None

    def commit(self) -> None:
        commits = self.tracker.commits()
        for tp, commit in commits.items():
            before = self.commits.get(tp)
            assert before is None or before.offset <= commit.offset, "a commit went back"
        self.commits |= commits
        self.tracker.committed(commits)

    @property
    def done(self) -> bool:
        return not self.unread() and not self.pending


def batches(dice: random.Random, count: int) -> list[Envelope]:
    """Form micro-batches of the rows of each partition, and perhaps form the last ones anew."""
    found = []
    for partition in range(PARTITIONS):
        for begin in [0, *([dice.randrange(count)] if dice.random() < 0.5 else [])]:
            at = begin
            while at < count:
                end = min(count, at + dice.randint(1, 6))
                rows = [b"%016d" % offset for offset in range(at, end)]
                samples = tuple(Sample(o, o, f"{o}", None, 0) for o in range(at, end))
                tensors = {"image": stacked(rows)}
                found.append(Envelope(partition, samples, DIGEST, f"i{begin}", tensors))
                at = end
    return found


DIGEST = "0123456789abcdef" * 4


async def ran(plan: Plan, spec: PipelineSpec, poison: Poison, dice: random.Random, count: int,
              deaths: float) -> Log:  # fmt: skip
    """Run a pipeline until nothing moves; return all that was ever written."""
    log, topology = Log(), build(spec, plan)
    for envelope in batches(dice, count):
        sent = [Outgoing(topology.input_topic, value, None, envelope.partition, headers)
                for headers, value in records(envelope, 900)]  # fmt: skip
        await log.send_many(sent)
    nodes = [Node(role, plan, poison, log, dice) for role in topology.workers[:-1]]
    for node in nodes:
        await node.boot()
    while busy := [node for node in nodes if not node.done]:
        node = dice.choice(busy)
        if dice.random() < deaths:
            await node.boot()
        elif node.pending and dice.random() < 0.6:
            await node.finish()
        elif node.unread():
            await node.read()
        if dice.random() < 0.2:
            node.commit()
    for node in nodes:
        node.commit()
        assert node.step.due() is None, f"{node.role.name} waits for what never comes"
        ends = {tp: len(log.topics[tp]) for tp in node.cursors}
        assert {tp: c.offset if c else 0 for tp, c in node.commits.items()} == {
            tp: end for tp, end in ends.items() if end
        }, f"{node.role.name} has not settled all"
    return log


def answers(log: Log, topic: str, plan: Plan) -> Mapping[tuple[int, int], list[bytes | Failure]]:
    """Return what reached the sink of each row: numbers, or failures."""
    intake = Envelopes("sink", None, Metrics("p").stage("sink"), max_bytes=1 << 20)
    for partition in range(PARTITIONS):
        intake.add(log.topics[TopicPartition(topic, partition)])
    name = plan.stages[-1].outputs[0].name
    found = defaultdict(list)
    for item in intake.take():
        assert item.envelope is not None
        for at, sample in enumerate(item.envelope.samples):
            value = sample.failure or cut(item.envelope.tensors[name])[at]
            assert item.envelope.partition == item.positions[0].partition
            found[item.envelope.partition, sample.offset].append(value)
    return found


def poisons(dice: random.Random, plan: Plan, count: int) -> Poison:
    share = dice.choice([0.0, 0.02, 0.2, 1.0])
    names = [stage.name for stage in plan.stages]
    one = dice.choice(names)
    return frozenset(
        (name, offset)
        for name in (names if dice.random() < 0.5 else [one])
        for offset in range(count)
        if dice.random() < share
    )


@settings(deadline=None, max_examples=60)
@given(pipelines(), st.integers(0, 2**32), st.booleans())
async def test_every_row_has_its_answer_whatever_the_shape_and_whoever_dies(
    case: tuple[PipelineSpec, Plan], seed: int, mortal: bool
) -> None:
    spec, plan = case
    dice = random.Random(seed)
    count = dice.randint(1, 12)
    poison = poisons(dice, plan, count)
    log = await ran(plan, spec, poison, dice, count, 0.03 if mortal else 0.0)
    found = answers(log, build(spec, plan).sink_topic, plan)
    assert found.keys() == {(p, o) for p in range(PARTITIONS) for o in range(count)}
    for (_, offset), values in found.items():
        expected = whole(plan, offset, poison)
        for value in values:  # the sink takes the first: all must be the same
            if expected is None:
                assert isinstance(value, Failure)
                assert (value.stage, offset) in poison
            else:
                assert value == expected
