"""Run a split stage as workers do, and compare it with the stage as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from streaminfer.parallel import Program, check_inputs, load, weights
from streaminfer.parallel.capture import capture
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump
from streaminfer.parallel.spatial import split_tiles

TOLERANCE = 1e-6  # of the largest value: small maps take other kernels


def reload(stage: StageGraph, file: Path | None) -> Program:
    if file is None:
        return load(dump(stage), stage.weights)
    weights.write(file, stage.weights)
    return load(dump(stage), weights.read(file))


def run(
    fan: Fan, inputs: Mapping[str, Tensor], folder: Path | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a fan as workers do: by names, contiguous, checked; give all that travelled, too."""
    assert fan.scatter is not None
    travelled = dict(inputs)
    for i, stage in enumerate([fan.scatter, *fan.parts, fan.gather]):
        program = reload(stage, folder / f"{i}.safetensors" if folder else None)
        given = [
            travelled[port.name].clone(memory_format=torch.contiguous_format)
            for port in program.inputs
        ]
        check_inputs(program.inputs, given)
        before = [t.clone() for t in given]
        outputs = program(*given)
        assert all(map(torch.equal, given, before)), "a part wrote into what it was sent"
        check_inputs(program.outputs, outputs)
        made = {port.name: t for port, t in zip(program.outputs, outputs, strict=True)}
        if stage in fan.parts[1:]:
            assert not made.keys() & travelled.keys(), "two parts give the same name"
        travelled |= made
    return list(outputs), travelled


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        error = (one - other).abs().max() / other.abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE, f"off by {error:.1e} of the largest value"


def whole_stage(cutter: Cutter, first: int, last: int) -> StageGraph:
    cuts = [c for c in (first - 1, last) if 0 <= c < len(cutter.captured.nodes) - 1]
    return cutter.split(cuts)[1 if first else 0]


def settled(model: nn.Module) -> nn.Module:
    """Give norms real statistics."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            assert norm.running_var is not None
            norm.running_mean.normal_(0, 0.05)
            norm.running_var.uniform_(0.8, 1.2)
    return model.eval().requires_grad_(requires_grad=False)


def cutter_of(model: nn.Module, *inputs: Tensor) -> Cutter:
    return Cutter(capture(settled(model), inputs))


def rows(*shape: int, n: int = 2) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def assert_stage_same(
    cutter: Cutter, first: int, last: int, grid: tuple[int, int], inputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    stage = whole_stage(cutter, first, last)
    fan = split_tiles(cutter, first, last, grid)
    assert fan.gather.outputs == stage.outputs
    given = {port.name: t for port, t in zip(stage.inputs, inputs, strict=True)}
    found, travelled = run(fan, given)
    assert_same(found, reload(stage, None)(*inputs))
    return travelled
