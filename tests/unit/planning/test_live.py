"""Live advice that is wrong costs a restart and a device; none when it is due costs the same."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from streaminfer.errors import ConfigError
from streaminfer.metrics import Metrics
from streaminfer.planning.advice import Advice, Layer, advise
from streaminfer.planning.live import CellRate, Live, Look, Place, between

PLACES = [
    Place("stem", "stem", "stem", 1, layers=("l0", "l1")),
    Place("trunk", "trunk", "trunk", 1, layers=("l2", "l3")),
    Place("head", "head", "head", 1, layers=("l4",)),
]
LAYERS = [Layer(name, 0.001) for name in ("l0", "l1", "l2", "l3", "")]


def live(*seconds: float, samples: float = 1000.0, span: float = 10.0, **more: Any) -> Live:
    """Return a measurement in which each cell computed for so many seconds."""
    names = [place.name for place in more.pop("places", PLACES)]
    cells = {
        name: CellRate(samples, samples / 4, s, queue=3.0)
        for name, s in zip(names, seconds, strict=True)
    }
    return replace(Live(span, samples, 0.0, 0.0, cells), **more)


def said(*halves: Live, **more: Any) -> Advice:
    return advise(halves, more.pop("places", PLACES), **more)


def test_what_limits_is_found_and_a_replica_of_it_advised() -> None:
    advice = said(live(2.0, 9.5, 2.0), live(2.1, 9.4, 2.0))
    assert advice.verdict == "change"
    assert advice.bottleneck == "trunk"
    assert advice.busy == pytest.approx(0.945)
    assert advice.capacity == pytest.approx(2000 / 18.9)
    assert advice.change is not None
    assert {advice.change.kind, *(other.kind for other in advice.others)} == {"replica", "whole"}
    replica = next(c for c in (advice.change, *advice.others) if c.kind == "replica")
    assert (replica.stage, replica.replicas) == ("trunk", 2)
    assert replica.gain == pytest.approx(1.0)  # two of them; the next limit is far away
    assert any("streaminfer profile" in note for note in advice.notes)
    assert json.loads(json.dumps(advice.to_json(), allow_nan=False))["verdict"] == "change"


def test_a_pipeline_that_idles_is_left_as_it_is() -> None:
    advice = said(live(1.0, 4.0, 1.0), live(1.0, 4.0, 1.0))
    assert advice.verdict == "leave"
    assert advice.change is None
    assert "40%" in advice.why
    assert "250.0" in advice.why  # what it can carry


@pytest.mark.parametrize(("worth", "verdict"), [(0.05, "change"), (0.15, "leave")])
def test_a_gain_that_is_not_worth_it_is_not_advised(worth: float, verdict: str) -> None:
    # the next stage is 10 % faster: more of the slowest brings no more than that
    even = live(9.0, 9.9, 9.0)
    advice = said(even, even, worth=worth)
    assert advice.verdict == verdict
    best = advice.change or advice.others[0]
    assert best.gain == pytest.approx(0.1, abs=0.01)


def test_what_only_one_half_says_is_not_advised() -> None:
    advice = said(live(9.0, 9.5, 9.0), live(2.0, 9.5, 2.0), worth=0.5)
    assert advice.verdict == "leave"
    assert "not in all of the measurement" in advice.why


@pytest.mark.parametrize("samples", [0.0, 20.0, 99.0])
def test_few_samples_say_nothing(samples: float) -> None:
    half = live(2.0, 9.5, 2.0, samples=samples)
    advice = said(half, half)
    assert advice.verdict == "measure longer"
    assert f"{2 * samples:,.0f} samples" in advice.why
    json.dumps(advice.to_json(), allow_nan=False)


def test_a_lag_that_grows_while_devices_idle_is_not_a_devices_fault() -> None:
    half = live(1.0, 4.0, 1.0, growth=300.0)
    advice = said(half, half)
    assert advice.verdict == "leave"
    assert "event loop" in advice.why


def test_no_replica_helps_where_the_cores_are_the_limit() -> None:
    half = live(6.0, 9.5, 4.0)
    apart, together = said(half, half), said(half, half, cores=2.0)
    assert apart.verdict == "change"
    assert together.verdict == "leave"
    assert any("2 cores" in note for note in together.notes)


def test_decoders_need_cores_but_do_not_make_a_device_busy() -> None:
    half = live(6.0, 9.5, 3.0)
    cells = {**half.cells, "stem": replace(half.cells["stem"], beside=6.0)}
    advice = said(replace(half, cells=cells), replace(half, cells=cells), cores=2.0)
    assert advice.bottleneck == "trunk"
    assert advice.busy == pytest.approx(0.95)
    assert advice.capacity == pytest.approx(2 * 1000 / 24.5)  # of two cores; devices alone: 2000/19
    assert any("2.5 of 2 cores" in note for note in advice.notes)


def test_decoders_that_limit_are_named() -> None:
    half = live(3.0, 4.0, 1.0, growth=500.0)
    cells = {**half.cells, "stem": replace(half.cells["stem"], beside=9.6)}
    advice = said(replace(half, cells=cells), replace(half, cells=cells))
    assert advice.verdict == "leave"
    assert "trunk is the slowest and works 40%" in advice.why
    assert "event loop of stem 96%" in advice.why


def test_with_a_profile_a_cut_is_moved_to_even_the_stages() -> None:
    # trunk's two layers take 4 + 4: one of them to the stem makes 1 + 1 + 4 and 4
    half = live(2.0, 8.0, 2.0)
    places = [p._replace(worker="one") if p.name != "head" else p for p in PLACES]
    advice = said(half, half, layers=LAYERS, places=PLACES)
    changes = [c for c in (advice.change, *advice.others) if c is not None]
    cut = max((c for c in changes if c.kind == "cut"), key=lambda c: c.gain)
    assert (cut.stage, cut.until) in {("stem", "l2"), ("trunk", "l2")}
    assert cut.gain == pytest.approx(8 / 6 - 1)
    assert not advice.notes
    assert said(half, half, layers=LAYERS, places=places).verdict == "change"


def test_a_better_cut_comes_before_one_more_device() -> None:
    """Else a user buys a device where moving a layer would have done."""
    places = [
        Place("a", "a", "a", 1, layers=("l0",)),
        Place("b", "b", "b", 1, layers=("l9",)),
    ]
    ten = [Layer(name, 0.001) for name in (*(f"l{k}" for k in range(9)), "")]
    half = live(1.0, 9.0, places=places)
    fine = said(half, half, places=places, layers=ten)
    assert fine.change is not None
    assert (fine.change.kind, fine.change.until) == ("cut", "l4")
    assert fine.change.gain == pytest.approx(9 / 5 - 1)
    assert max(c.gain for c in fine.others) == pytest.approx(1.0)  # of one more device
    # where no cut comes near, the device it is
    coarse = [Layer("l0", 0.001), Layer("l1", 0.002), Layer("", 0.007)]
    rough = said(half, half, places=places, layers=coarse)
    assert rough.change is not None
    assert rough.change.kind != "cut"


def test_a_fan_gets_a_replica_of_each_part_and_no_cut() -> None:
    places = [
        Place("stem", "stem", "stem", 1, layers=("l0",)),
        Place("trunk.0", "trunk", "trunk.0", 1, plain=False),
        Place("trunk.1", "trunk", "trunk.1", 1, plain=False),
        Place("trunk.gather", "head", "head", 1, plain=False),
        Place("head", "head", "head", 1, layers=("l4",)),
    ]
    half = live(2.0, 9.5, 9.4, 0.5, 2.0, places=places)
    advice = said(half, half, places=places, layers=LAYERS)
    assert advice.change is not None
    assert (advice.change.kind, advice.change.stage) == ("replica", "trunk")
    assert advice.change.gain > 0.9  # both parts, not only the slowest
    assert not advice.others
    alone = [*places[:3], Place("trunk.gather", "trunk", "join", 1, plain=False, fixed=True)]
    slow = live(2.0, 3.0, 3.0, 9.5, places=alone)
    assert said(slow, slow, places=alone).verdict == "leave"  # it cannot have a second one


def test_rows_that_left_at_an_exit_do_not_count_for_what_follows() -> None:
    half = live(8.0, 3.0, 3.0)
    few = {**half.cells, "trunk": replace(half.cells["trunk"], samples=300.0)}
    places = [PLACES[0]._replace(plain=False), *PLACES[1:]]  # as those with an exit are
    advice = said(replace(half, cells=few), replace(half, cells=few), places=places)
    assert advice.bottleneck == "stem"
    assert advice.capacity == pytest.approx(125.0)


def test_rows_that_still_wait_are_not_rows_that_left() -> None:
    """Else a stage that falls behind looks quick, and the wrong one is relieved."""
    half = live(8.0, 4.0, 1.0)
    few = {**half.cells, "trunk": replace(half.cells["trunk"], samples=300.0)}
    advice = said(replace(half, cells=few), replace(half, cells=few))
    assert advice.bottleneck == "trunk"
    assert advice.capacity == pytest.approx(300 / 4)


def test_halves_that_prefer_neighbouring_cuts_agree() -> None:
    places = [Place("a", "a", "a", 1, layers=("l0",)), Place("b", "b", "b", 1, layers=("end",))]
    many = [Layer(name, 0.001) for name in (*(f"l{k}" for k in range(59)), "")]
    one, other = live(1.0, 9.0, places=places), live(1.2, 8.8, places=places)
    advice = said(one, other, places=places, layers=many, worth=0.3)
    assert advice.change is not None
    assert advice.change.kind == "cut"


# ---- looks ---------------------------------------------------------------------------------------


def metrics(times: int, pipeline: str = "p", names: tuple[str, ...] = ("stem", "head")) -> Metrics:
    made = Metrics(pipeline)
    for name in (*names, "sink"):
        stage = made.stage(name)
        for _ in range(times):
            stage.batches.inc()
            stage.batch_size.observe(4)
            stage.compute_time.observe(0.5)
            stage.codec_time["decode"].observe(0.125)
            stage.codec_time["encode"].observe(0.125)
            stage.busy["decode"].inc(0.125 + 0.75)  # as much again by the decoders
            stage.busy["produce"].inc(9.0)  # waiting for the broker is nobody's work
            stage.samples["ok"].inc(4)
            stage.sent_bytes.inc(100)
        stage.queue.set(7)
        stage.lag("topic", 0, 5 * times, 0.0)
    return made


TWO = [Place("stem", "stem", "stem", 1), Place("head", "head", "head", 1)]


def look(at: float, *made: Metrics) -> Look:
    return Look(at, [reading for one in made for reading in one.readings()])


def test_two_looks_make_rates_and_replicas_are_summed() -> None:
    one, two = metrics(1), metrics(3)
    found = between(look(10.0, one, one), look(14.0, two, two), "p", TWO)
    assert found.span == 4.0
    assert found.answered == 2 * 2 * 4
    cell = found.cells["stem"]
    assert (cell.samples, cell.batches) == (16, 4)
    assert cell.seconds == pytest.approx(4 * 0.75)  # what the decoders did is not the device's
    assert cell.beside == pytest.approx(4 * 0.75)
    assert cell.each == pytest.approx(3.0 / 16)
    assert (cell.queue, cell.bytes_out) == (14, 400)
    assert (found.lag, found.growth) == (2 * 3 * 15, 2 * 3 * 10)
    assert math.isnan(CellRate(0, 0, 0, 0).each)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (metrics(2, names=("stem",)), "nobody measures head"),
        (metrics(2, pipeline="other"), "the metrics of other"),
        (metrics(0), "started anew"),
    ],
)
def test_metrics_that_are_not_of_these_workers_are_refused(after: Metrics, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        between(look(0.0, metrics(1)), look(5.0, after), "p", TWO)
