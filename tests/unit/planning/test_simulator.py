"""A prediction that breaks the laws of queues sends its reader to buy the wrong devices."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.errors import ConfigError
from streaminfer.planning.simulation.device import HELD
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Host,
    Link,
    Report,
    Scenario,
    SimStage,
    cost_per_million,
    simulate,
)
from streaminfer.planning.simulation.whatif import keys, what_if, with_replicas


def stage(name: str = "a", seconds: float = 0.010, **more: Any) -> SimStage:
    """A stage that computes samples one by one, `seconds` each, unless `batch_max` says more."""
    options = {"batch_max": 1, "batch_wait": 0.0} | more
    most = options["batch_max"]
    return SimStage(
        name, {1: seconds, most: seconds * most} if most > 1 else {1: seconds}, **options
    )


def run(*stages: SimStage, rate: float | None = None, **more: Any) -> Report:
    load = {
        key: more.pop(key) for key in ("window_loop", "pattern", "skew", "burst") if key in more
    }
    arrivals = Arrivals(rate, load.pop("window_loop", None), **load)
    options = {"partitions": 1, "seconds": 20.0, "warm": 4.0} | more
    return simulate(Scenario(stages, arrivals, **options))


# ---- laws of queues ----------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_random_arrivals_wait_as_long_as_the_pollaczek_khinchine_formula_says(load: float) -> None:
    seconds = 0.010
    report = run(
        stage(seconds=seconds), rate=load / seconds, pattern="poisson", seconds=600.0, warm=20.0
    )
    wait = load * seconds / (2 * (1 - load))  # M/D/1
    assert report.mean == pytest.approx(seconds + wait, rel=0.06)


def test_without_chance_nobody_waits() -> None:
    report = run(stage(seconds=0.010), rate=50.0)
    assert report.p50 == pytest.approx(0.010, rel=1e-6)
    assert report.p99 == pytest.approx(0.010, rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(
    rate=st.floats(20, 400),
    seconds=st.floats(0.0005, 0.004),
    most=st.sampled_from([1, 4, 16]),
    partitions=st.integers(1, 6),
    stages=st.integers(1, 3),
)
def test_littles_law_and_the_utilisation_law(
    rate: float, seconds: float, most: int, partitions: int, stages: int
) -> None:
    if rate * seconds > 0.8:
        rate = 0.8 / seconds
    road = [stage(f"s{k}", seconds, batch_max=most, batch_wait=0.004) for k in range(stages)]
    report = run(*road, rate=rate, pattern="poisson", partitions=partitions)
    # samples in the pipeline are their rate, times their time in it; the ends of the span blur both
    assert report.inflight == pytest.approx(report.throughput * report.mean, rel=0.06)
    for busy in report.busy.values():
        assert busy == pytest.approx(report.throughput * seconds, rel=0.06)


def test_a_saturated_stage_gives_its_capacity_and_is_named() -> None:
    fast, slow = stage("fast", 0.002, batch_max=8), stage("slow", 0.005, batch_max=8)
    report = run(fast, slow, stage("last", 0.001, batch_max=8), window_loop=200)
    assert report.throughput == pytest.approx(slow.capacity(), rel=0.02)
    assert report.busy["slow"] > 0.98
    assert report.busy["fast"] == pytest.approx(0.4, abs=0.03)
    assert report.bottleneck == "slow"
    assert max(report.queues, key=lambda name: report.queues[name].samples) == "slow"


def test_more_than_the_capacity_is_said_to_be_too_much() -> None:
    report = run(stage(seconds=0.010), rate=150.0)
    assert report.saturated
    assert report.throughput == pytest.approx(100.0, rel=0.02)
    assert not run(stage(seconds=0.010), rate=90.0).saturated
    # few random arrivals are not the nominal rate: no reason to warn
    for seed in range(20):
        assert not run(stage(), rate=40.0, pattern="poisson", seconds=5.0, seed=seed).saturated


def test_replicas_share_by_speed() -> None:
    one = run(stage(batch_max=4), window_loop=256, partitions=12)
    two = run(stage(batch_max=4, speeds=(1.0, 1.0)), window_loop=256, partitions=12)
    mixed = run(stage(batch_max=4, speeds=(2.0, 1.0)), window_loop=256, partitions=12)
    assert two.throughput == pytest.approx(2 * one.throughput, rel=0.03)
    assert mixed.throughput == pytest.approx(3 * one.throughput, rel=0.05)


# ---- the engine's rules ------------------------------------------------------------------------


@pytest.mark.parametrize("window", [8, 32, 100])
def test_the_window_bounds_what_is_in_flight(window: int) -> None:
    quick, slow = stage("quick", 0.0001, batch_max=8), stage("slow", 0.02, batch_max=8)
    report = run(quick, slow, rate=1000.0, partitions=3, window=window)
    assert report.queues["slow"].samples_max <= 3 * window
    assert report.saturated


def test_a_tight_window_costs_throughput_as_the_commits_come_late() -> None:
    wide = run(stage(batch_max=8, seconds=0.001), window_loop=512, window=4096)
    tight = run(stage(batch_max=8, seconds=0.001), window_loop=512, window=16)
    assert tight.throughput < 0.5 * wide.throughput


def test_a_lone_sample_waits_for_company_and_no_longer() -> None:
    report = run(stage(seconds=0.001, batch_max=8, batch_wait=0.1), rate=2.0)
    # once at ingest, once before the device
    assert report.p50 == pytest.approx(0.2 + 0.001, rel=0.01)


def test_batches_merge_up_to_the_largest_and_never_above() -> None:
    # a call costs the same whatever its size: only merging can carry the load
    flat = SimStage("flat", {1: 0.010, 8: 0.010}, batch_max=8, batch_wait=0.004)
    first = stage("first", 0.0001, batch_max=2, batch_wait=0.004)
    report = run(first, flat, rate=700.0)
    assert report.throughput == pytest.approx(700.0, rel=0.02)
    over = run(first, flat, rate=1000.0)
    assert over.throughput == pytest.approx(800.0, rel=0.02)


def test_the_client_is_a_hop_away_at_both_ends() -> None:
    near = run(stage("a"), rate=20.0)
    far = run(stage("a"), rate=20.0, link=Link(alpha=0.050))
    assert far.p50 == pytest.approx(near.p50 + 3 * 0.050)  # stage and sink are two workers
    assert far.inflight == pytest.approx(near.inflight + 20.0 * 3 * 0.050, rel=0.02)
    assert far.busy["a"] == pytest.approx(near.busy["a"], rel=0.01)


def test_a_local_stage_pays_no_hop() -> None:
    link = Link(alpha=0.050)
    near = run(stage("a"), stage("b", local=True), rate=20.0, link=link)
    far = run(stage("a"), stage("b"), rate=20.0, link=link)
    assert far.p50 - near.p50 == pytest.approx(0.050, rel=0.01)
    assert near.p50 == pytest.approx(0.020 + 3 * 0.050, rel=0.01)  # two are the client's


def test_bytes_take_their_time_on_the_link() -> None:
    slow = run(stage("a", bytes_out=1e6), stage("b"), rate=20.0, link=Link(beta=1e-8))
    assert slow.p50 == pytest.approx(0.020 + 0.010, rel=0.01)
    full = run(
        stage("a", 0.001, bytes_out=1e6), stage("b", 0.001), window_loop=64, link=Link(beta=1e-8)
    )
    assert full.throughput == pytest.approx(100.0, rel=0.03)


def test_a_gather_waits_for_all_its_parts() -> None:
    a = stage("a", 0.001)
    short, long = stage("short", 0.002, reads=("a",)), stage("long", 0.030, reads=("a",))
    join = stage("join", 0.001, reads=("short", "long"))
    report = run(a, short, long, join, rate=10.0)
    assert report.p50 == pytest.approx(0.001 + 0.030 + 0.001, rel=0.01)
    # two ends: the sink gathers
    ends = run(a, short, long, rate=10.0)
    assert ends.p50 == pytest.approx(0.001 + 0.030, rel=0.01)


def test_order_per_partition_makes_quick_ones_wait_for_slow_ones() -> None:
    # the skewed partition's samples are answered in their order: none overtakes within it
    report = run(
        stage(batch_max=4, speeds=(1.0, 1.0, 1.0)), rate=150.0, partitions=6, skew=1.0,
        pattern="poisson",
    )  # fmt: skip
    even = run(
        stage(batch_max=4, speeds=(1.0, 1.0, 1.0)), rate=150.0, partitions=6, pattern="poisson"
    )
    assert report.p99 > even.p99


def test_bursts_wait_longer_than_an_even_stream() -> None:
    even = run(stage(batch_max=4), rate=60.0)
    burst = run(stage(batch_max=4), rate=60.0, pattern="burst", burst=30)
    assert burst.p99 > 4 * even.p99
    assert burst.throughput == pytest.approx(even.throughput, rel=0.05)


# ---- what is shared ----------------------------------------------------------------------------


def test_two_stages_on_one_core_are_no_faster_than_one() -> None:
    road = [stage("a", batch_max=4), stage("b", batch_max=4)]
    one = run(*road, window_loop=64, host=Host(cores=1))
    two = run(*road, window_loop=64, host=Host(cores=2))
    assert one.throughput == pytest.approx(50.0, rel=0.03)
    assert two.throughput == pytest.approx(100.0, rel=0.03)


def test_an_event_loop_that_all_share_bounds_the_rate() -> None:
    quick = stage(seconds=0.0001, batch_max=16)
    report = run(quick, window_loop=256, host=Host(cores=4, answer=0.001))
    assert report.throughput == pytest.approx(1000.0, rel=0.03)
    assert report.host > 0.97


def test_the_interpreters_lock_bounds_all_threads_together() -> None:
    road = [stage(name, takes=0.010 / HELD) for name in ("a", "b")]
    locked = run(*road, window_loop=64, host=Host(cores=4))
    assert locked.throughput == pytest.approx(50.0, rel=0.03)


def test_a_device_waits_at_its_next_operator_while_the_loop_works() -> None:
    """A call of 100 ms: the loop is at work for two thirds of the time."""
    host = Host(cores=4, answer=0.010)
    load: dict[str, Any] = {"window_loop": 32, "host": host}
    free = run(stage("a", 0.0125, batch_max=8), **load)
    fine = run(stage("a", 0.0125, batch_max=8, takes=1000), **load)
    coarse = run(stage("a", 0.0125, batch_max=8, takes=2), **load)
    assert free.throughput == pytest.approx(80.0, rel=0.03)
    assert free.throughput >= coarse.throughput > 1.2 * fine.throughput
    assert fine.throughput == pytest.approx(8 / (0.1 + 8 * host.answer), rel=0.1)


def test_a_loop_takes_longer_to_begin_again_and_an_idle_device_to_compute() -> None:
    load: dict[str, Any] = {"rate": 5.0, "seconds": 20.0}
    host = Host(answer=0.001, cores=2)
    quick = run(stage("a", batch_wait=0.0), host=host, **load)
    slow = run(stage("a", batch_wait=0.0), host=replace(host, wake=0.002), **load)
    cold = run(stage("a", batch_wait=0.0, warming={1: 0.005}), host=host, **load)
    wakes = quick.wakes / 5.0  # of a sample
    assert 1.0 <= wakes <= 8.0
    assert slow.p50 > quick.p50 + 0.002
    assert slow.host - quick.host == pytest.approx(quick.wakes * 0.002, rel=0.1)
    assert cold.p50 == pytest.approx(quick.p50 + 0.005, rel=0.05)
    busy = run(stage("a", warming={1: 0.005}), window_loop=64, host=host)
    never = run(stage("a"), window_loop=64, host=host)  # dice say where threads wake, in both
    assert busy.throughput == pytest.approx(never.throughput, rel=0.005)


def test_calls_take_longer_and_shorter_as_they_were_measured() -> None:
    even = run(stage("a"), rate=50.0)
    noisy = run(stage("a", noise=(0.5, 1.0, 1.0, 1.5)), rate=50.0)
    assert noisy.p99 > even.p99 + 0.003
    assert noisy.busy["a"] == pytest.approx(even.busy["a"], rel=0.05)


def test_devices_that_compute_at_once_share_caches() -> None:
    road = [stage(name, beside=1.25) for name in ("a", "b")]
    shared = run(*road, window_loop=64, host=Host(cores=2))
    assert shared.throughput == pytest.approx(100 / 1.25, rel=0.03)
    alone = run(stage("a", beside=1.25), window_loop=64, host=Host(cores=2))
    assert alone.throughput == pytest.approx(100.0, rel=0.03)


# ---- the same again, and far larger ------------------------------------------------------------


def test_a_seed_decides_everything() -> None:
    road = [stage("a", 0.004, batch_max=8), stage("b", 0.003, batch_max=8, speeds=(1.0, 0.5))]
    options: dict[str, Any] = {"rate": 150.0, "pattern": "poisson", "partitions": 4}
    host = Host.reference(2.0)
    first = run(*road, **options, host=host, seed=3)
    assert first == run(*road, **options, host=host, seed=3)
    assert first != run(*road, **options, host=host, seed=4)


def test_a_thousand_devices_and_a_million_images_a_second_take_seconds() -> None:
    most = 64
    road = [
        SimStage(
            f"s{k}",
            {1: 0.004, most: 0.0128},
            (1.0,) * 250,
            most,
            0.03,
            bytes_out=1e5,
            device="gpu",
        )
        for k in range(4)
    ]
    scenario = Scenario(
        road, Arrivals(1e6), Link(0.002, 1e-10), partitions=500, seconds=0.4, warm=0.25,
        prices={"gpu": 3.6},
    )  # fmt: skip
    began = time.process_time()
    report = simulate(scenario)
    assert time.process_time() - began < 60
    assert report.throughput == pytest.approx(1e6, rel=0.05)
    assert 0.5 < report.utilisation < 1
    assert report.cost == pytest.approx(1000 * 3.6 / 3600 / report.throughput * 1e6)


# ---- changes, and what is refused --------------------------------------------------------------


SCENARIO = Scenario(
    [stage("stem", batch_max=8), stage("trunk", 0.02, batch_max=8)], Arrivals(rate=20.0)
)


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("trunk.seconds=0.5x", lambda s: s.stages[1].seconds[1] == 0.01),
        ("trunk.seconds=4ms", lambda s: s.stages[1].seconds == {8: 0.004}),
        ("trunk.replicas=3", lambda s: s.stages[1].speeds == (1.0, 1.0, 1.0)),
        ("stem.batch.max=32", lambda s: s.stages[0].batch_max == 32 and s.stages[1].batch_max == 8),
        ("batch.max=2x", lambda s: [t.batch_max for t in s.stages] == [16, 16]),
        ("link.alpha=2ms", lambda s: s.link.alpha == 0.002),
        ("link.beta=100MB/s", lambda s: math.isclose(s.link.beta, 1e-8)),
        ("host.cores=8", lambda s: s.host.cores == 8),
        ("rate=2x", lambda s: s.arrivals.rate == 40.0),
        ("concurrency=64", lambda s: s.arrivals.window == 64 and s.arrivals.rate is None),
        ("window=128", lambda s: s.window == 128),
    ],
)
def test_a_change_changes_that_number(change: str, read: Any) -> None:
    assert read(what_if(SCENARIO, [change]))
    assert SCENARIO.stages[1].seconds[1] == 0.02


def test_every_key_can_be_changed() -> None:
    values = {"rate": "5", "link.beta": "1GB/s", "host.cores": "2"}
    for key in keys(SCENARIO):
        if key.endswith(".edge"):  # needs a profile: test_simulated_edges
            continue
        assert what_if(SCENARIO, [f"{key}={values.get(key, '1')}"]) != SCENARIO or key in (
            "stem.speed", "stem.replicas", "trunk.speed", "trunk.replicas", "stem.threads",
            "trunk.threads", "burst", "sinks",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("trunc.seconds=2x", ["trunc.seconds", "trunk.seconds"]),
        ("link.alfa=2ms", ["link.alfa", "link.alpha"]),
        ("link.alpha", ["link.alpha", "KEY=VALUE"]),
        ("link.alpha=soon", ["link.alpha=soon", "duration"]),
        ("trunk.replicas=0", ["trunk.replicas=0", "1 or more"]),
        ("rate=fast", ["rate=fast"]),
        ("concurrency=2x", ["nothing to multiply"]),
    ],
)
def test_a_change_that_is_none_is_refused_with_the_nearest_name(
    change: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        what_if(SCENARIO, [change])
    assert all(word in str(caught.value) for word in words), caught.value


def test_replicas_are_given_by_stage() -> None:
    changed = with_replicas(SCENARIO, "trunk=4, stem=2")
    assert [len(s.speeds) for s in changed.stages] == [2, 4]
    for text, word in (("trnk=2", "trunk"), ("trunk=0", "1 or more"), ("trunk", "1 or more")):
        with pytest.raises(ConfigError, match=word):
            with_replicas(SCENARIO, text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": Arrivals(rate=0.0)}, "rate is 0"),
        ({"arrivals": Arrivals(rate=-3.0)}, "rate is -3"),
        ({"arrivals": Arrivals(rate=math.nan)}, "rate is nan"),
        ({"arrivals": Arrivals()}, "a rate or a window"),
        ({"arrivals": Arrivals(window=0)}, "0 samples"),
        ({"stages": []}, "no stage"),
        ({"stages": [stage(), stage()]}, "two stages are called 'a'"),
        ({"stages": [stage(speeds=())]}, "no replicas"),
        ({"stages": [stage(speeds=(0.0,))]}, "speed 0"),
        ({"stages": [SimStage("a", {})]}, "how long stage 'a' takes"),
        ({"stages": [SimStage("a", {1: -1.0})]}, "below 0"),
        ({"stages": [stage("a"), stage("b", reads=("c",))]}, "'b' reads 'c'"),
        ({"stages": [stage("a", local=True)]}, "local"),
        ({"warm": 30.0}, "warm up"),
        ({"partitions": 0}, "at least 1"),
        ({"host": Host(cores=0)}, "0 cores"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        simulate(replace(SCENARIO, **changes))


def test_times_between_known_batches_are_interpolated() -> None:
    table = SimStage("a", {1: 0.002, 4: 0.005, 8: 0.009}, batch_max=16).table()
    assert table[2] == pytest.approx(0.003)
    assert table[6] == pytest.approx(0.007)
    assert table[16] == pytest.approx(0.017)
    assert SimStage("a", {2: 0.004}, batch_max=8).table()[8] == pytest.approx(0.016)


def test_cost_needs_every_price() -> None:
    road = [stage("a", device="cpu"), stage("b", device="gpu", speeds=(1.0, 1.0))]
    assert cost_per_million(road, 100.0, {"cpu": 0.1, "gpu": 1.0}) == pytest.approx(2.1 / 0.36)
    assert cost_per_million(road, 100.0, {"cpu": 0.1}) is None
    assert cost_per_million(road, 0.0, {"cpu": 0.1, "gpu": 1.0}) is None


def test_a_run_without_answers_is_no_crash_and_valid_json() -> None:
    report = run(stage(seconds=60.0), rate=1.0)
    assert report.throughput == 0
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["p99"] is None
    assert report.saturated
