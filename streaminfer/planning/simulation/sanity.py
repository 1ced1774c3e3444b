"""What of a scenario cannot run: said before anything is simulated, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from streaminfer.errors import ConfigError
from streaminfer.planning.simulation.scenario import PATTERNS, Scenario, SimStage
from streaminfer.spec import did_you_mean

__all__ = ["check"]


def check(scenario: Scenario) -> None:
    """Raise ConfigError for what cannot run, with the remedy."""
    if problem := next(_problems(scenario), None):
        where, text, hint = problem
        raise ConfigError(text, where=where, hint=hint)


def _problems(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    if not scenario.stages:
        yield "stages", "there is no stage to simulate", "a pipeline has at least one"
    names = [stage.name for stage in scenario.stages]
    for name, again in pairwise(sorted(names)):
        if name == again:
            yield "stages", f"two stages are called {name!r}", "give each its own name"
    for k, stage in enumerate(scenario.stages):
        yield from _stage_problems(stage, names[:k])
    yield from _local_problems(scenario)
    yield from _load_problems(scenario)


def _local_problems(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    names = {stage.name for stage in scenario.stages}
    if any(other not in names for stage in scenario.stages for other in stage.reads or ()):
        return
    home = {k: group[0] for group in scenario.groups() for k in group}
    for k, (stage, reads) in enumerate(zip(scenario.stages, scenario.sources(), strict=True)):
        if stage.local and (not reads or {home[r] for r in reads} != {home[k]}):
            yield (
                stage.name,
                f"stage {stage.name!r} is local, but what it reads is not in one worker",
                "drop local",
            )


def _load_problems(scenario: Scenario) -> Iterator[tuple[str, str, str]]:
    load = scenario.arrivals
    if (load.rate is None) == (load.window is None):
        yield "arrivals", "a load is a rate or a window, one of them", "--rate 200"
    if load.rate is not None and not (load.rate > 0 and math.isfinite(load.rate)):
        yield "rate", f"the rate is {load.rate:g} a second", "give more than 0: --rate 200"
    if load.window is not None and load.window < 1:
        yield "arrivals.window", f"{load.window} samples in the loop", "give 1 or more"
    if load.pattern not in PATTERNS:
        yield "arrivals", f"no pattern {load.pattern!r}", did_you_mean(load.pattern, PATTERNS)
    if load.burst < 1 or load.skew < 0:
        yield "arrivals", "burst is at least 1, skew at least 0", ""
    if min(scenario.partitions, scenario.window, scenario.sinks) < 1:
        yield "partitions", "partitions, window and sinks are at least 1", ""
    if not 0 <= scenario.warm < scenario.seconds:
        yield (
            "seconds",
            f"{scenario.seconds:g} s, of which {scenario.warm:g} s warm up",
            "run longer",
        )
    if scenario.host.cores is not None and scenario.host.cores <= 0:
        yield "host.cores", f"{scenario.host.cores:g} cores", "give more than 0"


def _stage_problems(stage: SimStage, before: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    name = stage.name
    if not stage.speeds:
        yield name, f"stage {name!r} has no replicas", f"give it one: --replicas {name}=1"
    if any(not (speed > 0 and math.isfinite(speed)) for speed in stage.speeds):
        yield name, f"stage {name!r} has a replica of speed 0", "a speed is more than 0"
    if not stage.seconds:
        yield name, f"nobody knows how long stage {name!r} takes", "profile it, or give seconds"
    if any(n < 1 or not (t >= 0 and math.isfinite(t)) for n, t in stage.seconds.items()):
        yield name, f"stage {name!r} has a time below 0, or of a batch below 1", "measure again"
    if stage.batch_max < 1 or not stage.batch_wait >= 0:
        yield name, f"batch.max {stage.batch_max}, batch.wait {stage.batch_wait:g}", "max ≥ 1"
    if before and stage.reads == ():
        yield name, f"stage {name!r} reads nothing", "the first stage alone reads the input"
    for other in stage.reads or ():
        if other not in before:
            hint = did_you_mean(other, before) if before else "the first stage reads the input"
            yield name, f"stage {name!r} reads {other!r}, which is no stage before it", hint
    yield from _gather_problems(stage)
    yield from _size_problems(stage)


def _gather_problems(stage: SimStage) -> Iterator[tuple[str, str, str]]:
    name, parts = stage.name, len(stage.reads or ())
    if stage.quorum is not None and not 1 <= stage.quorum <= parts:
        text = f"a quorum of {stage.quorum} of the {parts} that {name!r} reads"
        yield name, text, f"from 1 to {parts}"
    if not (stage.deadline > 0 and math.isfinite(stage.deadline)):
        yield name, f"{name!r} has a deadline of {stage.deadline:g} s", "give more than 0"


def _size_problems(stage: SimStage) -> Iterator[tuple[str, str, str]]:
    name = stage.name
    if not 0 <= stage.leaves <= 1:
        yield name, f"{stage.leaves:g} of the rows leave at {name!r}", "a share from 0 to 1"
    for what, count, want in (
        ("shares", len(stage.shares or stage.speeds), len(stage.speeds)),
        ("bytes_in", len(stage.bytes_in or stage.reads or ()), len(stage.reads or ())),
    ):
        if count != want:
            yield name, f"stage {name!r} has {count} {what} for {want}", "one for each"
