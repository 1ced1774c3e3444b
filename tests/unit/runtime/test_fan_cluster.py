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
from streaminfer.wire import (
    Compression,
    Envelope,
    Failure,
    Hop,
    Sample,
    Tensor,
    compress,
    decompress,
    records,
)
from tests.plans import pipelines

PARTITIONS = 2
CODECS: tuple[Compression | None, ...] = (None, "zstd", "lz4")
Poison = frozenset[tuple[str, int]]  # (stage, offset) that fails there
Answers = Mapping[tuple[int, int], list[tuple[bytes | Failure, bool]]]  # and whether it is partial


def number(name: str, inputs: Sequence[bytes]) -> bytes:
    return hashlib.md5(b"|".join([name.encode(), *inputs]), usedforsecurity=False).digest()


class Hash(Plain):
    """A stage whose numbers are hashes; it is slow or fast as the dice say."""

    def __init__(self, stage: StagePlan, world: World) -> None:
        self.stage, self.poison, self.dice = stage, world.poison, world.dice
        self.exits = {offset for name, offset in world.exits if name == stage.name}
        self.answer = world.plan.stages[-1].outputs[0].name

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
        outcomes = [replace(envelope.outcomes(gone), hops=hops)] if gone else []
        inputs = [cut(envelope.tensors[spec.name]) for spec in self.stage.inputs]

        def made(names: Mapping[str, str], rows: list[int]) -> Envelope:
            tensors = {
                name: self.packed([number(of, [values[k] for values in inputs]) for k in rows])
                for name, of in names.items()
            }
            samples = tuple(envelope.samples[k] for k in rows)
            return replace(envelope, samples=samples, tensors=tensors, hops=hops)

        good = [k for k, s in enumerate(envelope.samples) if s.offset not in gone]
        leaving = [k for k in good if envelope.samples[k].offset in self.exits]
        if leaving:
            outcomes.append(made({self.answer: f"exit of {name}"}, leaving))
        if not (staying := [k for k in good if k not in leaving]):
            return Result(outcomes=tuple(outcomes))
        names = {spec.name: spec.name for spec in self.stage.outputs}
        return Result((made(names, staying),), tuple(outcomes))

    def packed(self, rows: Sequence[bytes]) -> Tensor:
        codec = self.dice.choice(CODECS)
        return compress(stacked(rows), codec) if codec else stacked(rows)


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


def quorum_of(spec: PipelineSpec, stage: StagePlan) -> int | None:
    return getattr(spec.stage(stage.path), "quorum", None) if stage.kind == "gather" else None


def whole(world: World, offset: int) -> tuple[bytes | None, bool]:
    """Return what the uncut model makes of a row (None: it fails), and whether a branch failed."""
    found: dict[str, bytes | None] = {"image": b"%016d" % offset}
    partial, plan = False, world.plan
    for stage in plan.stages:
        inputs = [found[tensor.name] for tensor in stage.inputs]
        least = quorum_of(world.spec, stage) or len(inputs)
        fails = (stage.name, offset) in world.poison or len(inputs) - inputs.count(None) < least
        partial |= None in inputs and not fails
        given = [value or bytes(16) for value in inputs]
        if (stage.name, offset) in world.exits and not fails:
            return number(f"exit of {stage.name}", given), False
        found |= {t.name: None if fails else number(t.name, given) for t in stage.outputs}
    last = found[plan.stages[-1].outputs[0].name]
    return last, partial and last is not None


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


@dataclass(frozen=True)
class World:
    """What all workers of a run have in common; `deaths` is how often they die."""

    plan: Plan
    spec: PipelineSpec
    poison: Poison
    exits: Poison
    dice: random.Random
    deaths: float
    log: Log = field(default_factory=Log)


@dataclass
class Node:
    """A worker whose every move is somebody else's: what it dies between, too."""

    role: WorkerSpec
    world: World
    commits: dict[TopicPartition, Commit | None] = field(default_factory=dict)

    async def boot(self) -> None:
        metrics = Metrics("p").stage(self.role.name)
        self.tracker, self.pending = Tracker(), list[Result]()
        tps = [TopicPartition(self.role.source, p) for p in range(PARTITIONS)]
        begin = {tp: self.commits.get(tp) for tp in tps}
        self.cursors = {tp: commit.offset if commit else 0 for tp, commit in begin.items()}
        self.tracker.assign(begin)
        self.intake = Envelopes("s", self.world.plan.digest, metrics, max_bytes=1 << 20)
        self.outbox = Outbox(
            self.world.log,  # type: ignore[arg-type]
            metrics,
            self.role.routes,
            max_record_bytes=200,
            partitions=PARTITIONS,
        )
        self.step = self.made()
        await self.step.assign({tp: c.metadata if c else "" for tp, c in begin.items()})

    def made(self) -> Step:
        stages = [self.world.plan.stage(name) for name in self.role.stages]
        steps = {s.name: Hash(s, self.world) for s in stages}
        found = {s.name: q for s in stages if (q := quorum_of(self.world.spec, s))}
        graph = steps[stages[0].name] if len(stages) == 1 else Graph(stages, steps, found)
        if not self.role.gathers:
            return graph
        quorum = found.get(stages[0].name)
        patience = Patience(1e9, quorum, strict=quorum is not None)
        return chain(Gather(stages[0], patience, Metrics("p").stage(self.role.name)), graph)

    def unread(self) -> list[TopicPartition]:
        return [tp for tp, at in self.cursors.items() if at < len(self.world.log.topics[tp])]

    async def read(self) -> None:
        tp = self.world.dice.choice(self.unread())
        record = self.world.log.topics[tp][self.cursors[tp]]
        self.cursors[tp] += 1
        self.tracker.deliver([record.position])
        self.intake.add([record])
        self.tracker.settle([Settled(p) for p in self.intake.settled()], {})
        for item in self.intake.take():
            self.pending.append(await self.step([item]))

    async def finish(self) -> None:
        result = self.pending.pop(self.world.dice.randrange(len(self.pending)))
        for envelope in (*result.outputs, *result.outcomes):
            rising(envelope)
        await self.outbox.publish(result)
        if self.world.dice.random() < self.world.deaths:
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


def batches(dice: random.Random, count: int, anew: bool) -> list[Envelope]:
    """Form micro-batches of the rows of each partition; `anew`: some of them a second time."""
    found = []
    for partition in range(PARTITIONS):
        for begin in [0, dice.randrange(count)] if anew else [0]:
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


async def ran(world: World, count: int, anew: bool) -> None:
    """Run a pipeline until nothing moves."""
    log, dice, topology = world.log, world.dice, build(world.spec, world.plan)
    for envelope in batches(dice, count, anew):
        sent = [Outgoing(topology.input_topic, value, None, envelope.partition, headers)
                for headers, value in records(envelope, 900)]  # fmt: skip
        await log.send_many(sent)
    nodes = [Node(role, world) for role in topology.workers[:-1]]
    for node in nodes:
        await node.boot()
    while busy := [node for node in nodes if not node.done]:
        node = dice.choice(busy)
        if dice.random() < world.deaths / 3:
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


def answers(log: Log, topic: str, plan: Plan) -> Answers:
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
            found[item.envelope.partition, sample.offset].append((value, sample.partial))
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
@given(pipelines(), st.integers(0, 2**32), st.booleans(), st.booleans())
async def test_every_row_has_its_answer_whatever_the_shape_and_whoever_dies(
    case: tuple[PipelineSpec, Plan], seed: int, mortal: bool, anew: bool
) -> None:
    spec, plan = case
    dice = random.Random(seed)
    count = dice.randint(1, 12)
    poison = poisons(dice, plan, count)
    heads = [s.name for s in plan.stages[:-1] if s.kind == "stage" and not s.gather]
    exits = frozenset((n, o) for n in heads for o in range(count) if dice.random() < 0.2)
    world = World(plan, spec, poison, exits, dice, 0.1 if mortal else 0.0)
    await ran(world, count, anew)
    found = answers(world.log, build(spec, plan).sink_topic, plan)
    assert found.keys() == {(p, o) for p in range(PARTITIONS) for o in range(count)}
    for (_, offset), values in found.items():
        expected, partly = whole(world, offset)
        for value, partial in values:  # the sink takes the first: all must be the same
            if expected is None:
                assert isinstance(value, Failure)
                assert (value.stage, offset) in poison
            else:
                assert (value, partial) == (expected, partly)
        assert mortal or anew or len(values) == 1, "answered twice though nobody died"
