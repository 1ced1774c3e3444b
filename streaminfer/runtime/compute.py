"""From a plan's stage to the Forward that runs it: device, threads, program, what stands around."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import torch

from streaminfer.errors import ConfigError
from streaminfer.metrics import StageMetrics
from streaminfer.parallel import Program, load
from streaminfer.parallel.weights import read
from streaminfer.plan import Edge, Plan, StagePlan, exit_files, stage_files
from streaminfer.runtime.device import ExitHead, Outputs, Stage
from streaminfer.runtime.forward import Forward
from streaminfer.runtime.postprocess import normalise, top_k
from streaminfer.spec import PipelineSpec

__all__ = ["device_of", "forward", "share"]


def forward(
    spec: PipelineSpec,
    plan: Plan,
    folder: Path,
    name: str,
    metrics: StageMetrics,
    *,
    device: str,
    timed: bool = False,
) -> Forward:
    """Make the step of one stage; it loads when it starts, and measures its speed if `timed`.

    Raises ConfigError if this machine has no such device.
    """
    stage, placed = plan.stage(name), spec.stage(plan.stage(name).path)
    where = device_of(device)
    takers = plan.consumers(name)
    following = takers[0][0].edge if takers else Edge()
    made = Stage(
        plan=stage,
        load=lambda: _program(stage_files(folder, name), where),
        device=where,
        threads=placed.threads or share(spec, plan),
        batch=spec.batch_of(stage.path),
        out_dtype=following.dtype,
        compress=following.compress,
        before=normalise(plan.input, where) if stage.pixels else None,
        after=top_k(plan.top_k, plan.logits) if not takers and plan.top_k else None,
        exit=_exit(plan, folder, stage, where),
    )
    return Forward(made, metrics, timed=timed)


def _program(files: tuple[Path, Path], device: torch.device) -> Program:
    graph, weights = files
    return load(graph.read_bytes(), read(weights), device)


def _exit(plan: Plan, folder: Path, stage: StagePlan, device: torch.device) -> ExitHead | None:
    if stage.exit is None:
        return None
    name = plan.logits or plan.stages[-1].outputs[0].name
    classes = top_k(plan.top_k) if plan.top_k else None

    def answer(logits: torch.Tensor) -> Outputs:
        return classes({name: logits}) if classes else {name: logits}

    return ExitHead(
        lambda: _program(exit_files(folder, stage.name), device), stage.exit.threshold, answer
    )


def device_of(text: str, where: str = "stages.device") -> torch.device:
    """Return the device, if this machine has it. Raises ConfigError with those it has."""
    there = ["cpu"]
    there += [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available()
    wanted = "cuda:0" if text == "cuda" else text
    if wanted not in there:
        near = difflib.get_close_matches(wanted, there, 1, 0) or there
        raise ConfigError(
            f"no device {text!r} on this machine; it has: {', '.join(there)}",
            where=where,
            hint=f"{where} {near[0]}" if where.startswith("--") else f"device: {near[0]}",
        )
    return torch.device(wanted)


def share(spec: PipelineSpec, plan: Plan) -> int:
    """Return the threads of a CPU stage: the cores shared by all that computes on them."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    placed = [(s, spec.stage(s.path)) for s in plan.stages if s.kind in ("stage", "part")]
    busy = sum(p.devices_of(s.part).count("cpu") for s, p in placed)
    return max(1, cores // max(1, busy))
