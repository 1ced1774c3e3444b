"""An answer in time is what a quorum is bought for: waiting for the slowest is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streaminfer.errors import ConfigError
from streaminfer.planning.simulation.scenario import Arrivals, Scenario, SimStage
from streaminfer.planning.simulation.simulator import Report, simulate
from streaminfer.planning.simulation.whatif import what_if

DEADLINE = 0.100


def stage(name: str, seconds: float = 0.001, **more: Any) -> SimStage:
    return SimStage(name, {1: seconds}, batch_max=1, batch_wait=0.0, **more)


def ensemble(*members: float, **more: Any) -> Scenario:
    names = tuple(f"m{k}" for k in range(len(members)))
    parts = [
        stage(name, seconds, reads=("a",), topic="t")
        for name, seconds in zip(names, members, strict=True)
    ]
    join = stage("join", reads=names, **({"quorum": 2, "deadline": DEADLINE} | more))
    return Scenario([stage("a"), *parts, join], Arrivals(2.0), partitions=1, seconds=40.0, warm=4.0)


def run(*members: float, **more: Any) -> Report:
    return simulate(ensemble(*members, **more))


def test_one_slow_member_costs_the_deadline_and_not_its_own_time() -> None:
    slow = run(0.010, 0.010, 0.450)
    # the deadline runs from the first part: 1 ms before it, 10 ms of the members, 1 ms behind it
    assert slow.p50 == pytest.approx(0.001 + 0.010 + DEADLINE + 0.001, rel=0.02)
    assert slow.p99 == pytest.approx(slow.p50, rel=0.02)
    assert slow.partial == pytest.approx(1.0, abs=0.03)
    assert slow.failed == 0.0
    assert slow.throughput == pytest.approx(2.0, rel=0.03)
    assert slow.busy["m2"] == pytest.approx(0.9, abs=0.05)  # its work is done, for nothing
    all_of_them = run(0.010, 0.010, 0.450, quorum=None)
    assert all_of_them.p50 == pytest.approx(0.452, rel=0.02)
    assert all_of_them.partial == 0.0


def test_a_member_that_cannot_keep_up_does_not_hold_the_answers_up() -> None:
    report = run(0.010, 0.010, 2.0)
    assert report.throughput == pytest.approx(2.0, rel=0.03)
    assert not report.saturated
    assert report.p99 < DEADLINE + 0.02
    assert run(0.010, 0.010, 2.0, quorum=None).saturated


def test_nobody_waits_for_the_deadline_where_all_come() -> None:
    report = run(0.010, 0.020, 0.030)
    assert report.p99 == pytest.approx(0.032, rel=0.02)
    assert report.partial == 0.0


def test_too_few_by_the_deadline_are_errors_at_the_deadline() -> None:
    report = run(0.010, 0.400, 0.450)
    assert report.failed == pytest.approx(1.0, abs=0.03)
    assert report.partial == 0.0
    assert report.p50 == pytest.approx(0.001 + 0.010 + DEADLINE, rel=0.02)
    assert report.busy["join"] == 0.0
    one = simulate(what_if(ensemble(0.010, 0.400, 0.450), ["join.quorum=1"]))
    assert one.partial == pytest.approx(1.0, abs=0.03)


def test_what_waits_for_a_gather_is_whole_again_when_late_parts_have_come() -> None:
    report = run(0.010, 0.010, 0.450)
    queue = report.queues["join"]
    assert queue.samples_max <= 1.0 + 1e-9
    # two thirds of it wait for the deadline, twice a second
    assert queue.samples == pytest.approx(2 / 3 * DEADLINE * 2.0, rel=0.1)


def test_the_deadline_can_be_asked_about() -> None:
    longer = what_if(ensemble(0.010, 0.010, 0.450), ["join.deadline=300ms"])
    assert simulate(longer).p50 == pytest.approx(0.312, rel=0.02)
    plain = ensemble(0.010, 0.010, 0.450, quorum=None)
    with pytest.raises(ConfigError, match=r"join\.deadline"):
        what_if(plain, ["join.deadline=300ms"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"quorum": 4}, "4 of the 3"), ({"quorum": 0}, "0 of the 3"), ({"deadline": 0.0}, "0 s")],
)
def test_a_quorum_that_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(0.010, 0.010, 0.010, **wrong)


def test_a_whole_worker_of_a_fan_waits_for_all() -> None:
    scenario = ensemble(0.010, 0.010, 0.450)
    near = [scenario.stages[0], *(replace(s, local=True) for s in scenario.stages[1:])]
    assert simulate(replace(scenario, stages=near)).p50 == pytest.approx(0.452, rel=0.02)
