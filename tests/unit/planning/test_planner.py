"""If these fail, `streaminfer plan` recommends the wrong thing, or says the wrong reason for it."""

from __future__ import annotations

import pytest

from streaminfer.errors import ConfigError
from streaminfer.planning.planner import Edge, plan
from streaminfer.planning.predict import Machine
from streaminfer.planning.profile import Link
from tests.unit.planning.profiles import made, request

TWO = ("cpu", "cpu")
COUNTED = 0.02  # a simulation counts whole micro-batches in a time


def test_do_not_split_what_fits() -> None:
    profile = made([10, 10, 10])
    answer = plan(profile, request(profile, TWO))
    assert answer.best.form == "replicate x2"
    assert answer.best.throughput == pytest.approx(2 / 0.030, rel=COUNTED)
    assert any("wins nothing" in line for line in answer.why)
    assert {c.form for c in answer.others} == {"2 stages", "one device"}


def test_one_device_is_always_among_the_candidates() -> None:
    profile = made([10, 10, 10])
    answer = plan(profile, request(profile, TWO, stages=2))
    one = next(c for c in answer.others if c.form == "one device")
    assert one.throughput == pytest.approx(1 / 0.030, rel=COUNTED)


def test_memory_forces_a_cut_and_is_named_as_the_reason() -> None:
    profile = made([10, 10, 10], weights=[3, 3, 3])
    answer = plan(profile, request(profile, TWO, memory=7e6))
    assert [s.until for s in answer.best.stages] in (["a", None], ["b", None])
    assert answer.best.throughput == pytest.approx(1 / 0.020, rel=COUNTED)
    assert any("does not fit" in line for line in answer.why)


def test_too_little_memory_says_by_how_much_and_for_which_layer() -> None:
    profile = made([1, 1, 1], weights=[1, 20, 1])
    with pytest.raises(ConfigError) as error:
        plan(profile, request(profile, TWO, memory=5e6))
    text = str(error.value)
    assert "--memory" in text
    assert "'b'" in text
    assert "16.0 MB too little" in text  # 20 and 1 together, of which 5 are allowed


def test_a_layer_that_fits_nowhere_alone_is_said_to_need_a_split() -> None:
    profile = made([1, 1, 1], weights=[1, 20, 1])
    with pytest.raises(
        ConfigError, match=r"layer 'b' alone needs 20\.0 MB .* 15\.0 MB too little"
    ) as e:
        plan(profile, request(profile, ("cpu", "cpu", "cpu"), memory=5e6))
    assert "split" in str(e.value)


def test_a_bound_on_latency_leaves_out_large_batches() -> None:
    profile = made([10, 10], batches=(1, 8))
    fast = plan(profile, request(profile, TWO, slo_p99=0.10))
    assert fast.best.p99 <= 0.10
    assert fast.best.batch == 1
    with pytest.raises(ConfigError, match="the least predicted is"):
        plan(profile, request(profile, TWO, slo_p99=0.001))


def test_more_stages_than_devices_is_refused_with_the_remedy() -> None:
    profile = made([1, 1, 1])
    with pytest.raises(ConfigError, match="3 stages need 3 devices; 2 are named"):
        plan(profile, request(profile, TWO, stages=3))


def test_a_batch_that_was_not_profiled_is_refused() -> None:
    profile = made([1, 1])
    with pytest.raises(ConfigError, match="profiled: 1"):
        plan(profile, request(profile, TWO, batch=4))


def test_slow_links_move_the_cut_to_where_less_crosses() -> None:
    profile = made([10, 2, 2, 10], row_bytes=[100_000, 1_000_000, 100_000])
    slow = Link(name="slow", alpha=0, per_byte=1e-7, source="made up")
    quick = plan(profile, request(profile, TWO, stages=2))
    far = plan(profile, request(profile, TWO, stages=2, link=slow))
    assert quick.best.stages[0].until == "b"
    assert far.best.stages[0].until in ("a", "c")


def test_a_cast_halves_what_is_charged_for_a_hop() -> None:
    profile = made([10, 10], row_bytes=[1_000_000])
    slow = Link(name="slow", alpha=0, per_byte=1e-8, source="made up")
    wide = plan(profile, request(profile, TWO, stages=2, link=slow))
    cast = plan(profile, request(profile, TWO, stages=2, link=slow, edge=Edge("float16")))
    assert wide.best.stages[0].send == pytest.approx(0.005)
    assert cast.best.stages[0].send == pytest.approx(0.0025)
    assert cast.best.hop_bytes == (500_000,)


def test_shared_cores_bound_what_more_workers_can_do() -> None:
    profile = made([10, 10])
    answer = plan(profile, request(profile, ("cpu",) * 4, machine=Machine(2)))
    assert answer.best.throughput == pytest.approx(2 / 0.020, rel=COUNTED)
    assert any("keep its 2 cores busy" in line for line in answer.why)


def test_stages_are_balanced_as_they_run_side_by_side() -> None:
    """Else the one that loses more to its neighbour's use of the caches holds up the other."""
    alone = made([10, 2, 2, 10])
    assert plan(alone, request(alone, TWO, stages=2)).best.stages[0].until == "b"
    (device,) = alone.devices
    (timing,) = device.timings
    slower = timing.model_copy(update={"beside": (0.010, 0.002, 0.002, 0.014)})
    near = alone.model_copy(update={"devices": (device.model_copy(update={"timings": (slower,)}),)})
    best = plan(near, request(near, TWO, stages=2)).best
    assert best.stages[0].until == "c"
    assert [stage.compute for stage in best.stages] == pytest.approx([0.014, 0.014])
    # a device without a neighbour is what it is
    single = plan(near, request(near, ("cpu",))).best
    assert single.stages[0].compute == pytest.approx(0.024)
    with_others = plan(near, request(near, TWO))
    one = next(c for c in (with_others.best, *with_others.others) if c.form == "one device")
    assert one.stages[0].compute == pytest.approx(0.024)


def test_unequal_devices_both_work_in_proportion_to_their_speed() -> None:
    profile = made([10, 10, 10, 10], devices=(("cpu", 1.0), ("cuda:0", 3.0)))
    answer = plan(profile, request(profile, ("cpu",), ("cuda:0",), stages=2))
    stages = {stage.devices: stage for stage in answer.best.stages}
    assert stages[("cuda:0",)].compute == pytest.approx(0.010)
    assert stages[("cpu",)].compute == pytest.approx(0.010)
    both = plan(profile, request(profile, ("cpu",), ("cuda:0",)))
    # 25 and 75, by replicas or by stages
    assert both.best.throughput == pytest.approx(100, rel=COUNTED)
