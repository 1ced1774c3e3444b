"""Fans as topics: a part that nobody runs, or is fed twice or not at all, loses every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from torch import Tensor, nn

from streaminfer.errors import ConfigError
from streaminfer.plan import Plan, StagePlan
from streaminfer.planning.lower import Draft, lower
from streaminfer.spec import PipelineSpec
from streaminfer.topics import window
from streaminfer.topology import SINK, Topology, WorkerSpec, build
from tests.plans import MODEL, declare, pipelines, planned


def homes(topology: Topology) -> dict[str, WorkerSpec]:
    """Return who runs each stage of the plan."""
    return {stage: worker for worker in topology.workers for stage in worker.stages}


def feeders(topology: Topology, topic: str) -> list[WorkerSpec]:
    return [w for w in topology.workers for r in w.routes.outputs if r.topic == topic]


def assert_run_once(plan: Plan, topology: Topology) -> None:
    *workers, sink = topology.workers
    run = Counter(stage for worker in workers for stage in worker.stages)
    assert run == Counter(stage.name for stage in plan.stages)
    assert (sink.name, sink.stages) == (SINK, ())
    assert len({w.group for w in topology.workers}) == len(topology.workers)
    assert len({w.name for w in topology.workers}) == len(topology.workers)


def assert_fed(plan: Plan, topology: Topology, taker: StagePlan) -> None:
    """Everything that a stage takes reaches it, once."""
    home = homes(topology)
    here = home[taker.name]
    if not taker.sources:
        assert here.source == topology.input_topic
        return
    for source in taker.sources:
        there = home[source.stage]
        if there is here:
            assert here.stages.index(source.stage) < here.stages.index(taker.name)
            continue
        assert here.stages[0] == taker.name, "only a worker's first stage reads a topic"
        assert there.stages[-1] == source.stage, "only what its last stage gives leaves a worker"
        (route,) = [r for r in there.routes.outputs if r.topic == here.source]
        every = {tensor.name for tensor in plan.stage(source.stage).outputs}
        assert set(source.tensors) <= (set(route.tensors) or every)
        if len(taker.sources) > 1:
            assert not route.balance, "the parts of a sample would not meet"
            assert there.routes.sender == source.stage, "its gather would take it for a stranger"


def assert_nothing_strange(plan: Plan, topology: Topology) -> None:
    """No topic has a reader that waits for another's work, or a writer whose work is unread."""
    read = {w.source for w in topology.workers}
    assert topology.workers[0].source == topology.input_topic
    for worker in topology.workers[1:-1]:
        first = plan.stage(worker.stages[0])
        sources = {homes(topology)[source.stage].name for source in first.sources}
        assert {w.name for w in feeders(topology, worker.source)} == sources
        assert worker.gathers == (len(first.sources) > 1)
        others = {w.group for w in topology.workers if w.source == worker.source} - {worker.group}
        assert set(worker.sharers) == others
        assert worker.balanced == any(
            route.balance
            for w in topology.workers
            for route in w.routes.outputs
            if route.topic == worker.source
        )
    for worker in topology.workers[:-1]:
        topics = [route.topic for route in worker.routes.outputs]
        assert len(set(topics)) == len(topics)
        assert set(topics) <= read
    assert [w.stages[-1] for w in feeders(topology, topology.sink_topic)] == [plan.stages[-1].name]
    apart = [topology.input_topic, topology.sink_topic, topology.output_topic]
    assert len({*apart, *topology.inner_topics()}) == 3 + len(topology.inner_topics())


def assert_failures_are_heard(plan: Plan, topology: Topology, worker: WorkerSpec) -> None:
    """A sample that fails inside a fan is its gather's to speak for; else it ends twice or late."""
    first = plan.stage(worker.stages[0])
    for name in worker.stages:
        around = plan.stage(name).gather
        while around in worker.stages:
            around = plan.stage(around).gather
        assert around == first.gather, f"{name} fails to another than {first.name}"
    if not first.gather:
        assert worker.routes.outcomes == topology.sink_topic
        return
    gather = homes(topology)[first.gather]
    assert gather.stages[0] == first.gather
    assert worker.routes.outcomes == gather.source
    assert worker.routes.voice in {s.stage for s in plan.stage(first.gather).sources}
    assert worker.routes.voice in behind(plan, first.name)


def behind(plan: Plan, name: str) -> set[str]:
    """Return a stage and all that follow it."""
    found = {name}
    for stage in plan.stages:
        if any(source.stage in found for source in stage.sources):
            found.add(stage.name)
    return found


@settings(deadline=None, max_examples=150)
@given(pipelines())
def test_any_plan_has_its_workers_and_its_topics(case: tuple[PipelineSpec, Plan]) -> None:
    spec, plan = case
    topology = build(spec, plan)
    assert_run_once(plan, topology)
    for stage in plan.stages:
        assert_fed(plan, topology, stage)
    assert_nothing_strange(plan, topology)
    for worker in topology.workers[:-1]:
        assert_failures_are_heard(plan, topology, worker)
    assert window(spec, plan, 4) >= spec.batch.max


def split(name: str, parts: int = 2) -> dict[str, object]:
    return {"name": name, "split": {"by": "channels", "parts": parts}}


def ensemble(*branches: str | dict[str, object]) -> dict[str, object]:
    inner = [{"stages": [b]} if isinstance(b, dict) else {} for b in branches]
    named = [{"name": n, "model": MODEL, **more} for n, more in zip("pqr", inner, strict=False)]
    return {"name": "vote", "branches": named}


def roads(topology: Topology) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return what each worker runs, and the short names of what it reads and feeds."""
    short = [(w, w.source, [r.topic for r in w.routes.outputs]) for w in topology.workers[:-1]]
    return {
        " ".join(w.stages): (last(source), tuple(last(t) for t in outputs))
        for w, source, outputs in short
    }


def last(topic: str) -> str:
    return topic.removeprefix("si.toy.").removeprefix("01234567.")


def test_parts_that_take_the_same_read_one_topic() -> None:
    spec = declare([{"name": "stem"}, split("trunk"), {"name": "head"}])
    assert roads(build(spec, planned(spec))) == {
        "stem": ("images", ("trunk",)),
        "trunk.0": ("trunk", ("trunk.gather",)),
        "trunk.1": ("trunk", ("trunk.gather",)),
        "trunk.gather head": ("trunk.gather", ("sink",)),
    }
    assert roads(build(spec, planned(spec, ["trunk"]))) == {
        "stem trunk.scatter": ("images", ("trunk.0", "trunk.1")),
        "trunk.0": ("trunk.0", ("trunk.gather",)),
        "trunk.1": ("trunk.1", ("trunk.gather",)),
        "trunk.gather head": ("trunk.gather", ("sink",)),
    }


def test_an_ensemble_behind_a_split_has_the_parts_joined_for_all_its_branches() -> None:
    spec = declare([split("trunk"), ensemble("p", split("q"))])
    assert roads(build(spec, planned(spec, ["vote.q.q"]))) == {
        "trunk.scatter": ("images", ("trunk",)),
        "trunk.0": ("trunk", ("trunk.gather",)),
        "trunk.1": ("trunk", ("trunk.gather",)),
        "trunk.gather": ("trunk.gather", ("vote",)),
        "vote.p": ("vote", ("vote.gather",)),
        "vote.q.q.scatter": ("vote", ("vote.q.q.0", "vote.q.q.1")),
        "vote.q.q.0": ("vote.q.q.0", ("vote.q.q.gather",)),
        "vote.q.q.1": ("vote.q.q.1", ("vote.q.q.gather",)),
        "vote.q.q.gather": ("vote.q.q.gather", ("vote.gather",)),
        "vote.gather": ("vote.gather", ("sink",)),
    }


def test_all_that_is_side_by_side_is_in_flight_together() -> None:
    """A window of one part alone would fill the memory several times over."""
    row, memory = 1 << 16, 64_000_000

    def size(*stages: dict[str, object], slicing: tuple[str, ...] = ()) -> int:
        spec = declare(stages, memory=memory)
        return window(spec, planned(spec, slicing, row), 1)

    one = size({"name": "a"}, {"name": "b"}, {"name": "c"})
    shared = size({"name": "a"}, split("b"), {"name": "c"})
    assert one == memory // (4 * row + 256)
    assert shared == memory // (3 * 4 * row + 256), "once into the parts, twice behind them"
    sliced = size({"name": "a"}, split("b", 3), {"name": "c"}, slicing=("b",))
    assert sliced == memory // (6 * 4 * row + 256)
    nested = size(ensemble("p", split("q", 4)), slicing=("vote.q.q",))
    assert nested == memory // (11 * 4 * row + 256), "a branch's own parts count with the others"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("trunk", "did you mean trunk"), ("trunk.2", "did you mean trunk"), ("haed", "mean head")],
)
def test_a_worker_s_name_that_is_none_is_answered_with_the_nearest(name: str, hint: str) -> None:
    """Containers are named by hand."""
    spec = declare([{"name": "stem"}, split("trunk"), {"name": "head"}])
    topology = build(spec, planned(spec))
    with pytest.raises(ConfigError, match=hint) as caught:
        topology.worker(name)
    assert repr(name) in str(caught.value)
    assert topology.worker("trunk.0").stages == ("trunk.0",)
    assert topology.worker("trunk.gather") is topology.worker("head")


class Convolutions(nn.Module):
    """Three layers; each takes what the others give."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


INNER = {"form": "in"}


@pytest.mark.parametrize(
    ("stages", "slicing"),
    [
        ([{"name": "a"}, split("b"), {"name": "c"}], ()),
        ([split("a"), split("b"), {"name": "c"}], ()),
        ([{"name": "a"}, {"name": "c", "split": {"by": "channels", "parts": 2, **INNER}}], ("c",)),
        ([split("a"), ensemble("p", split("c"))], ()),
        (
            [ensemble({"name": "c", "split": {"by": "channels", "parts": 2, **INNER}}, "q")],
            ("vote.p.c",),
        ),
    ],
)
@pytest.mark.parametrize("edge", [{}, {"transport": "local"}, {"dtype": "float16"}])
def test_plans_made_up_here_are_laid_out_as_a_build_does(
    stages: list[dict[str, object]], slicing: tuple[str, ...], edge: dict[str, str]
) -> None:
    """Else what is proven above is proven of nothing that runs."""
    model = {"factory": "toy.py:build", "example": [8, 4, 4]}
    for stage in stages:
        for branch in stage.get("branches", ()):  # type: ignore[attr-defined]
            branch["model"] = model
    spec = declare(
        stages, edges={"default": edge}, input={"decode": "tensor"},
        **({} if "branches" in stages[0] else {"model": model}),
    )  # fmt: skip
    names = [stage.until or "last" for stage in spec.stages if not stage.branches] or ["last"]
    found = lower(spec, lambda _: Convolutions(names))
    made = planned(spec, slicing)

    def laid_out(drafts: Sequence[Draft | StagePlan]) -> list[tuple[object, ...]]:
        return [
            (c.name, c.path, c.kind, c.part, c.gather, c.edge, [s.stage for s in c.sources])
            for c in drafts
        ]

    assert laid_out(found) == laid_out(made.stages)
