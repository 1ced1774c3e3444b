"""From the cells of a plan to the stages of a simulation: who reads what, where, how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streaminfer.errors import ConfigError
from streaminfer.plan import ITEMSIZE, Plan, StagePlan
from streaminfer.planning.profile import Profile
from streaminfer.planning.simulation.encoded import edge_name, encoded
from streaminfer.planning.simulation.measured import timed
from streaminfer.planning.simulation.scenario import Encoded, SimStage, StageTimes
from streaminfer.spec import PipelineSpec, StageSpec
from streaminfer.topics import ANSWER
from streaminfer.topology import WorkerSpec, build

__all__ = ["cells"]


def cells(
    spec: PipelineSpec,
    plan: Plan,
    times: Mapping[str, StageTimes],
    devices: Sequence[str] = (),
    kept: Profile | None = None,
) -> list[SimStage]:
    """Return a stage for every cell of the plan, in its order.

    Args:
        spec: where they run.
        plan: what they are.
        times: of each, by name.
        devices: what `prices` call the declared stages' devices, in order, or one for all.
        kept: the model's profile: what else could travel between its stages.

    Raises:
        ConfigError: not as many devices as there are stages.
    """
    paths = list(dict.fromkeys(s.path for s in plan.stages if s.kind in ("stage", "part")))
    if devices and len(devices) not in (1, len(paths)):
        raise ConfigError(
            f"{len(devices)} devices for {len(paths)} stages",
            where="--devices",
            hint="name one for each stage, or one for all",
        )
    called = {path: devices[k % len(devices)] for k, path in enumerate(paths)} if devices else {}
    roles = {name: role for role in build(spec, plan).workers for name in role.stages}
    found = []
    for stage in plan.stages:
        role = roles[stage.name]
        device = called.get(stage.path, devices[0] if devices else role.device(stage.name, 0))
        found.append(_cell(spec, plan, stage, role, times, device, kept))
    return found


def _cell(
    spec: PipelineSpec,
    plan: Plan,
    stage: StagePlan,
    role: WorkerSpec,
    measured: Mapping[str, StageTimes],
    device: str,
    kept: Profile | None,
) -> SimStage:
    from streaminfer.runtime.compute import share

    batch, times = spec.batch_of(stage.path), measured[stage.name]
    local = stage.name != role.stages[0]
    declared = spec.stage(stage.path)
    gathers = isinstance(declared, StageSpec) and role.gathers and not local
    cell = SimStage(
        name=stage.name,
        seconds=times.seconds,
        speeds=times.speeds or (1.0,) * role.replicas,
        batch_max=batch.max,
        batch_wait=batch.wait,
        bytes_out=_bytes_out(plan, stage) * (times.ratio if plan.consumers(stage.name) else 1.0),
        local=local,
        threads=declared.threads or share(spec, plan),
        reads=tuple(source.stage for source in stage.sources),
        bytes_in=tuple(
            _bytes_in(plan, stage, source.tensors) * measured[source.stage].ratio
            for source in stage.sources
        ),
        topic=role.source,
        balance=role.balanced,
        # inside a fan those that leave go to its gather, as the others do
        leaves=times.leaves if stage.exit and not stage.gather else 0.0,
        device=device,
        shares=role.shares,
        # joined in one worker nobody waits: only who fails is done without
        quorum=declared.quorum if gathers and isinstance(declared, StageSpec) else None,
        deadline=declared.deadline if isinstance(declared, StageSpec) else 30.0,
        edge=edge_name(stage.edge.dtype, stage.edge.compress),
        encodings={} if local or kept is None else _encodings(plan, stage, kept),
    )
    return timed(cell, times)


def _encodings(plan: Plan, stage: StagePlan, kept: Profile) -> dict[str, Encoded]:
    """Return what may travel from one plain stage to the next; {} for all else."""
    if len(stage.sources) != 1 or stage.kind != "stage":
        return {}
    before = plan.stage(stage.sources[0].stage)
    alone = len(plan.consumers(before.name)) == 1 and before.kind == "stage" and not before.gather
    found = encoded(kept, before.layers[-1]) if alone and before.layers else {}
    return found if edge_name(stage.edge.dtype, stage.edge.compress) in found else {}


def _bytes_in(plan: Plan, stage: StagePlan, tensors: Sequence[str]) -> float:
    """Return the bytes of a sample's tensors as they come into a stage."""
    total = 0
    for spec in stage.inputs:
        if spec.name in tensors:
            total += spec.row_bytes(stage.edge.dtype)
    if _carries_pixels(plan, stage):  # uint8, whatever the model takes
        first = stage.inputs[0]
        total -= first.row_bytes(stage.edge.dtype) - first.row_bytes() // ITEMSIZE[first.dtype]
    return float(total)


def _carries_pixels(plan: Plan, stage: StagePlan) -> bool:
    return stage.pixels and plan.input.decode == "image"


def _bytes_out(plan: Plan, stage: StagePlan) -> float:
    """Return the bytes of a sample in all that a stage sends, each topic once."""
    takers = plan.consumers(stage.name)
    if not takers:
        raw = sum(tensor.row_bytes() for tensor in stage.outputs)
        return float(min(raw, ANSWER * plan.top_k) if plan.top_k else raw)
    sent = {tensors: _bytes_in(plan, taker, tensors) for taker, tensors in takers}
    return sum(sent.values())
