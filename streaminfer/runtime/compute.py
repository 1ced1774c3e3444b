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
from streaminfer.plan import Plan, stage_files
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.postprocess import normalise, top_k
from streaminfer.spec import PipelineSpec

__all__ = ["device_of", "forward", "share"]


def forward(
    spec: PipelineSpec, plan: Plan, folder: Path, name: str, metrics: StageMetrics
) -> Forward:
    """Make the step of one stage; it loads when it starts. Raises ConfigError for its device."""
    k = [stage.name for stage in plan.stages].index(name)
    last = k == len(plan.stages) - 1
    following = None if last else plan.stages[k + 1].edge
    device = device_of(spec.stage(name).device)
    stage = Stage(
        plan=plan.stages[k],
        load=lambda: _program(folder, name, device),
        device=device,
        threads=spec.stage(name).threads or share(spec),
        batch=spec.batch_of(name),
        out_dtype=following.dtype if following else "native",
        compress=following.compress if following else "none",
        before=normalise(plan.input, device) if k == 0 else None,
        after=top_k(plan.top_k) if last and plan.top_k else None,
    )
    return Forward(stage, metrics)


def _program(folder: Path, name: str, device: torch.device) -> Program:
    graph, weights = stage_files(folder, name)
    return load(graph.read_bytes(), read(weights), device)


def device_of(text: str) -> torch.device:
    """Return the device, if this machine has it. Raises ConfigError with those it has."""
    device = torch.device(text)
    there = ["cpu"]
    there += [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available()
    wanted = "cuda:0" if text == "cuda" else text
    if wanted not in there:
        near = difflib.get_close_matches(wanted, there, 1, 0) or there
        raise ConfigError(
            f"no device {text!r} on this machine; it has: {', '.join(there)}",
            where="stages.device",
            hint=f"device: {near[0]}",
        )
    return device


def share(spec: PipelineSpec) -> int:
    """Return the threads of a CPU stage: the cores shared by all CPU workers of the pipeline."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = sum(stage.replicas for stage in spec.stages if stage.device == "cpu")
    return max(1, cores // max(1, workers))
