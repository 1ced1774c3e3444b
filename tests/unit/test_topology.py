"""Every worker reads what the one before it writes, and memory bounds what is between them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaminfer.errors import ConfigError, TopicError
from streaminfer.plan import Edge, Plan, Source, StagePlan, TensorSpec
from streaminfer.planning.source import source_key
from streaminfer.spec import PipelineSpec
from streaminfer.topics import diff, topic_specs, window
from streaminfer.topology import SINK, Topology, build
from streaminfer.transport import TopicInfo, TopicSpec

DIGEST = "0123456789abcdef" * 4
ROW = 64 * 1024 * 4  # bytes of a float32 sample at each cut below
OVERHEAD = 256  # bytes of a sample's header
ANSWERS = 60  # bytes of the top 5


def declare(names: str = "abc", **changes: Any) -> PipelineSpec:
    stages: list[dict[str, Any]] = [{"name": name, "until": f"layer-{name}"} for name in names]
    del stages[-1]["until"]
    data = {
        "pipeline": "toy",
        "model": {"factory": "toy.py:build", "example": [3, 8, 8]},
        "stages": stages,
    }
    return PipelineSpec.model_validate(data | changes)


def planned(spec: PipelineSpec, *, top_k: int = 5, row: int = 64 * 1024) -> Plan:
    between = TensorSpec(name="x", dtype="F32", shape=(None, row))
    logits = TensorSpec(name="y", dtype="F32", shape=(None, 1000))
    stages = [
        StagePlan(
            name=stage.name,
            path=stage.name,
            layers=("l",),
            inputs=(between,),
            outputs=(logits if stage is spec.stages[-1] else between,),
            sources=(Source(stage=before.name, tensors=("x",)),) if before else (),
            edge=Edge(dtype=spec.edge(stage.name).dtype),
        )
        for before, stage in zip((None, *spec.stages), spec.stages, strict=False)
    ]
    return Plan(
        pipeline=spec.pipeline,
        digest=DIGEST,
        source="s",
        model="m",
        model_version="1",
        input=spec.input,
        stages=tuple(stages),
        top_k=top_k,
    )


def laid_out(spec: PipelineSpec) -> Topology:
    return build(spec, planned(spec))


# ---- workers ---------------------------------------------------------------------------------


def test_the_road_from_images_to_predictions() -> None:
    topology = laid_out(declare())
    assert [(w.name, w.source, w.routes.outputs[0].topic) for w in topology.workers] == [
        ("a", "images", "si.toy.01234567.b"),
        ("b", "si.toy.01234567.b", "si.toy.01234567.c"),
        ("c", "si.toy.01234567.c", "si.toy.sink"),
        (SINK, "si.toy.sink", "predictions"),
    ]
    assert [w.group for w in topology.workers] == [
        "si.toy.ingest.01234567",
        "si.toy.01234567.b",
        "si.toy.01234567.c",
        "si.toy.sink",
    ]
    assert topology.inner_topics() == ("si.toy.01234567.b", "si.toy.01234567.c")
    assert topology.topics() == ("images", *topology.inner_topics(), "si.toy.sink", "predictions")


def test_another_plan_shares_the_sink_and_nothing_inside() -> None:
    spec = declare()
    one = build(spec, planned(spec))
    two = build(spec, planned(spec).model_copy(update={"digest": "f" * 64}))
    assert one.sink_topic == two.sink_topic
    assert one.worker(SINK).group == two.worker(SINK).group
    assert not set(one.inner_topics()) & set(two.inner_topics())
    assert one.worker("a").group != two.worker("a").group


def test_stages_on_local_edges_are_one_worker() -> None:
    spec = declare(
        "abcd",
        stages=[
            {"name": "a", "until": "x", "device": "cuda:0"},
            {"name": "b", "until": "y", "device": "cuda:1", "replicas": 2, "batch": {"max": 4}},
            {"name": "c", "until": "z", "device": "cuda:2", "replicas": 2},
            {"name": "d"},
        ],
        edges={"c": {"transport": "local"}},
    )
    topology = laid_out(spec)
    assert [w.stages for w in topology.workers] == [("a",), ("b", "c"), ("d",), ()]
    worker = topology.worker("c")
    assert worker is topology.worker("b")
    assert (worker.name, worker.replicas) == ("b", 2)
    assert [worker.device(stage, 1) for stage in ("b", "c")] == ["cuda:1", "cuda:2"]
    assert worker.batch.max == 4
    assert topology.inner_topics() == ("si.toy.01234567.b", "si.toy.01234567.d")


def replicated(**stage: Any) -> Topology:
    return laid_out(
        declare("ab", stages=[{"name": "a", "until": "x", "replicas": 3, **stage}, {"name": "b"}])
    )


def test_replicas_take_their_devices_and_shares_by_number() -> None:
    worker = replicated(device=["cuda:0", "cuda:1", "cpu"], shares=[2, 1, 0.5]).worker("a")
    assert [worker.device("a", k) for k in range(3)] == ["cuda:0", "cuda:1", "cpu"]
    assert [worker.share(k) for k in range(3)] == [2, 1, 0.5]
    assert worker.unlike
    for number in (-1, 3):
        with pytest.raises(ConfigError, match="numbered from 0 to 2"):
            worker.share(number)


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        ({}, 1),
        ({"device": ["cpu", "cpu", "cpu"]}, 1),
        ({"device": ["cuda:0", "cpu", "cpu"]}, None),
        ({"device": ["cuda:0", "cpu", "cpu"], "shares": "equal"}, 1),
        ({"shares": "measured"}, None),  # one device each, on machines that are not alike
    ],
)
def test_shares_are_measured_where_devices_are_unlike(
    stage: dict[str, Any], share: float | None
) -> None:
    """Equal shares would go at the pace of the slowest."""
    assert replicated(**stage).worker("a").share(2) == share


def test_a_worker_of_several_stages_is_unlike_if_one_of_its_devices_is() -> None:
    stages = [
        {"name": "a", "until": "x", "replicas": 2},
        {"name": "b", "replicas": 2, "device": ["cuda", "cpu"]},
    ]
    topology = laid_out(declare("ab", stages=stages, edges={"b": {"transport": "local"}}))
    assert topology.worker("a").share(0) is None
    assert topology.worker("b").device("b", 1) == "cpu"


def test_who_feeds_an_edge_that_balances_spreads_and_who_feeds_the_sink_never_does() -> None:
    """At the sink the partition is the origin's: elsewhere its samples wait for ever."""
    topology = laid_out(declare("abc", edges={"default": {"partitioning": "balance"}}))
    assert [w.balanced for w in topology.workers] == [False, True, True, False]
    assert [w.routes.outputs[0].balance for w in topology.workers] == [True, True, False, False]
    topology = laid_out(declare("abc", edges={"c": {"partitioning": "balance"}}))
    assert [w.routes.outputs[0].balance for w in topology.workers] == [False, True, False, False]


def test_balancing_is_outside_the_plan() -> None:
    """It changes no number: it may be switched on without building anew."""
    model = {"factory": "torchvision.models:resnet18", "example": [3, 8, 8]}
    one, two, other = (
        source_key(declare("ab", model=model, edges={"b": edge}))
        for edge in ({}, {"partitioning": "balance"}, {"dtype": "float16"})
    )
    assert one == two != other


def test_all_in_one_worker_has_no_inner_topic() -> None:
    for spec in (declare("a"), declare("abc", edges={"default": {"transport": "local"}})):
        topology = laid_out(spec)
        assert [w.name for w in topology.workers] == ["a", SINK]
        assert topology.inner_topics() == ()
        assert topology.worker("a").routes.outputs[0].topic == "si.toy.sink"


def test_prefix_and_topics_are_the_users() -> None:
    spec = declare(kafka={"prefix": "team.x"}, input={"topic": "in"}, output={"topic": "out"})
    assert laid_out(spec).topics() == (
        "in",
        "team.x.toy.01234567.b",
        "team.x.toy.01234567.c",
        "team.x.toy.sink",
        "out",
    )


def test_an_unknown_worker_is_answered_with_the_nearest() -> None:
    topology = laid_out(declare(stages=[{"name": "stem", "until": "x"}, {"name": "trunk"}]))
    with pytest.raises(ConfigError, match="did you mean trunk"):
        topology.worker("trunc")
    with pytest.raises(ConfigError, match="known are: stem, trunk, sink"):
        topology.worker("zzz")


def test_a_plan_of_other_stages_is_not_run() -> None:
    spec = declare("abc")
    for other in (declare("ab"), declare("acb"), declare("abc", pipeline="other")):
        with pytest.raises(ConfigError, match="streaminfer build"):
            build(spec, planned(other))


@given(st.integers(1, 8), st.sets(st.integers(1, 7)))
def test_every_stage_is_run_once_and_no_topic_is_left_unread(n: int, local: set[int]) -> None:
    names = "abcdefgh"[:n]
    edges = {names[i]: {"transport": "local"} for i in local if i < n}
    topology = laid_out(declare(names, edges=edges))
    assert [stage for w in topology.workers for stage in w.stages] == list(names)
    sources = [w.source for w in topology.workers]
    assert [w.routes.outputs[0].topic for w in topology.workers] == [*sources[1:], "predictions"]
    assert len(set(sources)) == len(sources) == len({w.group for w in topology.workers})


# ---- topics ----------------------------------------------------------------------------------


def specs(spec: PipelineSpec, partitions: int = 8) -> tuple[TopicSpec, ...]:
    return topic_specs(laid_out(spec), spec, partitions)


def as_is(wanted: tuple[TopicSpec, ...]) -> dict[str, TopicInfo]:
    return {t.name: TopicInfo(t.partitions, {"flush.ms": "9", **t.config}) for t in wanted}


def test_unread_work_is_never_deleted_by_time_or_size() -> None:
    images, b, c, sink, predictions = specs(declare(), 3)
    assert {t.partitions for t in (images, b, c, sink, predictions)} == {3}
    for topic in (b, c, sink):
        assert topic.config["retention.ms"] == topic.config["retention.bytes"] == "-1"
        assert topic.config["cleanup.policy"] == "delete"
        assert topic.config["segment.bytes"] == str(64 << 20)
    assert "retention.ms" not in {**images.config, **predictions.config}


def test_topics_take_the_records_that_are_sent() -> None:
    images, b, *_ = specs(declare(input={"max_bytes": "2MB"}))
    assert int(images.config["max.message.bytes"]) == 2_000_000 + 64 * 1024
    assert int(b.config["max.message.bytes"]) > 1 << 20
    _, large, *_ = specs(declare(kafka={"max_record_bytes": "8MB"}))
    assert int(large.config["max.message.bytes"]) > 8_000_000


def test_topics_as_they_should_be_have_no_difference() -> None:
    wanted = specs(declare())
    assert diff(wanted, as_is(wanted)) == []


def test_missing_topics_are_to_be_made() -> None:
    wanted = specs(declare())
    found = diff(wanted, {})
    assert [d.wanted for d in found] == list(wanted)
    assert all(d.missing and d.fixable for d in found)
    assert str(found[0]) == "images: missing (8 partitions)"
    assert found[0].to_json()["partitions"] == {"found": None, "wanted": 8}


def test_a_config_that_differs_is_to_be_set_and_nothing_else() -> None:
    wanted = specs(declare())
    existing = as_is(wanted)
    name = wanted[1].name
    config = {**existing[name].config, "retention.ms": "604800000"}
    del config["retention.bytes"]
    existing[name] = TopicInfo(8, config)
    (found,) = diff(wanted, existing)
    assert found.fixable
    assert not found.missing
    assert found.wanted == TopicSpec(name, 8, {"retention.ms": "-1", "retention.bytes": "-1"})
    assert "retention.ms is 604800000, should be -1" in str(found)
    assert "retention.bytes is unset, should be -1" in str(found)
    assert json.loads(json.dumps(found.to_json())) == {
        "topic": name,
        "missing": False,
        "fixable": True,
        "partitions": {"found": 8, "wanted": 8},
        "config": {
            "retention.ms": {"found": "604800000", "wanted": "-1"},
            "retention.bytes": {"found": None, "wanted": "-1"},
        },
        "message": str(found),
    }


def test_a_limit_above_what_is_needed_is_left_alone() -> None:
    wanted = specs(declare())
    existing = as_is(wanted)
    existing["images"] = TopicInfo(8, {"max.message.bytes": "99000000"})
    assert diff(wanted, existing) == []
    existing["images"] = TopicInfo(8, {"max.message.bytes": "1048588"})
    (found,) = diff(wanted, existing)
    assert found.wanted.config == {"max.message.bytes": str(16_000_000 + 64 * 1024)}


@pytest.mark.parametrize("have", [4, 16])
def test_partitions_that_differ_cannot_be_mended(have: int) -> None:
    wanted = specs(declare())
    existing = as_is(wanted)
    existing["si.toy.sink"] = existing["si.toy.sink"]._replace(partitions=have)
    (found,) = diff(wanted, existing)
    assert not found.fixable
    assert not found.missing
    assert f"si.toy.sink: {have} partitions, should be 8" in str(found)
    with pytest.raises(TopicError, match=f"si.toy.sink: {have} partitions, should be 8"):
        laid_out(declare()).check(existing)


def test_predictions_may_have_more_partitions_but_not_fewer() -> None:
    wanted, topology = specs(declare()), laid_out(declare())
    existing = as_is(wanted)
    existing["predictions"] = TopicInfo(12, {})
    assert diff(wanted, existing) == []
    assert topology.check(existing) == 8
    existing["predictions"] = TopicInfo(4, {})  # where would partition 7's samples be answered?
    assert [d.fixable for d in diff(wanted, existing)] == [False]
    with pytest.raises(TopicError, match="predictions: 4 partitions, should be 8"):
        topology.check(existing)


def test_the_check_at_start_gives_the_partitions_or_names_what_is_missing() -> None:
    topology = laid_out(declare())
    existing = as_is(specs(declare(), 5))
    assert topology.check(existing) == 5
    del existing["si.toy.sink"], existing["images"]
    with pytest.raises(TopicError, match=r"missing: images, si\.toy\.sink\n.*topics apply"):
        topology.check(existing)


# ---- window ----------------------------------------------------------------------------------


def size(partitions: int = 8, *, top_k: int = 5, row: int = 64 * 1024, **changes: Any) -> int:
    spec = declare(**changes)
    return window(spec, planned(spec, top_k=top_k, row=row), partitions)


def test_the_window_is_what_memory_holds_on_the_widest_edge() -> None:
    assert size(memory="512MB") == 512_000_000 // (8 * (ROW + OVERHEAD))
    assert size(4, memory="512MB") == 512_000_000 // (4 * (ROW + OVERHEAD))
    half = size(memory="512MB", edges={"default": {"dtype": "float16"}})
    assert half == 512_000_000 // (8 * (ROW // 2 + OVERHEAD))
    one_narrow = size(memory="512MB", edges={"c": {"dtype": "float16"}})
    assert one_narrow == size(memory="512MB")


def test_a_local_edge_does_not_fill_a_topic() -> None:
    local = {"default": {"transport": "local"}}
    # what is left is the sink's edge: five answers, or a thousand raw outputs
    assert size(memory="10MB", edges=local) == 10_000_000 // (8 * (OVERHEAD + 60))
    assert size(memory="10MB", edges=local, top_k=0) == 10_000_000 // (8 * (OVERHEAD + 4000))


def test_the_window_has_a_floor_and_a_ceiling() -> None:
    assert size(row=1, memory="10GB") == 4096
    assert size(memory="10MB") == 16  # one micro-batch always fits
    assert size(memory="10MB", batch={"max": 8}) == 8


def test_a_window_that_memory_cannot_hold_is_refused_with_its_numbers() -> None:
    least = 16 * 8 * (ROW + OVERHEAD)
    assert size(memory=-(-least // 4)) == 16
    with pytest.raises(ConfigError) as caught:
        size(memory=least // 4 - 1)
    text = str(caught.value)
    for word in (
        "memory",
        "16 samples",
        "8 partitions",
        f"{ROW + OVERHEAD:,} bytes",
        "34 MB",
        "8 MB",
    ):
        assert word in text
    assert "batch.max" in caught.value.hint
    assert "float16" in caught.value.hint


@given(st.integers(1, 256), st.integers(1, 10**7), st.integers(10**6, 10**10), st.integers(1, 1024))
def test_what_is_in_flight_fits_the_memory_or_is_one_batch(
    partitions: int, row: int, memory: int, batch: int
) -> None:
    try:
        found = size(partitions, row=row, memory=memory, batch={"max": batch})
    except ConfigError:
        assert batch * partitions * (max(4 * row, ANSWERS) + OVERHEAD) > 4 * memory
        return
    assert found >= batch
    assert found == batch or found * partitions * 4 * row <= memory
