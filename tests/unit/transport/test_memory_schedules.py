"""Random lives of a group: whatever joins, leaves, dies and stalls, no record is lost or misread.

An oracle watches every hand-out. A member may be given a partition's records only from the
committed offset on, each once, without a gap; nothing below a commit ever comes again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence

import pytest

from streaminfer.errors import NotOwner
from streaminfer.transport import Commit, Outgoing, TopicPartition, TopicSpec
from streaminfer.transport.memory import MemoryTransport

PARTITIONS = 4
TURNS = 20  # of the loop: more than a revoke and a deal take of listeners that do not wait


class World:
    """A topic, a group, and what is known for certain about both."""

    def __init__(self) -> None:
        self.transport = MemoryTransport()
        self.sent = [0] * PARTITIONS
        self.committed: dict[TopicPartition, int] = {}
        self.seen: set[tuple[int, int]] = set()
        self.members: list[Witness] = []
        self.tasks: list[asyncio.Task[object]] = []

    async def send(self, count: int, partition: int) -> None:
        async with self.transport.producer() as producer:
            for _ in range(count):
                await producer.send(Outgoing("t", b"x", partition=partition % PARTITIONS))
                self.sent[partition % PARTITIONS] += 1

    async def join(self, weight: int, behaviour: int) -> None:
        member = Witness(self, float(weight % 3), behaviour)
        self.members.append(member)
        self.tasks.append(asyncio.create_task(member.consumer.__aenter__()))

    async def leave(self, which: int, _: int) -> None:
        if member := self._take(which):
            self.tasks.append(asyncio.create_task(member.consumer.__aexit__(None, None, None)))

    async def crash(self, which: int, _: int) -> None:
        if member := self._take(which):
            member.dead = True
            member.consumer.crash()

    async def poll(self, which: int, count: int) -> None:
        for member in self._pick(which):
            await member.poll(count + 1)

    async def commit(self, which: int, _: int) -> None:
        for member in self._pick(which):
            await member.commit()

    async def pass_time(self, turns: int, _: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    def _pick(self, which: int) -> Sequence[Witness]:
        ready = [member for member in self.members if member.consumer.assignment()]
        return [ready[which % len(ready)]] if ready else []

    def _take(self, which: int) -> Witness | None:
        members = self._pick(which)
        for member in members:
            self.members.remove(member)
        return members[0] if members else None


class Witness:
    """A member that checks what it is given. `behaviour` says what it does when it must let go."""

    def __init__(self, world: World, weight: float, behaviour: int) -> None:
        self.world, self.behaviour, self.dead = world, behaviour, False
        self.next: dict[TopicPartition, int] = {}
        self.consumer = world.transport.consumer(["t"], "g", self, weight=weight)

    async def assigned(self, partitions: Mapping[TopicPartition, Commit | None]) -> None:
        assert not self.next, "revoked came before"
        for tp, commit in partitions.items():
            assert (commit.offset if commit else None) == self.world.committed.get(tp)
            self.next[tp] = commit.offset if commit else 0
        if self.behaviour & 1:
            await asyncio.sleep(0)

    async def revoked(self, partitions: Collection[TopicPartition]) -> None:
        if self.behaviour & 2:
            await asyncio.sleep(0)
        if self.behaviour & 4:
            await self.commit(owner=True)
        if not self.dead:
            assert set(partitions) == set(self.next)
        self.next = {}

    async def poll(self, count: int) -> None:
        for record in await self.consumer.poll(0, max_records=count):
            assert record.offset == self.next[record.position.tp], "a gap, or a record twice"
            self.next[record.position.tp] += 1
            self.world.seen.add((record.partition, record.offset))

    async def commit(self, *, owner: bool = False) -> None:
        commits = {tp: Commit(offset) for tp, offset in self.next.items()}
        try:
            await self.consumer.commit(commits)
        except NotOwner:
            assert self.dead or not owner, "inside revoked it still is the owner"
        else:
            for tp, commit in commits.items():
                assert commit.offset >= self.world.committed.get(tp, 0)
                self.world.committed[tp] = commit.offset


async def live(steps: Sequence[tuple[str, int, int]]) -> None:
    world = World()
    async with world.transport.admin() as admin:
        await admin.create([TopicSpec("t", PARTITIONS)])
        for action, first, second in steps:
            await getattr(world, action)(first, second)
            owned = [tp for member in world.members for tp in member.consumer.assignment()]
            assert len(owned) == len(set(owned)), "two own one partition"
        await world.join(1, 4)
        await asyncio.gather(*world.tasks)
        left = [(await admin.offsets([tp]))[tp][1] for tp in all_partitions()]
        assert left == world.sent
        every = {(p, n) for p in range(PARTITIONS) for n in range(world.sent[p])}
        async with asyncio.timeout(30):
            while world.seen != every:
                for member in world.members:
                    await member.poll(50)
        for member in world.members:
            await member.consumer.__aexit__(None, None, None)
    await no_task_is_left()


async def no_task_is_left() -> None:
    """A deal that the last leave came upon ends by itself, in turns of the loop and no time."""
    for _ in range(TURNS):
        if not (left := asyncio.all_tasks() - {asyncio.current_task()}):
            return
        await asyncio.sleep(0)
    raise AssertionError(f"somebody still waits: {left}")


def all_partitions() -> list[TopicPartition]:
    return [TopicPartition("t", number) for number in range(PARTITIONS)]


WEIGHTS = {
    "send": 3, "join": 2, "leave": 1, "crash": 1, "poll": 4, "commit": 2, "pass_time": 4
}  # fmt: skip


def life(seed: int) -> list[tuple[str, int, int]]:
    dice = random.Random(seed)
    actions = dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=dice.randint(1, 80))
    return [(action, dice.randrange(8), dice.randrange(8)) for action in actions]


@pytest.mark.parametrize("hundred", range(5))
def test_no_schedule_loses_or_misreads_a_record(hundred: int) -> None:
    for seed in range(100 * hundred, 100 * (hundred + 1)):
        steps = life(seed)
        try:
            asyncio.run(live(steps))
        except BaseException as error:
            error.add_note(f"seed {seed}: {steps}")
            raise
