"""What the engine costs around a pipeline's layers: measured once, with a stand-in for the model.

    the pipeline's own input ─▶ [first] ─▶ [mid] ─▶ [last] ─▶ answers of its size

`calibrate` scales the simulator's costs to this machine's event loop; each stage's time on its
device is what a device does beside the layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from streaminfer.commands.calibration import calibrate
from streaminfer.commands.records import inputs_of
from streaminfer.commands.timing import time_decode, time_stages
from streaminfer.planning.build import build
from streaminfer.planning.predict import Calls
from streaminfer.planning.simulation.scenario import Host
from streaminfer.planning.standin import UNTILS
from streaminfer.spec import PipelineSpec
from streaminfer.spec.models import OutputSpec
from streaminfer.spec.stages import BatchSpec, ModelSpec, StageSpec

__all__ = ["Engine", "apart", "measure_engine"]

SECONDS = 1.0  # of each of the two runs
CLASSES = 1000  # at most


@dataclass(frozen=True)
class Engine:
    """Its costs: on the event loop, and on a device for each call."""

    host: Host
    calls: Calls
    after: Calls  # a pause


def apart(host: Host) -> Host:
    """Return the costs where each worker and the client are processes of their own."""
    return replace(host, cores=None, client=0.0, timer=0.0)


async def measure_engine(
    spec: PipelineSpec, batches: Sequence[int], *, outputs: int, top_k: int, cores: float
) -> Engine:
    """Measure what a pipeline takes beside its model.

    Args:
        spec: the pipeline; its input, batch wait and memory count.
        batches: sizes of micro-batches, for the devices' calls.
        outputs: values in one row of what the model gives.
        top_k: classes in an answer; 0: all outputs.
        cores: that all its workers share.
    """
    small = _pipeline(spec, max(batches), outputs, top_k)
    with TemporaryDirectory() as name:
        folder = Path(name) / "plan"
        plan = build(small, folder)
        inputs = inputs_of(small, plan)
        found = await calibrate(small, plan, folder, inputs, cores, seconds=SECONDS)
        times = await time_stages(small, plan, folder, batches=batches)
    host = replace(found.host, decode=time_decode(small.input, inputs))
    each, first, last = (times[name] for name in ("mid", "first", "last"))
    return Engine(
        host,
        Calls(each.seconds, first.seconds, last.seconds),
        Calls(each.cold, first.cold, last.cold, each.noise),
    )


def _pipeline(spec: PipelineSpec, most: int, outputs: int, top_k: int) -> PipelineSpec:
    """Return the pipeline with the stand-in: images as they are, other inputs as one of floats."""
    given = list(spec.first_model.examples().values())
    values = sum(math.prod(one.sizes()) for one in given)
    shape: tuple[int, ...] = (values,)
    if spec.input.decode == "image":
        shape = given[0].sizes()
        if given[0].ranges and (side := spec.input.resize):  # what a square image becomes
            shape = (shape[0], side, side)
        values = math.prod(shape)
    classes = max(1, top_k, min(outputs, CLASSES))
    return PipelineSpec(
        pipeline="standin",
        model=ModelSpec(
            factory="streaminfer.planning.standin:Standin",
            kwargs={"values": values, "classes": classes},
            example=shape,
        ),
        input=spec.input,
        batch=BatchSpec(max=most, wait=spec.batch.wait),
        stages=(
            *(StageSpec(name=name, until=name, threads=1) for name in UNTILS),
            StageSpec(name="last", threads=1),
        ),
        output=OutputSpec(top_k=top_k),
        memory=spec.memory,
    )
