"""What the engine costs on this machine, by short runs of a plan on the memory bus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from streaminfer.app import LocalPipeline
from streaminfer.commands.cells import cells
from streaminfer.commands.records import Input
from streaminfer.commands.trial import ROWS, Here, Trial, by_stage, measure, patiently
from streaminfer.metrics import Metrics
from streaminfer.plan import Plan
from streaminfer.planning.simulation.simulator import (
    Arrivals,
    Host,
    Scenario,
    StageTimes,
    simulate,
)
from streaminfer.spec import PipelineSpec

__all__ = ["Calibration", "calibrate"]

CALIBRATE = 2.0  # seconds of a run
SPARSE = 30.0  # samples a second that come one by one
QUICK = 0.001  # seconds of a device call then: whatever, it is not the loop's
PYTHON = 0.5  # of the decoders' time the interpreter's lock is held
EXITS = "streaminfer_stage_exits_total"


@dataclass(frozen=True)
class Calibration:
    """What two short runs say of the engine, and of who leaves at the plan's exits."""

    host: Host
    leaves: Mapping[str, float]  # 0-1, by stage: of the rows that it computed


async def calibrate(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    inputs: Sequence[Input],
    cores: float,
    *,
    seconds: float = CALIBRATE,
) -> Calibration:
    """Measure what the engine's own event loop costs here, by its thread's CPU time.

    Two short runs of this plan, with micro-batches that are full and with some of one sample,
    scale the reference costs: those by sample, and those by micro-batch. What a third run, whose
    samples come one by one, costs beyond that is what it takes to wake the loop. Neither the rate
    nor a latency of a run goes into it.
    """
    reference = Host.reference(cores)
    blank = {stage.name: StageTimes({1: 1.0}, leaves=0.5) for stage in plan.stages}
    hops = Scenario(cells(spec, plan, blank), Arrivals(window=1)).hops()
    stages, most = len(plan.stages), spec.batch_of(plan.stages[0].path).max
    exits = sum(stage.exit is not None for stage in plan.stages)
    rows, costs = [], []
    leaves: dict[str, float] = {}

    async def run(load: Scenario) -> tuple[Trial, Metrics, tuple[float, float]]:
        async with LocalPipeline(spec, plan, folder) as pipeline:
            before = _counts(pipeline.metrics)
            trial = await measure(Here(pipeline), load, inputs)
            after = _counts(pipeline.metrics)
        return trial, pipeline.metrics, (after[0] - before[0], after[1] - before[1])

    for window in (spec.kafka.partitions, 4 * most * spec.kafka.partitions):
        load = Scenario((), Arrivals(window=window), partitions=spec.kafka.partitions)
        load = replace(load, seconds=seconds, warm=seconds / 4)
        trial, metrics, (samples, envelopes) = await patiently(run, load)
        # of a micro-batch of several rows some leave at an exit and some go on
        each = envelopes / max(1.0, samples) / (1 + exits * (window > spec.kafka.partitions))
        leaves = _leaves(metrics)
        by_sample = reference.loop_seconds(1, 0, stages, hops)
        rows.append((by_sample, reference.loop_seconds(0, each, stages, hops)))
        costs.append(trial.host / trial.throughput)
    host = _fitted(reference, rows, costs)
    sparse = Scenario(
        cells(spec, plan, {stage.name: StageTimes({1: QUICK}) for stage in plan.stages}),
        Arrivals(SPARSE, pattern="poisson"),
        host=host,
        partitions=spec.kafka.partitions,
        seconds=0.75 * seconds,
        warm=seconds / 8,
    )
    (trial, _, _), foreseen = await patiently(run, sparse), simulate(sparse)
    wake = max(0.0, trial.host - foreseen.host) / max(1.0, foreseen.wakes)
    return Calibration(replace(host, wake=wake), leaves)


def _fitted(reference: Host, rows: Sequence[tuple[float, float]], costs: Sequence[float]) -> Host:
    """Scale the reference so that its seconds by sample and by micro-batch sum to the costs."""
    # relative errors count, and no cost is negative
    matrix = np.array(rows) / np.array(costs)[:, None]
    by_sample, by_batch = np.linalg.lstsq(matrix, np.ones(len(costs)), rcond=None)[0]
    if min(by_sample, by_batch) <= 0:
        by_sample = by_batch = len(costs) / float(matrix.sum())
    return replace(reference.scaled(float(by_sample), float(by_batch)), python=PYTHON)


def _leaves(metrics: Metrics) -> dict[str, float]:
    """Return the share of each stage's rows that had their answer at its exit."""
    gone, rows = by_stage(metrics.readings(EXITS)), by_stage(metrics.readings(ROWS))
    return {name: gone.get(name, 0.0) / n for name, n in rows.items() if n}


def _counts(metrics: Metrics) -> tuple[float, float]:
    """Return the samples and the envelopes that came to the sink."""
    names = ("streaminfer_stage_samples_total", "streaminfer_stage_records_consumed_total")
    samples, envelopes = (by_stage(metrics.readings(name)).get("sink", 0.0) for name in names)
    return samples, envelopes
