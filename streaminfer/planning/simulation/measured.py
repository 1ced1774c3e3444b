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

__all__ = ["stage_times", "timed"]

GLUE = 6  # times that a call takes the lock beside its operators: for its bytes, for its end


def stage_times(
    seconds: Mapping[int, float],
    single: Mapping[int, Sequence[float]],
    operators: int,
    beside: float = 1.0,
) -> StageTimes:
    """Sum up a stage's calls.

    Args:
        seconds: of a call among others, by batch size.
        single: of calls that came after a pause each, by batch size; {}: none was measured.
        operators: that a call runs: each takes the interpreter's lock.
        beside: seconds of a call while another device computes ÷ alone.
    """
    cold = {n: statistics.median(times) for n, times in single.items()}
    return StageTimes(
        seconds,
        cold=cold,
        takes=GLUE + operators,
        noise=tuple(t / max(cold[n], 1e-12) for n, times in single.items() for t in times),
        beside=beside,
    )


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
