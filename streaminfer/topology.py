"""Who runs what: workers, their topics and consumer groups, from the spec and the plan. Pure.

    images ─▶ [s0] ─ si.<name>.<digest8>.s1 ─▶ [s1] ─ si.<name>.sink ─▶ [sink] ─▶ predictions

Stages joined by local edges are one worker. Inner topics belong to a plan (its digest is in their
names), the sink to the pipeline, so that two plans of it can run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from streaminfer.errors import ConfigError, TopicError
from streaminfer.plan import Plan
from streaminfer.spec import BatchSpec, PipelineSpec, did_you_mean
from streaminfer.transport import TopicInfo, TopicSpec

__all__ = [
    "ANSWER",
    "SINK",
    "Difference",
    "Topology",
    "WorkerSpec",
    "build",
    "diff",
    "topic_specs",
    "window",
]

SINK = "sink"
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
class WorkerSpec:
    """One worker: what it runs, reads and feeds. `devices` has one for each of `stages`."""

    name: str  # its first stage's, or "sink"
    stages: tuple[str, ...]  # joined by local edges; () for the sink
    source: str
    target: str
    group: str
    replicas: int
    devices: tuple[str, ...]
    batch: BatchSpec  # of its first stage


@dataclass(frozen=True)
class Topology:
    """A pipeline's workers in the order of the road, the sink last."""

    pipeline: str
    digest: str
    input_topic: str
    sink_topic: str
    output_topic: str
    workers: tuple[WorkerSpec, ...]

    def worker(self, name: str) -> WorkerSpec:
        """Return the worker of that name or with that stage. Raises ConfigError."""
        for worker in self.workers:
            if name == worker.name or name in worker.stages:
                return worker
        known = [stage for worker in self.workers for stage in worker.stages or (worker.name,)]
        raise ConfigError(
            f"no stage {name!r} in pipeline {self.pipeline!r}", hint=did_you_mean(name, known)
        )

    def inner_topics(self) -> tuple[str, ...]:
        """Return the topics between stages, in order; they belong to this plan alone."""
        return tuple(worker.source for worker in self.workers[1:-1])

    def topics(self) -> tuple[str, ...]:
        """Return every topic of the road, in order."""
        return (self.input_topic, *self.inner_topics(), self.sink_topic, self.output_topic)

    def check(self, existing: Mapping[str, TopicInfo]) -> int:
        """Return the input topic's partitions; raise TopicError if the topics cannot work."""
        if missing := [name for name in self.topics() if name not in existing]:
            raise TopicError(
                f"missing: {', '.join(missing)}\n  hint: create them: streaminfer topics apply"
            )
        partitions = existing[self.input_topic].partitions
        for name in (*self.inner_topics(), self.sink_topic):
            if existing[name].partitions != partitions:
                raise TopicError(_unequal(name, existing[name].partitions, partitions))
        if (answers := existing[self.output_topic].partitions) < partitions:
            raise TopicError(_unequal(self.output_topic, answers, partitions))
        return partitions


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
            return _unequal(self.wanted.name, self.found.partitions, self.wanted.partitions)
        entries = (
            f"{key} is {self.stale[key] or 'unset'}, should be {value}"
            for key, value in self.wanted.config.items()
        )
        return f"{self.wanted.name}: {'; '.join(entries)}"


def build(spec: PipelineSpec, plan: Plan) -> Topology:
    """Lay out the workers. Raises ConfigError if the plan was built from other stages."""
    _same_stages(spec, plan)
    base = f"{spec.kafka.prefix}.{spec.pipeline}"
    digest = plan.digest[:8]
    sink_topic = f"{base}.{SINK}"
    groups: list[list[str]] = []
    for stage in spec.stages:
        if groups and spec.edge(stage.name).transport == "local":
            groups[-1].append(stage.name)
        else:
            groups.append([stage.name])
    inner = [f"{base}.{digest}.{names[0]}" for names in groups[1:]]
    sources = [spec.input.topic, *inner]
    targets = [*inner, sink_topic]
    readers = [f"{base}.ingest.{digest}", *inner]
    workers = [
        WorkerSpec(
            name=names[0],
            stages=tuple(names),
            source=source,
            target=target,
            group=group,
            replicas=spec.stage(names[0]).replicas,
            devices=tuple(spec.stage(name).device for name in names),
            batch=spec.batch_of(names[0]),
        )
        for names, source, target, group in zip(groups, sources, targets, readers, strict=True)
    ]
    sink = WorkerSpec(SINK, (), sink_topic, spec.output.topic, f"{base}.{SINK}", 1, (), spec.batch)
    return Topology(
        pipeline=spec.pipeline,
        digest=plan.digest,
        input_topic=spec.input.topic,
        sink_topic=sink_topic,
        output_topic=spec.output.topic,
        workers=(*workers, sink),
    )


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
            "edges with dtype float16, or more memory",
        )
    return max(batch, min(MOST, spec.memory // (partitions * widest)))


def _widest_row(spec: PipelineSpec, plan: Plan) -> int:
    rows = [
        sum(tensor.row_bytes(stage.edge.dtype) for tensor in stage.inputs)
        for stage in plan.stages[1:]
        if spec.edge(stage.name).transport == "kafka"
    ]
    raw = sum(tensor.row_bytes() for tensor in plan.stages[-1].outputs)
    return ROW_OVERHEAD + max([*rows, min(raw, ANSWER * plan.top_k) if plan.top_k else raw])


def _suffices(key: str, have: str | None, want: str) -> bool:
    if key == LIMIT and have is not None and have.isdecimal():
        return int(have) >= int(want)
    return have == want


def _unequal(topic: str, have: int, want: int) -> str:
    return (
        f"{topic}: {have} partitions, should be {want}: samples would be lost or come out of order"
    )


def _same_stages(spec: PipelineSpec, plan: Plan) -> None:
    declared = [stage.name for stage in spec.stages]
    planned = [stage.name for stage in plan.stages]
    if declared != planned or spec.pipeline != plan.pipeline:
        raise ConfigError(
            f"the plan is of {plan.pipeline} ({', '.join(planned)}), "
            f"the file of {spec.pipeline} ({', '.join(declared)})",
            where=str(spec.path or ""),
            hint="build it again: streaminfer build PIPELINE",
        )
