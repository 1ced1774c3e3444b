"""Who runs what: workers, their topics and consumer groups, from the spec and the plan. Pure.

    images ─▶ [s0] ─ si.<name>.<digest8>.s1 ─▶ [s1] ─ si.<name>.sink ─▶ [sink] ─▶ predictions

Stages joined by local edges are one worker. Inner topics belong to a plan (its digest is in their
names), the sink to the pipeline, so that two plans of it can run side by side. Parts that take the
same tensors read one topic, each as a group of its own; all parts send to the topic of their
gather, which runs in the worker of the stage behind it:

    [stem] ─ …trunk ─▶ [trunk.0] ─┐
                  └──▶ [trunk.1] ─┴─ …trunk.gather ─▶ [trunk.gather, head] ─▶ sink
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

from streaminfer.errors import ConfigError, TopicError
from streaminfer.plan import Plan, StagePlan
from streaminfer.spec import BatchSpec, PipelineSpec, did_you_mean
from streaminfer.transport import TopicInfo

__all__ = ["SINK", "Route", "Routes", "Topology", "WorkerSpec", "build", "unequal"]

SINK = "sink"


class Route(NamedTuple):
    """Where a worker's outputs go; `tensors` () means all."""

    topic: str
    tensors: tuple[str, ...] = ()
    balance: bool = False  # spread over the partitions; else each keeps the input's


@dataclass(frozen=True)
class Routes:
    """All that a worker sends. `sender` and `voice` are who a gather takes it to be from."""

    outputs: tuple[Route, ...]
    outcomes: str  # topic for samples that failed: the gather's that answers for them, or the sink
    sender: str = ""
    voice: str = ""


@dataclass(frozen=True)
class WorkerSpec:
    """One worker: what it runs, reads and feeds.

    `devices` has, for each of `stages`, the device of every replica. `shares` are the replicas'
    relative speeds as declared; None: each measures its own.
    """

    name: str
    stages: tuple[str, ...]  # joined by local edges; () for the sink
    source: str
    group: str
    routes: Routes
    batch: BatchSpec  # of its first stage
    replicas: int = 1
    devices: tuple[tuple[str, ...], ...] = ()
    shares: tuple[float, ...] | None = (1.0,)
    gathers: bool = False  # its source has the parts of its first stage
    sharers: tuple[str, ...] = ()  # other groups that read its source
    balanced: bool = False  # its source's partitions are not the input's: what feeds it balances

    def device(self, stage: str, replica: int) -> str:
        """Return the device of one of its stages in one of its replicas. Raises ConfigError."""
        return self.devices[self.stages.index(stage)][self._known(replica)]

    def share(self, replica: int) -> float | None:
        """Return a replica's share; None: it measures its speed. Raises ConfigError."""
        return None if self.shares is None else self.shares[self._known(replica)]

    def _known(self, replica: int) -> int:
        """Return the number of a replica, if there is one of that number. Raises ConfigError."""
        if 0 <= replica < self.replicas:
            return replica
        raise ConfigError(
            f"{self.name} has no replica {replica}: they are numbered from 0 to"
            f" {self.replicas - 1}",
            where="--replica",
            hint=f"replicas: {replica + 1} in the pipeline file" if replica > 0 else "",
        )

    @property
    def unlike(self) -> bool:
        """Whether it matters which replica one is: their devices or shares differ."""
        return _unlike(self.devices) or len(set(self.shares or ())) > 1


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
        return tuple(dict.fromkeys(worker.source for worker in self.workers[1:-1]))

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
                raise TopicError(unequal(name, existing[name].partitions, partitions))
        if (answers := existing[self.output_topic].partitions) < partitions:
            raise TopicError(unequal(self.output_topic, answers, partitions))
        return partitions


def build(spec: PipelineSpec, plan: Plan) -> Topology:
    """Lay out the workers. Raises ConfigError if the plan was built from other stages."""
    _same_stages(spec, plan)
    return _Layout(spec, plan).topology()


class _Layout:
    """One reading of a spec and its plan."""

    def __init__(self, spec: PipelineSpec, plan: Plan) -> None:
        self._spec, self._plan = spec, plan
        self._base = f"{spec.kafka.prefix}.{spec.pipeline}"
        self._inner = f"{self._base}.{plan.digest[:8]}"
        self._sink = f"{self._base}.{SINK}"
        self._groups: list[list[StagePlan]] = []
        self._home: dict[str, list[StagePlan]] = {}
        for stage in plan.stages:
            if self._is_local(stage):
                group = self._home[stage.sources[0].stage]
            else:
                group = []
                self._groups.append(group)
            group.append(stage)
            self._home[stage.name] = group

    def topology(self) -> Topology:
        workers = [self._worker(group) for group in self._groups]
        for at, worker in enumerate(workers):
            others = tuple(
                w.group for w in workers if w.source == worker.source and w is not worker
            )
            workers[at] = replace(worker, sharers=others)
        target = Routes((Route(self._spec.output.topic),), self._spec.output.topic)
        sink = WorkerSpec(SINK, (), self._sink, f"{self._base}.{SINK}", target, self._spec.batch)
        return Topology(
            pipeline=self._spec.pipeline,
            digest=self._plan.digest,
            input_topic=self._spec.input.topic,
            sink_topic=self._sink,
            output_topic=self._spec.output.topic,
            workers=(*workers, sink),
        )

    def _is_local(self, stage: StagePlan) -> bool:
        """Whether a stage runs in the worker of what it takes."""
        if not stage.sources:
            return False
        before = self._plan.stage(stage.sources[0].stage)
        if stage.kind == "scatter" and len(self._plan.consumers(before.name)) == 1:
            return True  # else the others' topics would get nothing: a worker sends its last stage
        if stage.kind == "stage" and before.kind == "gather" and self._is_remote(before):
            return True  # the parts' outputs are what leads into it
        return not self._is_remote(stage)

    def _is_remote(self, stage: StagePlan) -> bool:
        return self._spec.edge(stage.path).transport == "kafka"

    def _worker(self, group: Sequence[StagePlan]) -> WorkerSpec:
        first, last = group[0], group[-1]
        real = next((stage for stage in group if stage.kind in ("stage", "part")), None)
        name = real.name if real else first.name
        root = not first.sources
        return WorkerSpec(
            name=name,
            stages=tuple(stage.name for stage in group),
            source=self._topic(first),
            group=f"{self._base}.ingest.{self._plan.digest[:8]}"
            if root
            else f"{self._inner}.{name}",
            routes=Routes(
                self._outputs(last),
                self._topic(self._plan.stage(first.gather)) if first.gather else self._sink,
                sender=last.name if first.gather else "",
                voice=self._plan.voice(first.name),
            ),
            batch=self._spec.batch_of(first.path),
            gathers=len(first.sources) > 1,
            balanced=self._is_balanced(first),
            **self._replicas(group, real),
        )

    def _replicas(self, group: Sequence[StagePlan], real: StagePlan | None) -> _Replicas:
        """Return what a worker has for each of its replicas; what only joins parts has one."""
        if real is None:
            return {"replicas": 1, "devices": (("cpu",),) * len(group), "shares": (1.0,)}
        declared = self._spec.stage(real.path)
        devices = tuple(
            ("cpu",) * declared.replicas
            if s.kind == "scatter"
            else _first(self._spec.stage(s.path).devices_of(s.part), declared.replicas)
            for s in group
        )
        shares: tuple[float, ...] | None = (1.0,) * declared.replicas
        if isinstance(declared.shares, tuple):
            shares = declared.shares
        elif declared.shares == "measured" or (declared.shares is None and _unlike(devices)):
            shares = None
        return {"replicas": declared.replicas, "devices": devices, "shares": shares}

    def _is_balanced(self, first: StagePlan) -> bool:
        """Whether what feeds a stage spreads its micro-batches: never before a gather."""
        one = first.kind in ("stage", "part") and bool(first.sources)
        return one and self._spec.edge(first.path).partitioning == "balance"

    def _outputs(self, stage: StagePlan) -> tuple[Route, ...]:
        """Return a route for every topic that takes something of the last stage of a worker."""
        every = tuple(spec.name for spec in stage.outputs)
        routes = {
            Route(
                self._topic(taker),
                () if tensors == every else tensors,
                self._is_balanced(taker),
            ): None
            for taker, tensors in self._plan.consumers(stage.name)
        }
        return tuple(routes) or (Route(self._sink),)

    def _topic(self, first: StagePlan) -> str:
        """Return the topic that the worker of this first stage reads."""
        if not first.sources:
            return self._spec.input.topic
        if len(first.sources) == 1:
            (source,) = first.sources
            takers = self._plan.consumers(source.stage)
            if len(takers) > 1 and len({tensors for _, tensors in takers}) == 1:
                shared = first.path if first.kind == "part" else first.path.partition(".")[0]
                return f"{self._inner}.{shared}"
        return f"{self._inner}.{first.name}"


class _Replicas(TypedDict):
    replicas: int
    devices: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...] | None


def _first(devices: tuple[str, ...], count: int) -> tuple[str, ...]:
    """Return a device for each of so many replicas: a gather's parts may have fewer or more."""
    return devices if len(devices) == count else devices[:1] * count


def _unlike(devices: tuple[tuple[str, ...], ...]) -> bool:
    return any(len(set(places)) > 1 for places in devices)


def unequal(topic: str, have: int, want: int) -> str:
    """Say that a topic has the wrong number of partitions."""
    return (
        f"{topic}: {have} partitions, should be {want}: samples would be lost or come out of order"
    )


def _same_stages(spec: PipelineSpec, plan: Plan) -> None:
    declared = [path for path in spec.placed() if _is_leaf(spec, path)]
    planned = list(dict.fromkeys(s.path for s in plan.stages if s.kind in ("stage", "part")))
    if declared != planned or spec.pipeline != plan.pipeline:
        raise ConfigError(
            f"the plan is of {plan.pipeline} ({', '.join(planned)}), "
            f"the file of {spec.pipeline} ({', '.join(declared)})",
            where=str(spec.path or ""),
            hint="build it again: streaminfer build PIPELINE",
        )


def _is_leaf(spec: PipelineSpec, path: str) -> bool:
    """Whether what is declared there has layers of its own."""
    return not any(other.startswith(f"{path}.") for other in spec.placed())
