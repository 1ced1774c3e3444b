"""What the topics of a pipeline should be like, and how much may lie in them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streaminfer.errors import ConfigError
from streaminfer.plan import Plan, StagePlan
from streaminfer.spec import PipelineSpec
from streaminfer.topology import Topology, build, unequal
from streaminfer.transport import TopicInfo, TopicSpec

__all__ = ["ANSWER", "ROW_OVERHEAD", "Difference", "diff", "inflight", "topic_specs", "window"]

HEADROOM = 64 * 1024  # bytes of a record beside its value: key, headers, framing
MIB = 1 << 20
LIMIT = "max.message.bytes"
UNREAD_STAYS = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",  # workers delete behind their commits; time must not take unread work
    "retention.bytes": "-1",
    "segment.bytes": str(64 * MIB),  # the disk comes back a segment at a time
}
MOST = 4096  # samples per partition: more than that only makes a restart longer
ROW_OVERHEAD = 256  # bytes of a sample's header: id, key, offsets, meta
ANSWER = 12  # bytes of one of the top k: a float32 score and an int64 index


@dataclass(frozen=True)
class Difference:
    """A topic that is not as it should be; `wanted.config` of one that exists is what differs."""

    wanted: TopicSpec
    found: TopicInfo | None = None  # None: missing
    stale: Mapping[str, str | None] = field(default_factory=dict)  # config entries as they are

    @property
    def missing(self) -> bool:
        """Whether there is no such topic."""
        return self.found is None

    @property
    def fixable(self) -> bool:
        """Whether creating or configuring mends it; partitions that are wrong stay wrong."""
        return self.found is None or self.found.partitions == self.wanted.partitions

    def to_json(self) -> dict[str, object]:
        """Return it for programs, with the sentence for people."""
        return {
            "topic": self.wanted.name,
            "missing": self.missing,
            "fixable": self.fixable,
            "partitions": {
                "found": self.found.partitions if self.found else None,
                "wanted": self.wanted.partitions,
            },
            "config": {
                key: {"found": self.stale.get(key), "wanted": value}
                for key, value in self.wanted.config.items()
            },
            "message": str(self),
        }

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.wanted.name}: missing ({self.wanted.partitions} partitions)"
        if not self.fixable:
            return unequal(self.wanted.name, self.found.partitions, self.wanted.partitions)
        entries = (
            f"{key} is {self.stale[key] or 'unset'}, should be {value}"
            for key, value in self.wanted.config.items()
        )
        return f"{self.wanted.name}: {'; '.join(entries)}"


def topic_specs(topology: Topology, spec: PipelineSpec, partitions: int) -> tuple[TopicSpec, ...]:
    """Return all topics as they should be; `partitions` is what the input topic has or gets."""
    chunks = str(max(MIB, spec.kafka.max_record_bytes) + HEADROOM)
    config = {
        topology.input_topic: {LIMIT: str(spec.input.max_bytes + HEADROOM)},
        topology.output_topic: {},  # the user's: kept as long as the cluster keeps things
    }
    inner = UNREAD_STAYS | {LIMIT: chunks}
    return tuple(TopicSpec(name, partitions, config.get(name, inner)) for name in topology.topics())


def diff(specs: Sequence[TopicSpec], existing: Mapping[str, TopicInfo]) -> list[Difference]:
    """Compare `topic_specs` with the topics that exist; at most one difference each.

    More than needed is fine for `max.message.bytes` and for the partitions of the output topic,
    which is the last one: a sample without a key is answered in its input partition's number.
    """
    found: list[Difference] = []
    for spec in specs:
        info = existing.get(spec.name)
        if info is None:
            found.append(Difference(spec))
            continue
        if spec is specs[-1] and info.partitions > spec.partitions:
            spec = replace(spec, partitions=info.partitions)
        wrong = {
            key: value
            for key, value in spec.config.items()
            if not _suffices(key, info.config.get(key), value)
        }
        if wrong or info.partitions != spec.partitions:
            stale = {key: info.config.get(key) for key in wrong}
            found.append(Difference(replace(spec, config=wrong), info, stale))
    return found


def window(spec: PipelineSpec, plan: Plan, partitions: int) -> int:
    """Return how many samples of one input partition may be in flight.

    As many as `spec.memory` holds on the widest edge as it travels, shared by the partitions; at
    least one micro-batch, at most 4096. Raises ConfigError if one micro-batch of every partition
    is more than four times the memory.
    """
    widest = _widest_row(spec, plan)
    batch = spec.batch_of(spec.stages[0].name).max
    least = batch * partitions * widest
    if least > 4 * spec.memory:
        raise ConfigError(
            f"one micro-batch of {batch} samples in each of {partitions} partitions is "
            f"{least / 1e6:.0f} MB at {widest:,} bytes a sample; memory allows "
            f"{spec.memory / 1e6:.0f} MB",
            where="memory",
            hint="a smaller batch.max, fewer partitions, a cut with less to carry, "
            "edges with dtype float16 or int8, or more memory",
        )
    return inflight(batch, partitions, spec.memory, widest)


def inflight(batch: int, partitions: int, memory: int, row: int) -> int:
    """Return how many samples of a partition, of `row` bytes at most, the memory has room for."""
    return max(batch, min(MOST, memory // (partitions * row)))


def _widest_row(spec: PipelineSpec, plan: Plan) -> int:
    """Return the bytes of a sample where most of it is on its way: parts of a stage add up."""
    rows: dict[str, dict[str, int]] = {}  # fan or stage → topic → bytes
    for worker in build(spec, plan).workers[1:-1]:
        first = plan.stage(worker.stages[0])
        level = rows.setdefault(_outermost(plan, first), {})
        level[worker.source] = sum(t.row_bytes(first.edge.dtype) for t in first.inputs)
    raw = sum(tensor.row_bytes() for tensor in plan.stages[-1].outputs)
    answer = min(raw, ANSWER * plan.top_k) if plan.top_k else raw
    return ROW_OVERHEAD + max([answer, *(sum(level.values()) for level in rows.values())])


def _outermost(plan: Plan, stage: StagePlan) -> str:
    """Return the gather that ends the whole fan around a stage; the stage, where none is."""
    while stage.gather:
        stage = plan.stage(stage.gather)
    return stage.name


def _suffices(key: str, have: str | None, want: str) -> bool:
    if key == LIMIT and have is not None and have.isdecimal():
        return int(have) >= int(want)
    return have == want
