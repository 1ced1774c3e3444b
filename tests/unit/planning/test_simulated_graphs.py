"""A plan is a graph: a prediction that takes it for a line is wrong by the parts it forgot."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streaminfer.errors import ConfigError
from streaminfer.planning.simulation.scenario import Arrivals, Host, Link, Scenario, SimStage
from streaminfer.planning.simulation.simulator import Report, simulate
from streaminfer.planning.simulation.tally import Batch, Lane
from streaminfer.planning.simulation.whatif import what_if


def stage(name: str, seconds: float = 0.001, **more: Any) -> SimStage:
    return SimStage(name, {1: seconds}, batch_max=1, batch_wait=0.0, **more)


def scenario(*stages: SimStage, rate: float | None = 20.0, **more: Any) -> Scenario:
    options: dict[str, Any] = {"partitions": 1, "seconds": 20.0, "warm": 4.0} | more
    load = options.pop("load", Arrivals(rate))
    return Scenario(stages, load, **options)


def run(*stages: SimStage, **more: Any) -> Report:
    return simulate(scenario(*stages, **more))


def fan(**more: Any) -> list[SimStage]:
    parts = [stage(f"p{k}", 0.010, reads=("a",), **more) for k in range(4)]
    return [stage("a"), *parts, stage("join", reads=("p0", "p1", "p2", "p3"))]


def test_parts_that_read_one_topic_are_sent_it_once() -> None:
    slow = Link(beta=1e-8)
    once = run(*fan(topic="t", bytes_in=(1e6,)), link=slow)
    each = run(*fan(bytes_in=(1e6,)), link=slow)
    assert once.p50 == pytest.approx(0.001 + 0.010 + 0.010 + 0.001, rel=0.01)
    assert each.p50 == pytest.approx(once.p50 + 3 * 0.010, rel=0.01)


def test_a_fan_within_one_worker_pays_no_hop() -> None:
    far = run(*fan(), link=Link(alpha=0.050))
    near = [stage("a"), *(replace(s, local=True) for s in fan()[1:])]
    report = run(*near, link=Link(alpha=0.050))
    client = 2 * 0.050  # to the input topic and from the predictions
    assert far.p50 == pytest.approx(client + 0.012 + 3 * 0.050, rel=0.01)
    assert report.p50 == pytest.approx(client + 0.012 + 0.050, rel=0.01)
    assert all(report.busy[f"p{k}"] == pytest.approx(0.2, abs=0.02) for k in range(4))


def test_a_gather_can_be_in_the_worker_of_what_follows() -> None:
    a, *parts, join = fan()
    report = run(a, *parts, join, stage("head", 0.020, local=True), link=Link(alpha=0.050))
    assert report.p50 == pytest.approx(0.012 + 0.020 + (3 + 2) * 0.050, rel=0.01)  # 2: the client's


def test_each_message_of_a_graph_is_a_hop() -> None:
    line = scenario(stage("a"), stage("b"), stage("c", local=True))
    assert line.hops() == 2  # a → b, c → sink
    # four parts read what is sent once, and send one message each; the gather sends one
    assert scenario(*fan(topic="t")).hops() == (1 + 4) / 2 + 4 + 1
    assert scenario(*fan()).hops() == 4 + 4 + 1


def test_who_leaves_at_an_exit_costs_the_rest_nothing() -> None:
    road = stage("front", leaves=0.75), stage("back", 0.030)
    report = run(*road, rate=40.0)
    assert report.throughput == pytest.approx(40.0, rel=0.03)
    assert report.busy["front"] == pytest.approx(0.04, abs=0.005)
    assert report.busy["back"] == pytest.approx(0.3, abs=0.06)  # 1.2 if all went on
    # one in four is 31 ms late; in a partition's order, none overtakes it
    assert report.p50 < 0.020 < report.p99
    assert report.bottleneck == "back"
    easy = what_if(scenario(*road, rate=40.0), ["front.exit=0.99"])
    assert easy.bottleneck() == "front"
    assert simulate(easy).busy["back"] < 0.05


def test_an_exit_within_a_worker_answers_with_the_rest() -> None:
    road = stage("front", leaves=0.5), stage("back", 0.030, local=True)
    report = run(*road, rate=10.0, link=Link(alpha=0.010))
    assert report.throughput == pytest.approx(10.0, rel=0.03)
    assert report.busy["back"] == pytest.approx(0.15, abs=0.05)


def test_micro_batches_that_came_apart_are_answered_in_order() -> None:
    lane = Lane(0)
    first, second = Batch(0, 0, [1.0, 2.0, 3.0]), Batch(0, 1, [4.0])
    assert lane.in_turn(second) == []
    (one,) = lane.in_turn(first.some([0, 2]))
    assert one.sent == [1.0]
    rest = lane.in_turn(first.some([1]))
    assert [time for batch in rest for time in batch.sent] == [2.0, 3.0, 4.0]
    assert not lane.pieces and not lane.held


def test_balance_gives_a_hot_key_to_all_replicas() -> None:
    hot: dict[str, Any] = {"partitions": 3, "load": Arrivals(150.0, skew=6.0)}
    slow = stage("b", 0.010, speeds=(1.0, 1.0, 1.0))
    kept = run(stage("a"), slow, **hot)
    spread = run(stage("a"), replace(slow, balance=True), **hot)
    assert kept.saturated
    assert spread.throughput == pytest.approx(150.0, rel=0.03)
    assert spread.busy["b"] == pytest.approx(0.5, abs=0.05)


def test_shares_that_are_not_the_speeds_make_one_replica_late() -> None:
    closed: dict[str, Any] = {"rate": None, "load": Arrivals(window=64), "partitions": 12}
    even = stage("b", 0.010, speeds=(1.0, 1.0))
    right = run(stage("a"), even, **closed)
    wrong = run(stage("a"), replace(even, shares=(3.0, 1.0)), **closed)
    assert right.throughput == pytest.approx(200.0, rel=0.05)
    assert wrong.throughput == pytest.approx(100.0 / 0.75, rel=0.08)


def test_a_gather_costs_the_loop_a_message_for_each_part() -> None:
    # 8 messages read or written by others than the sink and the first: 4 parts, both ends
    host = Host(cores=8, hop=0.002)
    report = run(*fan(topic="t"), host=host)
    line = run(stage("a"), stage("p", 0.010), stage("join"), host=host)
    assert report.host > 2 * line.host


def test_a_change_of_a_graph_reaches_all_that_it_concerns() -> None:
    whole = scenario(*fan(topic="t", bytes_in=(100.0,)), stage("head", local=True))
    both = what_if(whole, ["head.replicas=2"])
    assert [len(s.speeds) for s in both.stages] == [1, 1, 1, 1, 1, 2, 2]
    sized = scenario(stage("a", bytes_out=10.0), stage("b.0", bytes_in=(10.0,), reads=("a",)))
    assert what_if(sized, ["a.bytes=2x"]).stages[1].bytes_in == (20.0,)
    assert what_if(sized, ["b.0.seconds=3x"]).stages[1].seconds == {1: 0.003}
    for change in ("a.exit=1.5", "a.exit=often"):
        with pytest.raises(ConfigError, match=change):
            what_if(sized, [change])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (stage("join", reads=("p0", "a"), local=True), "not in one worker"),
        (stage("join", reads=("p0", "p1"), bytes_in=(1.0,)), "1 bytes_in for 2"),
        (stage("join", shares=(1.0, 2.0)), "2 shares for 1"),
        (stage("join", leaves=1.5), "1.5 of the rows"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(wrong: SimStage, words: str) -> None:
    a, p0, p1, *_ = fan()
    with pytest.raises(ConfigError, match=words):
        run(a, p0, p1, wrong)
