"""If these fail, a model with one layer too large is refused, or split where it need not be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.errors import ConfigError
from streaminfer.planning.planner import Answer, plan
from streaminfer.planning.predict import Candidate, How, PlacedStage
from streaminfer.planning.profile import DeviceProfile, Link, Profile
from streaminfer.planning.splitting.fans import Figures
from tests.unit.planning.profiles import FREE, made, request

ROW = 1000  # bytes, of every cut of a made profile


@dataclass
class Evenly:
    """Splits some stages evenly, but for what it costs; remembers what was asked."""

    profile: Profile
    legal: Collection[tuple[int, int]]
    dear: float = 1.1  # x an even share of the time
    gather_weights: int = 0
    images: bool = False
    timed: list[tuple[int, int, How]] = field(default_factory=list)

    def problem(self, first: int, last: int, how: How) -> str:
        return "" if (first, last) in self.legal else f"{first} to {last} has no channels"

    def figures(
        self, first: int, last: int, how: How, batch: int, device: DeviceProfile
    ) -> Figures:
        assert (first, last) in self.legal
        self.timed.append((first, last, how))
        weights = sum(node.weight_bytes for node in self.profile.nodes[first : last + 1])
        n = how.parts
        return Figures(
            whole=2.0,  # another day, another speed: shares count
            scatter=0.02,
            part=2.0 * self.dear / n,
            gather=0.02,
            takes=(ROW,) * n,
            gives=(ROW // n,) * n,
            shared=True,
            weights=weights // n,
            peak=0,
            gather_weights=self.gather_weights,
            gather_peak=0,
        )


def as_estimated(candidate: Candidate, *_: object) -> Candidate:
    """The search alone: its own figures, not simulated ones."""
    return candidate


def planned(
    profile: Profile, devices: int, legal: Collection[tuple[int, int]], **options: object
) -> tuple[Answer, Evenly]:
    known = {k: options.pop(k) for k in ("dear", "gather_weights") if k in options}
    splitter = Evenly(profile, legal, **known)  # type: ignore[arg-type]
    asked = request(profile, ("cpu",) * devices, **options)
    return plan(profile, replace(asked, splitter=splitter), as_estimated), splitter


def splits(candidate: Candidate) -> list[PlacedStage]:
    return [stage for stage in candidate.stages if stage.split]


def test_a_layer_that_fits_nowhere_is_split_over_devices() -> None:
    profile = made([10, 10, 10], weights=[1, 20, 1])
    answer, _ = planned(profile, 4, [(1, 1)], memory=12e6)
    best = answer.best
    assert best.form == "3 stages, trunk split by channels x2"
    assert [(s.until, len(s.devices)) for s in best.stages] == [("a", 1), ("b", 2), (None, 1)]
    (trunk,) = splits(best)
    assert trunk.memory == pytest.approx(10e6, rel=0.01)
    assert trunk.compute == pytest.approx(0.0055)
    assert trunk.replicas == 1
    assert best.throughput == pytest.approx(1 / 0.0101)  # the stem: 10 ms, and to scatter 1 %
    assert any("20.0 MB whole, a device allows 12.0 MB" in line for line in answer.why)


def test_as_many_parts_as_memory_asks_for() -> None:
    profile = made([10, 10, 10], weights=[1, 20, 1])
    answer, _ = planned(profile, 6, [(1, 1)], memory=6e6)
    assert answer.best.form == "3 stages, trunk split by channels x4"


def test_a_cut_that_fits_nowhere_is_no_end_either() -> None:
    """Three layers of 4 MB on two devices of 7 MB: no cut fits, all of them in two parts do."""
    profile = made([10, 10, 10], weights=[4, 4, 4])
    answer, _ = planned(profile, 2, [(0, 2)], memory=7e6)
    assert answer.best.form == "split by channels x2"
    (stage,) = answer.best.stages
    assert stage.split is not None
    assert stage.split.scatter > 0
    assert stage.split.gather > 0
    assert answer.best.travels == 2 * ROW


def test_what_fits_is_not_looked_at_for_splits() -> None:
    profile = made([10, 10, 10], weights=[1, 20, 1])
    answer, splitter = planned(profile, 4, [(1, 1)])
    assert answer.best.form == "replicate x4"
    assert splitter.timed == []


def test_few_splits_are_timed() -> None:
    profile = made([10] * 10, weights=[1, 1, 1, 20, 1, 1, 1, 1, 1, 1])
    every = {(a, b) for a in range(10) for b in range(a, 10)}
    answer, splitter = planned(profile, 6, every, memory=12e6)
    assert splits(answer.best)
    assert len(set(splitter.timed)) == len(splitter.timed) <= 24


def test_without_a_legal_split_the_reason_is_given() -> None:
    profile = made([1, 1, 1], weights=[1, 20, 1])
    with pytest.raises(ConfigError, match=r"layer 'b' alone needs 20\.0 MB") as error:
        planned(profile, 4, [], memory=5e6)
    assert "cannot be split by channels: 1 to 1 has no channels" in str(error.value)
    assert "15.0 MB too little" in str(error.value)


def test_how_many_devices_it_takes_is_said() -> None:
    profile = made([1, 1, 1], weights=[1, 20, 1])
    with pytest.raises(ConfigError) as error:
        planned(profile, 2, [(1, 1)], memory=12e6)
    assert "4 devices like these may do, with a stage split by channels x2" in str(error.value)


def test_what_does_not_fit_where_the_parts_are_joined_is_not_proposed() -> None:
    profile = made([10, 10, 10], weights=[1, 20, 8])
    fits, _ = planned(profile, 4, [(1, 1)], memory=12e6, gather_weights=3_000_000)
    assert fits.best.stages[-1].memory == pytest.approx(11e6, rel=0.01)
    with pytest.raises(ConfigError, match="no plan fits"):
        planned(profile, 4, [(1, 1)], memory=12e6, gather_weights=5_000_000)


def test_two_splits_in_a_row_have_a_worker_between_them() -> None:
    profile = made([10, 10, 10, 10], weights=[1, 20, 20, 1])
    answer, _ = planned(profile, 6, [(1, 1), (2, 2)], memory=12e6)
    first, second = splits(answer.best)
    assert first.split is not None
    assert second.split is not None
    assert first.split.gather > second.split.gather == 0.0
    assert second.split.scatter == 0.0  # the same worker sends on
    assert answer.best.travels == 4 * ROW  # to the first parts, from them, to the second, from them


def test_a_bound_on_latency_that_only_a_split_keeps() -> None:
    profile = made([10, 60, 10])
    with pytest.raises(ConfigError, match="the least predicted is") as error:
        planned(profile, 3, [], slo_p99=0.19)
    assert "split" not in str(error.value)
    answer, _ = planned(profile, 3, [(1, 1), (0, 2)], slo_p99=0.19)
    assert splits(answer.best)
    assert answer.best.p99 <= 0.19
    assert any("without a split no plan answers within 190.0 ms" in line for line in answer.why)
    with pytest.raises(ConfigError, match="the least predicted is"):
        planned(profile, 3, [(1, 1), (0, 2)], slo_p99=0.02)


def test_a_bound_that_costs_throughput_is_met_better_by_a_split() -> None:
    """Whole, only batch 1 answers in time; in parts batch 8 does, whose samples cost less."""
    profile = made([10, 60, 10], batches=(1, 8))
    device = profile.devices[0]
    eight = device.timings[1]
    cheap = eight.model_copy(
        update={"seconds": tuple(t / 6 for t in eight.seconds), "whole": eight.whole / 6}
    )
    devices = (device.model_copy(update={"timings": (device.timings[0], cheap)}),)
    profile = profile.model_copy(update={"devices": devices})
    plain, _ = planned(profile, 4, [], slo_p99=0.2)
    answer, _ = planned(profile, 4, [(0, 2)], slo_p99=0.2)
    assert plain.best.batch == 1
    assert answer.best.batch == 8
    assert splits(answer.best)
    assert answer.best.p99 <= 0.2
    assert answer.best.throughput >= 1.1 * plain.best.throughput


@pytest.mark.parametrize(("dear", "taken"), [(1.1, True), (1.45, False)])
def test_devices_left_over_share_a_stage_where_that_is_faster(dear: float, taken: bool) -> None:
    """Two layers, three devices, each with room for one: one device stands by, or all share."""
    profile = made([10, 10], weights=[10, 10])
    answer, splitter = planned(profile, 3, [(0, 1)], memory=12e6, dear=dear)
    assert splitter.timed
    assert bool(splits(answer.best)) == taken
    assert answer.best.throughput == pytest.approx(1 / (0.020 / 3 * dear) if taken else 100)


def test_the_hops_of_a_split_are_charged_to_who_makes_them() -> None:
    slow = Link(name="slow", alpha=0, per_byte=1e-6, source="made up")  # 1 ms for a row
    profile = made([10, 10, 10], weights=[1, 20, 1])
    free, _ = planned(profile, 4, [(1, 1)], memory=12e6, link=FREE)
    far, _ = planned(profile, 4, [(1, 1)], memory=12e6, link=slow)
    a, b = ([*splits(x.best), *x.best.stages] for x in (free, far))
    trunk, stem, _, head = b
    assert stem.send - a[1].send == pytest.approx(0.0005)  # one message that both parts read
    assert trunk.receive == pytest.approx(0.0005)
    assert trunk.send == pytest.approx(0.00025)
    assert head.receive - a[3].receive == pytest.approx(0.0005)  # a message of each part
    assert far.best.hop_bytes == (ROW, ROW)
    assert far.best.travels == 2 * ROW
    assert far.best.p50 > free.best.p50


def test_the_number_of_stages_is_kept() -> None:
    profile = made([10, 10, 10, 10], weights=[1, 20, 1, 1])
    answer, _ = planned(profile, 6, [(1, 1)], memory=12e6, stages=4)
    assert len(answer.best.stages) == 4
    assert splits(answer.best)


def test_unlike_devices_share_at_the_pace_of_the_slower() -> None:
    whole = made([10], weights=[20], devices=(("cuda:0", 4.0), ("cuda:1", 1.0)))
    mixed = request(whole, ("cuda:0",), ("cuda:3",), memory=12e6)
    both = plan(whole, replace(mixed, splitter=Evenly(whole, [(0, 0)])), as_estimated).best
    assert both.stages[0].devices == ("cuda:0", "cuda:3")
    assert both.stages[0].compute == pytest.approx(0.0055)


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=5),
    st.lists(st.integers(1, 20), min_size=5, max_size=5),
    st.integers(2, 5),
    st.sampled_from([6, 11, 16]),
)
def test_no_plan_is_much_better_than_the_one_that_is_found(
    ms: list[int], weights: list[int], devices: int, cap: int
) -> None:
    """By trying all cuts, and all ways to give each stage replicas or parts."""
    profile = made(ms, weights=weights[: len(ms)])
    every = {(a, b) for a in range(len(ms)) for b in range(a, len(ms))}
    least = min(bottlenecks(ms, weights, devices, cap, 1.1), default=None)
    try:
        answer, _ = planned(profile, devices, every, memory=cap * 1.001e6)
    except ConfigError:
        assert least is None
        return
    assert least is not None
    assert answer.best.throughput >= 0.85 * 1000 / least


def bottlenecks(
    ms: Sequence[int], weights: Sequence[int], devices: int, cap: float, dear: float
) -> Iterator[float]:
    """Yield the milliseconds of the slowest stage, of every plan that fits."""
    for k in range(len(ms)):
        for cuts in combinations(range(1, len(ms)), k):
            spans = list(pairwise([0, *cuts, len(ms)]))
            for counts in product(range(1, devices + 1), repeat=len(spans)):
                if sum(counts) <= devices:
                    stages = zip(spans, counts, strict=True)
                    yield from _slowest([_ways(ms, weights, *s, n, cap, dear) for s, n in stages])


def _slowest(ways: Sequence[Sequence[float]]) -> Iterator[float]:
    if all(ways):
        yield max(map(min, ways))


def _ways(
    ms: Sequence[int], weights: Sequence[int], a: int, b: int, n: int, cap: float, dear: float
) -> list[float]:
    """Return the period of a stage on n devices, on replicas and in parts, where it fits."""
    work, size = sum(ms[a:b]), sum(weights[a:b])
    whole = [work / n] if size <= cap else []
    return whole + ([work / n * dear] if n > 1 and size / n <= cap else [])
