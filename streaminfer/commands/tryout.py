"""Short real runs of a few candidates on this machine: what they do, not what was predicted.

A run has the load that its forecast had, sent and timed as `simulate --check` does.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streaminfer.commands.records import inputs_of
from streaminfer.commands.trial import Trial, drive, patiently
from streaminfer.planning.forecast import busy_of, loaded
from streaminfer.planning.placement import pipeline_file
from streaminfer.planning.planner import Edge
from streaminfer.planning.predict import LOAD, Candidate, Measured
from streaminfer.planning.simulation.scenario import Scenario
from streaminfer.planning.source import ensure
from streaminfer.planning.subject import Subject
from streaminfer.spec.file import load

__all__ = ["try_out"]

SECONDS = 3.0  # of measuring, at full load and again at LOAD of what that gave
ANSWERS = 5  # times its p99 that a run lasts at least


def try_out(
    subject: Subject,
    candidates: Sequence[Candidate],
    scenarios: Sequence[Scenario],
    edges: Mapping[int, Edge],
    *,
    outputs: int,
    random_weights: bool,
    say: Callable[[str, int, int], None],
) -> list[Measured]:
    """Run each candidate on the memory bus, one after the other; in the order given.

    Args:
        subject: the pipeline.
        candidates: what to run.
        scenarios: of each, its full load.
        edges: what travels between stages, by the position of the cut.
        outputs: classes of a model that was named without a file.
        random_weights: don't load weights.
        say: told of progress.

    Raises:
        StreaminferError: no answer came, or an input was answered with an error.
    """
    found = []
    with tempfile.TemporaryDirectory() as name:
        for k, (candidate, scenario) in enumerate(zip(candidates, scenarios, strict=True)):
            say(f"trying {candidate.form}", k, len(candidates))
            folder = Path(name) / str(k)
            folder.mkdir()
            file = folder / "pipeline.yaml"
            file.write_text(
                pipeline_file(subject, candidate, edges, (), folder.resolve(), outputs=outputs)
            )
            found.append(asyncio.run(_run(file, candidate, scenario, random_weights)))
    return found


async def _run(
    file: Path, candidate: Candidate, scenario: Scenario, random_weights: bool
) -> Measured:
    folder, spec = file.parent / "plan", load(file)
    plan = await asyncio.to_thread(ensure, spec, folder, random_weights=random_weights)
    inputs = inputs_of(spec, plan)

    async def run(load: Scenario) -> Trial:
        return await drive(spec, plan, folder, load, inputs, strict=True)

    window = scenario.arrivals.window or 0
    span = max(SECONDS, window / candidate.throughput)
    most = await patiently(run, replace(scenario, seconds=scenario.warm + span))
    late = loaded(scenario, LOAD * most.throughput)
    span = max(SECONDS, ANSWERS * candidate.p99)
    warm = min(late.warm, span / 2)
    times = await patiently(run, replace(late, seconds=warm + span, warm=warm))
    return Measured(most.throughput, times.p50, times.p99, busy_of(candidate, most.busy))
