"""ResNet-18 on one image of 1024 x 1024 in 2 x 2 tiles: the slowest, and the largest, by the whole.

The stage is all of the model but its head, which follows the pool and is computed in the gather.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision
from torch.profiler import ProfilerActivity, profile, record_function

from streaminfer.parallel import Program, load
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump
from streaminfer.parallel.spatial import overhead, split_tiles
from tests.benchmarks.rows import Row, load_average, spread

__all__ = ["MEMORY", "TIME", "measure"]

TIME = "tiles_time"
MEMORY = "tiles_memory"
PIXELS = 1024
GRID = (2, 2)
ROUNDS = 5

Run = Callable[[], object]


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Alternate the whole and the tiles, one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, tiles, work = _systems()
        rows = []
        if TIME in goals:
            rows.append(_time(whole, tiles, work, goals[TIME]))
        if MEMORY in goals:
            rows.append(_memory(whole, tiles, goals[MEMORY]))
    finally:
        torch.set_num_threads(threads)
    return rows


def _systems() -> tuple[Run, list[Run], float]:
    """Return the whole, the tiles, and the work of the busiest tile by the whole's."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    cutter = Cutter(capture(model, (torch.randn(2, 3, PIXELS, PIXELS),)))
    last = len(cutter.captured.nodes) - 1
    (stage,) = cutter.split([])
    fan = split_tiles(cutter, 0, last, GRID)
    assert fan.scatter is not None
    image = torch.randn(1, 3, PIXELS, PIXELS)
    crops = dict(
        zip([port.name for port in fan.scatter.outputs], _program(fan.scatter)(image), strict=True)
    )
    tiles = [_run(part, crops[part.inputs[0].name]) for part in fan.parts]
    return _run(stage, image), tiles, overhead(cutter, 0, last, GRID)


def _program(stage: StageGraph) -> Program:
    return load(dump(stage), stage.weights)


def _run(stage: StageGraph, given: torch.Tensor) -> Run:
    program = _program(stage)
    return lambda: program(given.clone())  # its input counts as its memory


def _time(whole: Run, tiles: list[Run], work: float, goal: str | None) -> Row:
    found: list[tuple[float, float]] = []
    for run in (whole, *tiles):
        run()  # warm
    for _ in range(ROUNDS):
        before = _seconds(whole)
        slowest = max(_seconds(tile) for tile in tiles)
        found.append((slowest, statistics.mean((before, _seconds(whole)))))
    ratios = [tile / all_of_it for tile, all_of_it in found]
    tile_ms, whole_ms = (spread([pair[i] * 1e3 for pair in found], 0) for i in (0, 1))
    note = (
        f"resnet18 with its pool at {PIXELS} px, {GRID[0]}x{GRID[1]} tiles, 1 thread, each tile "
        f"between two runs of the whole; rounds {spread(ratios)}; slowest tile {tile_ms} ms, whole "
        f"{whole_ms} ms; multiply-accumulates {work:.2f}; {load_average()}"
    )
    return Row(TIME, statistics.median(ratios), "x", goal, note)


def _seconds(run: Run) -> float:
    """Return the CPU time of this thread: what other processes take of the core does not count."""
    began = time.thread_time()
    run()
    return time.thread_time() - began


def _memory(whole: Run, tiles: list[Run], goal: str | None) -> Row:
    *of_tiles, of_whole = _peaks([*tiles, whole])
    note = (
        "peak of what torch's allocator handed out and has not got back (torch.profiler, "
        "profile_memory), input and operators' buffers with it, weights not; "
        f"tiles {spread([n / 1e6 for n in of_tiles], 1)} MB, whole {of_whole / 1e6:.1f} MB"
    )
    return Row(MEMORY, max(of_tiles) / of_whole, "x", goal, note)


def _peaks(runs: Sequence[Run]) -> list[int]:
    """Return the most bytes that each run had at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for i, run in enumerate(runs):
            with record_function(f"run {i}"):
                run()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    marks = {e["name"]: e for e in events if e.get("cat") == "user_annotation"}
    peaks = []
    for i in range(len(runs)):
        mark = marks[f"run {i}"]
        span = mark["ts"], mark["ts"] + mark["dur"]
        own = [e["args"]["Bytes"] for e in changes if span[0] <= e["ts"] <= span[1]]
        if not own:
            raise RuntimeError("the profiler saw no allocation: torch was built without it")
        peaks.append(max(accumulate(own)))
    return peaks
