"""What was measured of a stage's calls → its StageTimes → a stage of a simulation.

    commands/timing.py    calls of a plan's stage, with its own bytes ─┐
                                                                       ├─▶ StageTimes ─▶ SimStage
    forecast.py           calls of a profile's layers, and around them ┘

Both go through here, so that `plan` and `simulate` mean the same by a cold call and its noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from streaminfer.planning.simulation.scenario import SimStage, StageTimes

__all__ = ["stage_times", "takes", "timed"]

# Times that a call takes the lock beside its program. Counted, on calls beside a thread that never
# sleeps, by how much longer they take where it keeps the lock for 5 ms instead of 1.
GLUE, FIRST, LAST = 2, 2, 4  # for its bytes and its end; to scale pixels; to rank and pack answers


def stage_times(
    seconds: Mapping[int, float],
    single: Mapping[int, Sequence[float]],
    takes: int,
    beside: float = 1.0,
) -> StageTimes:
    """Sum up a stage's calls.

    Args:
        seconds: of a call among others, by batch size.
        single: of calls that came after a pause each, by batch size; {}: none was measured.
        takes: of the interpreter's lock, in a call.
        beside: seconds of a call while another device computes ÷ alone.
    """
    cold = {n: statistics.median(times) for n, times in single.items()}
    return StageTimes(
        seconds,
        cold=cold,
        takes=takes,
        noise=tuple(t / max(cold[n], 1e-12) for n, times in single.items() for t in times),
        beside=beside,
    )


def takes(steps: int, *, first: bool, last: bool) -> int:
    """Return how often a call takes the interpreter's lock.

    Args:
        steps: of its program that go from Python into torch: operators, or scripts of them.
        first: it is of the pipeline's first stage.
        last: it is of the last.
    """
    return GLUE + steps + first * FIRST + last * LAST


def timed(stage: SimStage, times: StageTimes) -> SimStage:
    """Return the stage with the times that its calls take."""
    return replace(
        stage,
        seconds=times.seconds,
        warming={n: max(0.0, t - times.seconds[n]) for n, t in times.cold.items()},
        takes=times.takes,
        noise=times.noise,
        beside=max(1.0, times.beside),
    )
