"""What it costs to load a stage: read its graph, map its weights, resolve every operator.

Half of ResNet-50 each; files are in the page cache, as after a restart. The first load of a process
also pays torch's own first touch of each operator and is left out, but told.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torchvision

from streaminfer.parallel import load, weights
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump
from tests.benchmarks.rows import Row, load_average, spread

__all__ = ["BYTES", "TIME", "measure"]

TIME = "load_stage"
BYTES = "load_stage_bytes"
ROUNDS = 15


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Cut ResNet-50 behind layer3.2, load both stages again and again."""
    return await asyncio.to_thread(_measure, goals)


def _measure(goals: Mapping[str, str | None]) -> list[Row]:
    model = torchvision.models.resnet50(weights=None)
    cutter = Cutter(capture(model, (torch.randn(2, 3, 64, 64),)))
    stages = cutter.split(cutter.cuts(["layer3.2"]))
    with TemporaryDirectory() as name:
        files = [(Path(name) / f"{i}.json", Path(name) / f"{i}.weights") for i in range(2)]
        for (graph, held), stage in zip(files, stages, strict=True):
            graph.write_bytes(dump(stage))
            weights.write(held, stage.weights)
        own = [sum(t.nbytes for t in stage.weights.values()) for stage in stages]
        sizes = [held.stat().st_size for _, held in files]
        first = max(_timed(*file)[0] for file in files)
        rounds = [[_timed(*file) for _ in range(ROUNDS)] for file in files]
    slower = max(rounds, key=lambda each: statistics.median(wall for wall, _ in each))
    walls, cpus = zip(*slower, strict=True)
    whole = cutter.weights_before()[-1]
    rows = {
        TIME: (
            statistics.median(walls),
            "ms",
            f"the slower half {spread(walls)} over {ROUNDS}, {statistics.median(cpus):.1f} CPU ms "
            f"each, the first time {first:.1f} ms; {load_average()}",
        ),
        BYTES: (
            sum(sizes) / whole,
            "of the model's bytes",
            f"{own[0]:,} + {own[1]:,} bytes of weights; files {sizes[0]:,} and {sizes[1]:,}",
        ),
    }
    return [Row(name, *rows[name][:2], goal, rows[name][2]) for name, goal in goals.items()]


def _timed(graph: Path, held: Path) -> tuple[float, float]:
    """Load a stage; return the milliseconds it took, and those of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    load(graph.read_bytes(), weights.read(held))
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
