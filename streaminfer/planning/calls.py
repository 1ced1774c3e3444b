"""Layers of a profile, and what a device does around them → what a stage's calls will take.

    a call             bytes to tensors │ layers first … last │ codec, tensors to bytes
    among others        Machine.calls   │   Timing.seconds    │
    after a pause       Machine.after   │   Timing.single     │
    beside another      Machine.calls   │   Timing.beside     │

`commands/timing.py` measures the same of a plan that is built, cell by cell.
"""

from __future__ import annotations

from collections.abc import Sequence

from streaminfer.planning.predict import Machine
from streaminfer.planning.profile import Timing
from streaminfer.planning.simulation.measured import stage_times, takes
from streaminfer.planning.simulation.scenario import StageTimes

__all__ = ["call_times"]


def call_times(
    layers: Sequence[Timing],
    machine: Machine,
    *,
    part: float = 1.0,
    codec: float = 0.0,
    begins: bool = False,
    ends: bool = False,
    scripted: bool = True,
) -> StageTimes:
    """Foresee the calls of a stage.

    Args:
        layers: its own, by batch size, the largest last.
        machine: what stands around them.
        part: of the layers' work that is done in a call: 1, or a part of a split stage's.
        codec: seconds of a sample to cast and pack what comes and what leaves.
        begins: it is the pipeline's first stage.
        ends: it is the last.
        scripted: its program runs as one script, as on a CPU; else operator by operator.
    """
    after = machine.after or machine.calls
    noise = after.noise or (1.0,)
    seconds, single = dict[int, float](), dict[int, list[float]]()
    count = 0  # of single calls so far
    for own in layers:
        batch = own.batch
        around = machine.calls.seconds(batch, begins, ends) + batch * codec
        seconds[batch] = part * sum(own.seconds) + around
        if not own.single and machine.after is None:
            continue
        colder = after.seconds(batch, begins, ends)
        single[batch] = []
        for nodes in own.single or (own.seconds,) * len(noise):
            glue = colder * noise[count % len(noise)] + batch * codec
            single[batch].append(part * sum(nodes) + glue)
            count += 1
    most = layers[-1]
    longer = part * (sum(most.beside or most.seconds) - sum(most.seconds))
    beside = 1.0 + longer / max(seconds[most.batch], 1e-12)
    often = takes(1 if scripted else len(most.seconds), first=begins, last=ends)
    return stage_times(seconds, single, often, max(1.0, beside))
