"""What planning is worth: planned cuts against equal ones, the planner against all cuts."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch

from streaminfer.parallel import Program, load
from streaminfer.parallel.program import dump
from streaminfer.planning.partitioner import Kind, Problem, solve
from streaminfer.planning.planner import Pool, Request, plan
from streaminfer.planning.predict import Machine
from streaminfer.planning.profile import (
    CutPoint,
    DeviceProfile,
    Link,
    NodeProfile,
    Profile,
    Timing,
)
from streaminfer.planning.profiler import Captured, Place, capture_model, example_tensors, profile
from streaminfer.planning.subject import subject
from tests.benchmarks.rows import Row, load_average, spread

__all__ = ["BRUTE", "EQUAL", "TIME", "WINS", "brute", "equal", "plan_time"]

MODELS = {  # and the micro-batch: about 50 ms on one core
    "resnet50": 1,
    "mobilenet_v3_large": 4,
    "efficientnet_b0": 2,
    "densenet121": 1,
    "googlenet": 2,
}
EQUAL = {name: f"planned_vs_equal_{name}" for name in MODELS}
WINS = "planned_vs_equal_wins"
BRUTE = "planner_vs_brute_force"
TIME = "plan_time"
ROUNDS = 9
BATCHES = 44  # micro-batches a round, of which the first are not counted
FILL = 4
QUEUE = Link(name="queue", alpha=0.0, per_byte=0.0, source="hands a tensor over as it is")
MEMORY = Link(name="memory", alpha=6e-4, per_byte=1e-9, source="typical")
ONE = Place(("cpu",), "benchmark", 1)


def _captured(name: str) -> Captured:
    kwargs = '{"init_weights": false, "aux_logits": false}' if name == "googlenet" else "{}"
    return capture_model(
        subject(f"torchvision.models:{name}", kwargs, "3x224x224").spec, random_weights=True
    )


async def equal(goals: Mapping[str, str | None]) -> list[Row]:
    """Run planned and equal-layer-count cuts by turns: two stages, a thread each."""
    rows, won = [], 0
    wanted = [name for name in MODELS if EQUAL[name] in goals or WINS in goals]
    for name in wanted:
        value, note = _compare(name, MODELS[name])
        won += value >= 1.1
        if EQUAL[name] in goals:
            rows.append(Row(EQUAL[name], value, "x", goals[EQUAL[name]], note))
    if WINS in goals:
        note = f"of {len(wanted)} models, those whose planned cut is at least 1.1 x the equal one"
        rows.append(Row(WINS, float(won), "models", goals[WINS], note))
    return rows


def _compare(name: str, batch: int) -> tuple[float, str]:
    captured = _captured(name)
    found = profile(captured, [ONE], batches=(batch,), cached=False)
    pool = Pool(found.devices[0], ("cpu", "cpu"), 64e9)
    answer = plan(found, Request((pool,), QUEUE, Machine(2), stages=2))
    cuts = {"planned": answer.best.stages[0].last, "equal": _equal_cut(captured)}
    names = {p: next(c.layer for c in found.cuts if c.position == p) for p in cuts.values()}
    places = ", ".join(f"{kind} behind {names[at]}" for kind, at in cuts.items())
    if cuts["planned"] == cuts["equal"]:
        return 1.0, f"{places}: the same cut"
    (inputs,) = example_tensors(captured, batch)
    walls: dict[str, list[float]] = {kind: [] for kind in cuts}
    works: dict[str, list[float]] = {kind: [] for kind in cuts}
    for k in range(ROUNDS):
        for kind in list(cuts)[:: 1 if k % 2 else -1]:
            # loaded anew: where weights lie in memory is worth some percent of a stage's time
            run = _run(_programs(captured, cuts[kind]), inputs)
            walls[kind].append(run.period)
            works[kind].append(run.slowest)
    ratios = [b / a for a, b in zip(walls["planned"], walls["equal"], strict=True)]
    cpu = statistics.median(works["equal"]) / statistics.median(works["planned"])
    note = (
        f"{places}; batch {batch}; rounds {spread(ratios)}; by the slower stage's CPU time alone "
        f"{cpu:.2f}; {load_average()}"
    )
    return statistics.median(ratios), note


def _equal_cut(captured: Captured) -> int:
    """Return the legal cut behind a layer that comes nearest to as many layers on both sides."""
    layers = list(captured.graph.layers)
    leaves = [y for y in layers if not any(o.path.startswith(f"{y.path}.") for o in layers)]
    ends = sorted({y.last for y in layers} & set(captured.cutter.legal))
    half = len(leaves) / 2
    return min(ends, key=lambda end: abs(sum(y.last <= end for y in leaves) - half))


def _programs(captured: Captured, cut: int) -> list[Program]:
    return [load(dump(stage), stage.weights) for stage in captured.cutter.split([cut])]


@dataclass(frozen=True)
class _Run:
    """Seconds per micro-batch: between two that leave, and of CPU in the slower stage."""

    period: float
    slowest: float


def _run(stages: Sequence[Program], inputs: torch.Tensor) -> _Run:
    """Run two stages in two threads of one core each, as the memory bus does."""
    between: queue.Queue[Sequence[torch.Tensor]] = queue.Queue(2)
    ended: list[float] = []
    used = [0.0, 0.0]

    def first() -> None:
        torch.set_num_threads(1)
        began = time.thread_time()
        for _ in range(BATCHES):
            between.put([tensor.contiguous() for tensor in stages[0](inputs)])
        used[0] = time.thread_time() - began

    def second() -> None:
        torch.set_num_threads(1)
        began = time.thread_time()
        for _ in range(BATCHES):
            stages[1](*between.get())
            ended.append(time.perf_counter())
        used[1] = time.thread_time() - began

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _Run((ended[-1] - ended[FILL]) / (BATCHES - 1 - FILL), max(used) / BATCHES)


async def brute(goals: Mapping[str, str | None]) -> list[Row]:
    """Compare the planner's bottleneck with all cuts in two and three stages, on real profiles."""
    worst, told = 0.0, []
    for name, batch in MODELS.items():
        found = profile(_captured(name), [ONE], batches=(batch,), cached=False)
        for stages in (2, 3):
            problem = _problem(found, batch, stages)
            answer = solve(problem, stages=stages)
            assert answer is not None
            ratio = answer.bottleneck / _try_all(problem, stages)
            worst = max(worst, ratio)
            told.append(f"{name} {stages}: {ratio:.4f}")
    note = "its bottleneck by the best of all cuts, a device for each stage; " + ", ".join(told)
    return [Row(BRUTE, float(worst), "x", goals[BRUTE], note)]


def _problem(found: Profile, batch: int, devices: int) -> Problem:
    timing = found.devices[0].timings[0]
    half = np.array([0, *(MEMORY.seconds(batch * c.row_bytes) / 2 for c in found.cuts), 0.0])
    return Problem(
        kinds=(Kind(1, np.array(timing.seconds)),) * devices,
        ends=np.array([-1, *(c.position for c in found.cuts), len(found.nodes) - 1]),
        receive=half,
        send=half,
        held=np.zeros(len(half)),
        weights=np.zeros(len(found.nodes)),
        peaks=np.zeros(len(found.nodes)),
    )


def _try_all(problem: Problem, stages: int) -> float:
    """Return the least bottleneck with one device for each of so many stages."""
    seconds = problem.segments(problem.kinds[0])
    last = problem.size - 1
    best = float("inf")
    for cuts in combinations(range(1, last), stages - 1):
        edges = (0, *cuts, last)
        best = min(best, max(seconds[a, b] for a, b in pairwise(edges)))
    return best


async def plan_time(goals: Mapping[str, str | None]) -> list[Row]:
    """Plan 500 layers on eight devices of eight kinds, and on eight alike: the slower one."""
    random = np.random.default_rng(0)
    base = random.random(500) ** 3 * 1e-3
    nodes = tuple(
        NodeProfile(name=str(k), operator="", layer=str(k), weight_bytes=1, peak_bytes=1)
        for k in range(500)
    )
    cuts = tuple(
        CutPoint(
            position=k, layer=str(k), tensors=1, row_bytes=int(random.integers(10_000, 1_000_000))
        )
        for k in range(499)
    )
    devices = tuple(_device(f"cuda:{k}", base, random) for k in range(8))
    made = Profile(
        model="made", key="", nodes=nodes, cuts=cuts, input_bytes=1, output_bytes=1, devices=devices
    )
    found, told = {}, []
    for kind, pools in {
        "eight kinds": tuple(Pool(d, (d.device,), 1e12) for d in devices),
        "eight alike": (Pool(devices[0], tuple(d.device for d in devices), 1e12),),
    }.items():
        began, used = time.perf_counter(), time.process_time()
        plan(made, Request(pools, MEMORY, Machine(16)))
        found[kind] = time.perf_counter() - began
        told.append(f"{kind} {found[kind]:.2f} s ({time.process_time() - used:.2f} s of CPU)")
    note = (
        f"500 places to cut, three batch sizes, eight devices: {', '.join(told)}; {load_average()}"
    )
    return [Row(TIME, max(found.values()), "s", goals[TIME], note)]


def _device(name: str, base: np.ndarray, random: np.random.Generator) -> DeviceProfile:
    speed = 0.3 + random.random()
    timings = []
    for batch in (1, 4, 16):
        seconds = base * batch**0.9 * speed * (0.8 + 0.4 * random.random(500))
        timings.append(
            Timing(
                batch=batch, seconds=tuple(seconds.tolist()), whole=float(seconds.sum()), spread=0
            )
        )
    return DeviceProfile(
        device=name, hardware=name, threads=1, memory=1 << 40, timings=tuple(timings)
    )
