"""If these fail, `plan` says one thing of a pipeline and `simulate` another: which one is right?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from streaminfer.commands.engine import apart, measure_engine
from streaminfer.commands.records import Input, inputs_of
from streaminfer.commands.simulate import Ask, scenario_of
from streaminfer.commands.trial import Unanswered, drive, patiently
from streaminfer.errors import StreaminferError
from streaminfer.plan import stage_files
from streaminfer.planning.calls import call_times
from streaminfer.planning.forecast import busy_of, forecast, loaded, scenario
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import Edge, Request, plan
from streaminfer.planning.predict import LOAD, Calls, Candidate, Machine
from streaminfer.planning.profile import Profile
from streaminfer.planning.profiler import Place, capture_model, profile
from streaminfer.planning.simulation.measured import takes
from streaminfer.planning.simulation.simulator import Arrivals, Host, Scenario, StageTimes, simulate
from streaminfer.planning.source import ensure
from streaminfer.planning.subject import Subject, subject
from streaminfer.spec import PipelineSpec
from streaminfer.spec.file import load
from tests import virtual
from tests.unit.planning.profiles import made, request

pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = Path(__file__).resolve().parents[3] / "stages"
TWO = ("cpu", "cpu")
HOST = Host.reference(2.0)
NODE = 20e-6  # seconds of a node and row
PASSES = (1.1, 1.2, 1.5)  # times that, after a pause
BESIDE = 1.25  # times that, while another device computes
CALLS = Calls({1: 1e-4, 16: 4e-4}, {1: 2e-4, 16: 8e-4}, {1: 1.5e-4, 16: 6e-4})
AFTER = Calls(
    {b: 1.5 * t for b, t in CALLS.each.items()},
    {b: 1.5 * t for b, t in CALLS.first.items()},
    {b: 1.5 * t for b, t in CALLS.last.items()},
)


@pytest.fixture(scope="module")
def known() -> Subject:
    return subject(str(STAGES / "digits" / "pipeline.yaml"))


@pytest.fixture(scope="module")
def measured(known: Subject) -> Profile:
    """The digits model's real layers and cuts, with times that are round."""
    found = profile(capture_model(known.spec), [Place(("cpu",), "test", 1)], cached=False)
    (device,) = found.devices

    def nodes(each: float) -> tuple[float, ...]:
        return (each,) * len(found.nodes)

    timings = tuple(
        one.model_copy(
            update={
                "seconds": nodes(NODE * one.batch),
                "single": tuple(nodes(by * NODE * one.batch) for by in PASSES),
                "beside": nodes(BESIDE * NODE * one.batch),
            }
        )
        for one in device.timings
    )
    return found.model_copy(update={"devices": (device.model_copy(update={"timings": timings}),)})


def asked(known: Subject, found: Profile, **more: object) -> Request:
    spec = known.spec
    machine = Machine(
        2,
        spec.batch.wait,
        host=HOST,
        calls=CALLS,
        after=AFTER,
        partitions=spec.kafka.partitions,
        memory=spec.memory,
        top_k=spec.output.top_k,
    )
    return request(found, TWO, machine=machine, **more)


def by_file(
    known: Subject, candidate: Candidate, found: Profile, edges: dict[int, Edge], folder: Path
) -> tuple[PipelineSpec, object]:
    """Return the spec of a candidate's file, and the scenario that `simulate` makes of it."""
    file = folder / "planned.yaml"
    file.write_text(pipeline_file(known, candidate, edges, (), folder.resolve()))
    spec = load(file)
    built = ensure(spec, folder / "plan")
    sizes = [n for n in found.batches() if n <= candidate.batch]
    times = {}
    for k, stage in enumerate(candidate.stages):
        graph, _ = stage_files(folder / "plan", stage.name)
        nodes = len(json.loads(graph.read_text())["nodes"])
        times[stage.name] = by_hand(nodes, sizes, not k, k + 1 == len(candidate.stages))
    return spec, scenario_of(spec, built, times, HOST, Ask(seconds=10.0))


def by_hand(nodes: int, sizes: Sequence[int], begins: bool, ends: bool) -> StageTimes:
    """Return what `simulate` would measure where a node takes NODE and its calls take CALLS."""
    glue = {n: CALLS.seconds(n, begins, ends) for n in sizes}
    own = {n: nodes * NODE * n for n in sizes}
    cold = {n: 1.2 * own[n] + 1.5 * glue[n] for n in sizes}
    most = max(sizes)
    return StageTimes(
        {n: own[n] + glue[n] for n in sizes},
        cold=cold,
        takes=takes(1, first=begins, last=ends),  # one script
        noise=tuple((by * own[n] + 1.5 * glue[n]) / cold[n] for n in sizes for by in PASSES),
        beside=(BESIDE * own[most] + glue[most]) / (own[most] + glue[most]),
    )


def test_a_gpu_takes_the_lock_for_every_operator(measured: Profile) -> None:
    timings, machine = measured.devices[0].timings, Machine(2, host=HOST, calls=CALLS)
    nodes = len(timings[-1].seconds)
    scripted = call_times(timings, machine, ends=True).takes
    assert call_times(timings, machine, ends=True, scripted=False).takes == scripted + nodes - 1


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_candidate_is_the_scenario_that_its_file_is(
    known: Subject, measured: Profile, stages: int, tmp_path: Path
) -> None:
    names = ("cpu",) * max(2, stages)
    wanted = replace(asked(known, measured, stages=stages), batch=16)
    pool = replace(wanted.pools[0], names=names)
    wanted = replace(wanted, pools=(pool,))
    best = plan(measured, wanted).best
    _, theirs = by_file(known, best, measured, {}, tmp_path)
    ours = scenario(best, measured, wanted)
    assert len(ours.stages) == stages
    for mine, its in zip(ours.stages, theirs.stages, strict=True):  # type: ignore[attr-defined]
        assert mine.table() == pytest.approx(its.table())
        assert mine.warming_table() == pytest.approx(its.warming_table())
        assert mine.noise == pytest.approx(its.noise)
        assert mine.beside == pytest.approx(its.beside)
        assert mine.takes >= 3
        for key in (
            "name", "speeds", "batch_max", "batch_wait", "bytes_out", "threads", "shares",
            "device", "local", "balance", "leaves", "overhead", "takes",
        ):  # fmt: skip
            assert getattr(mine, key) == getattr(its, key), key
    for key in ("link", "host", "partitions", "window", "sinks", "arrivals"):
        assert getattr(ours, key) == getattr(theirs, key), key
    report = simulate(theirs)  # type: ignore[arg-type]
    assert best.throughput == pytest.approx(report.throughput, rel=0.10)
    for name, busy in best.busy().items():
        assert busy == pytest.approx(report.busy[name], rel=0.10)
    again = simulate(loaded(theirs, LOAD * best.throughput))  # type: ignore[arg-type]
    assert best.p50 == pytest.approx(again.p50, rel=0.10)
    assert best.p99 == pytest.approx(again.p99, rel=0.20)


def test_a_cast_edge_weighs_as_much_as_in_its_file(
    known: Subject, measured: Profile, tmp_path: Path
) -> None:
    wanted = replace(asked(known, measured, stages=2, edge=Edge("float16")), batch=16)
    best = plan(measured, wanted).best
    edges = {best.stages[0].last: Edge("float16")}
    _, theirs = by_file(known, best, measured, edges, tmp_path)
    ours = scenario(best, measured, wanted).stages[0].bytes_out
    assert ours == theirs.stages[0].bytes_out  # type: ignore[attr-defined]


def test_a_tiny_model_is_as_fast_as_the_engine_around_it() -> None:
    """Else a plan promises four times what comes out."""
    profile = made([0.01, 0.01], batches=(1, 16))
    free = plan(profile, request(profile, TWO, batch=16)).best
    best = plan(profile, request(profile, TWO, batch=16, machine=Machine(2, host=HOST))).best
    most = 16 / HOST.loop_seconds(16, 1, 1, 1)
    assert most / 2 < best.throughput <= 1.1 * most < free.throughput / 5
    assert best.limit == "event loop"


def test_what_a_device_does_around_the_layers_counts_once_per_call() -> None:
    calls = Calls({1: 0.010, 4: 0.010}, {1: 0.012, 4: 0.018}, {1: 0.011, 4: 0.011})
    assert calls.seconds(1) == pytest.approx(0.010)
    assert calls.seconds(2, begins=True, ends=True) == pytest.approx(0.010 + 0.004 + 0.001)
    profile = made([10, 10])
    machine = Machine(64, calls=calls)
    wanted = request(profile, TWO, stages=2, machine=machine)
    best = plan(profile, wanted).best
    first, last = scenario(best, profile, wanted).stages
    assert first.seconds == {1: pytest.approx(0.022)}
    assert last.seconds == {1: pytest.approx(0.021)}
    assert best.throughput == pytest.approx(1 / 0.022, rel=0.03)


def test_processes_of_one_machine_share_its_cores() -> None:
    """Through a broker each worker has its own event loop, but no cores of its own."""
    profile = made([10, 10])
    many = request(profile, ("cpu",) * 4, machine=Machine(2, host=apart(HOST)))
    best = plan(profile, many).best
    assert best.throughput == pytest.approx(2 / 0.020, rel=0.05)
    assert best.limit == "cores"


def test_only_a_p99_that_is_simulated_is_within_the_bound() -> None:
    profile = made([2, 2], batches=(1, 4, 16))
    loose = plan(profile, request(profile, TWO, machine=Machine(2, host=HOST))).best
    bound = 0.6 * loose.p99
    tight = plan(profile, request(profile, TWO, machine=Machine(2, host=HOST), slo_p99=bound)).best
    assert tight.p99 <= bound < loose.p99
    assert tight.batch < loose.batch
    again = forecast(tight, profile, request(profile, TWO, machine=Machine(2, host=HOST)))
    assert again.p99 == tight.p99  # the same candidate, the same figures


def test_the_parts_of_a_split_stage_are_one_stage() -> None:
    profile = made([10, 10])
    best = plan(profile, request(profile, TWO, stages=2)).best
    cells = {"stem.0": 0.2, "stem.1": 0.4, "stem.gather": 0.9, "head": 0.5}
    assert busy_of(best, cells) == {"stem": pytest.approx(0.3), "head": 0.5}


def test_the_engine_is_measured_without_the_model(known: Subject) -> None:
    found = virtual.run(measure_engine(known.spec, (1, 8), outputs=10, top_k=3, cores=64.0))
    one, three = (found.host.loop_seconds(8, 1, n, n) for n in (1, 3))
    assert 0 < one < three
    assert found.host.decode > 0
    assert set(found.calls.each) == {1, 8}
    assert found.calls.seconds(8, begins=True, ends=True) > found.calls.seconds(8) > 0


def test_a_trial_whose_inputs_are_refused_is_no_measurement(
    known: Subject, measured: Profile, tmp_path: Path
) -> None:
    best = plan(measured, asked(known, measured, stages=1)).best
    file = tmp_path / "planned.yaml"
    file.write_text(pipeline_file(known, best, {}, (), tmp_path.resolve()))
    spec = load(file)
    built = ensure(spec, tmp_path / "plan")
    calm = loaded(scenario(best, measured, asked(known, measured)), 50.0)
    short = replace(calm, seconds=1.0, warm=0.1)
    fine = virtual.run(
        drive(spec, built, tmp_path / "plan", short, inputs_of(spec, built), strict=True)
    )
    assert fine.throughput == pytest.approx(50, rel=0.3)
    with pytest.raises(StreaminferError, match="answered with"):
        virtual.run(drive(spec, built, tmp_path / "plan", short, [Input(b"no image")], strict=True))


async def test_a_busy_machine_is_given_longer_but_not_for_ever() -> None:
    """Else `plan` ends in an error where a second more would have given an answer."""
    asked: list[float] = []

    async def run(load: Scenario) -> float:
        asked.append(load.seconds)
        if load.seconds < enough:
            raise Unanswered("nothing came")
        return load.seconds

    load, enough = Scenario((), Arrivals(window=1), seconds=1.0), 4.0
    assert await patiently(run, load) == 4.0
    enough = 100.0
    with pytest.raises(Unanswered):
        await patiently(run, load)
    assert asked == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 8.0]


def test_a_call_after_a_pause_is_foreseen_to_take_longer() -> None:
    """Else a plan for a rare load promises the latency of a busy device."""
    warm, cold = made([2, 2]), made([2, 2], single=3.0)
    rare = {"machine": Machine(64, host=HOST)}

    def late(found: Profile) -> float:
        best = plan(found, request(found, TWO, stages=1, batch=1, **rare)).best
        calm = loaded(scenario(best, found, request(found, TWO, **rare)), 5.0)
        return simulate(replace(calm, seconds=60.0, warm=4.0)).p50

    assert late(cold) == pytest.approx(late(warm) + 2 * 0.004, rel=0.05)


def test_devices_that_share_caches_are_foreseen_to_slow_each_other() -> None:
    """Else two replicas on one memory are promised to do twice as much as one."""
    apart, near = made([10, 10]), made([10, 10], beside=1.5)
    machine = Machine(64, host=replace(HOST, cores=64.0))

    def most(found: Profile, devices: int) -> float:
        wanted = request(found, ("cpu",) * devices, stages=1, batch=1, machine=machine)
        return plan(found, wanted).best.throughput

    assert most(near, 1) == pytest.approx(most(apart, 1), rel=0.02)
    assert most(near, 2) == pytest.approx(most(apart, 2) / 1.5, rel=0.10)
