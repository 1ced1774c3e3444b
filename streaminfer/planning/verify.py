"""Cut against whole: run the plan as workers do, from disk, and compare with the model itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils import _pytree as pytree

from streaminfer.errors import PlanError
from streaminfer.parallel import DTYPES, Program, check_inputs, load, weights
from streaminfer.plan import CAST, Edge, Plan, stage_files
from streaminfer.planning.example import Inputs, example_inputs
from streaminfer.planning.factory import make_model
from streaminfer.planning.source import source_key
from streaminfer.spec import PipelineSpec

__all__ = ["VerifyReport", "verify"]

# A value rounded to 16 bits is off by at most this much of itself.
ROUNDING = {"native": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Measured, per unit of rounding: the largest error is 0.6 (a trained CNN cut in the middle) to 6
# (ResNet-50 with random weights) standard deviations of the outputs. 32 leaves room for worse.
HEADROOM = 32
SAME_ROW = 1e-4  # of the outputs' deviation: kernels sum in other orders at other batch sizes


@dataclass(frozen=True)
class VerifyReport:
    """What `streaminfer verify` says."""

    holds: bool  # all of: equal_uncast, max_abs within the tolerance, rows_independent
    equal: bool  # bit for bit, at every batch size, as the workers compute
    equal_uncast: bool  # the same, were all edges native: the cut itself changes nothing
    max_abs: float
    max_rel: float  # max_abs over the largest absolute value of that output
    tolerance: float  # absolute; 0 where every edge is native
    top1_agreement: float | None  # share of rows with the same largest output; None: no classes
    rows_independent: bool  # a row alone gives what it gives in a batch
    stages: int
    batch_sizes: tuple[int, ...]
    samples: int
    digest: str

    def to_json(self) -> str:
        """Return it as one JSON object."""
        return json.dumps(dataclasses.asdict(self))


def verify(
    spec: PipelineSpec,
    plan_folder: Path,
    *,
    images: torch.Tensor | None = None,
    batch_sizes: Sequence[int] = (1, 2, 3, 8),
) -> VerifyReport:
    """Compare the stages of a plan directory with the whole model, on the CPU.

    Native edges must give the same bits at the same batch size and number of threads. An edge of
    16 bits rounds what crosses it; the tolerance is 32 times the sum of the edges' rounding (2⁻¹¹
    for float16, 2⁻⁸ for bfloat16) times the standard deviation of the model's outputs.

    Args:
        spec: the pipeline file.
        plan_folder: its plan directory.
        images: real input of the model's one argument, float32 [n, *example]; None: seeded random
            input.
        batch_sizes: compared one by one; images beyond the largest follow in batches of it.

    Raises:
        PlanError: there is no plan, or it is not of this spec.
        ConfigError: the model cannot be made.
    """
    plan = Plan.load(plan_folder)
    if plan.source != source_key(spec, plan.random_weights):
        raise PlanError(
            "this plan is not of this pipeline file and these model files",
            where=str(plan_folder),
            hint="build it again: streaminfer build PIPELINE",
        )
    base = spec.path.parent if spec.path else None
    model = make_model(spec.model, base, random_weights=plan.random_weights, trust=spec.trust)
    programs = [_load(plan_folder, stage.name) for stage in plan.stages]
    native = plan.model_copy(
        update={"stages": tuple(s.model_copy(update={"edge": Edge()}) for s in plan.stages)}
    )
    tally = _Tally()
    with torch.inference_mode(), _plain_attention():
        for batch in _batches(spec, images, batch_sizes):
            whole = _outputs(model, batch)
            tally.add(whole, _run(plan, programs, batch))
            uncast = _run(native, programs, batch)
            tally.equal_uncast &= all(map(torch.equal, whole, uncast))
            tally.check_rows(model, batch, whole)
    return _report(plan, tally, batch_sizes)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Switch off torch's fused attention of eager eval mode, which export does not see.

    It sums in another order; with it the whole model differs from itself in training IR.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(value=before)


def _load(folder: Path, stage: str) -> Program:
    graph, file = stage_files(folder, stage)
    try:
        document = graph.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read a stage: {error}", where=str(graph)) from None
    return load(document, weights.read(file))


def _batches(
    spec: PipelineSpec, images: torch.Tensor | None, sizes: Sequence[int]
) -> Iterator[Inputs]:
    rows = example_inputs(spec.model, max(sizes)) if images is None else _one(spec, images)
    for size in sizes:
        if size <= len(rows):
            yield rows[:size]
    for start in range(max(sizes), len(rows), max(sizes)):
        yield rows[start : start + max(sizes)]


def _one(spec: PipelineSpec, images: torch.Tensor) -> Inputs:
    example = spec.model.example
    return (
        Inputs(kwargs={next(iter(example)): images})
        if isinstance(example, dict)
        else Inputs((images,))
    )


def _outputs(model: nn.Module, batch: Inputs) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(batch.into(model))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _run(plan: Plan, programs: Sequence[Program], batch: Inputs) -> Sequence[torch.Tensor]:
    """Run all stages as workers do: cast for the edge, made contiguous, cast back, checked."""
    tensors: Sequence[torch.Tensor] = batch.ports(programs[0].inputs)
    for stage, program in zip(plan.stages, programs, strict=True):
        wire = CAST[stage.edge.dtype] if stage is not plan.stages[0] else None
        tensors = [
            _across(tensor, wire, DTYPES[port.dtype])
            for tensor, port in zip(tensors, stage.inputs, strict=True)
        ]
        check_inputs(stage.inputs, tensors)
        tensors = program(*tensors)
    return tensors


def _across(tensor: torch.Tensor, wire: str | None, dtype: torch.dtype) -> torch.Tensor:
    if wire and tensor.is_floating_point():
        tensor = tensor.to(DTYPES[wire]).to(dtype)
    return tensor.contiguous()


class _Tally:
    """What was found over all batches."""

    def __init__(self) -> None:
        self.equal, self.equal_uncast, self.rows_independent = True, True, True
        self.max_abs, self.max_rel, self.deviation = 0.0, 0.0, 0.0
        self.samples, self.ranked, self.agreed = 0, 0, 0

    def add(self, whole: Sequence[torch.Tensor], cut: Sequence[torch.Tensor]) -> None:
        self.samples += len(whole[0])
        for a, b in zip(whole, cut, strict=True):
            self.equal &= torch.equal(a, b)
            gap = _gap(a, b)
            self.max_abs = max(self.max_abs, gap)
            self.max_rel = max(self.max_rel, gap / max(float(a.double().abs().max()), 1e-30))
            self.deviation = max(self.deviation, _deviation(a))
        if whole[0].dim() == 2 and whole[0].shape[1] > 1:
            self.ranked += len(whole[0])
            self.agreed += int((whole[0].argmax(1) == cut[0].argmax(1)).sum())

    def check_rows(self, model: nn.Module, batch: Inputs, whole: Sequence[torch.Tensor]) -> None:
        """Compare the last row of a batch with that row alone: workers merge and split batches."""
        if len(batch) > 1:
            alone = _outputs(model, batch[-1:])
            self.rows_independent &= all(
                _gap(a[-1:], b) <= SAME_ROW * _deviation(a)
                for a, b in zip(whole, alone, strict=True)
            )


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference; infinite where one is no number and the other is."""
    gap = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, gap).nan_to_num(nan=torch.inf).max()) if a.numel() else 0.0


def _deviation(a: torch.Tensor) -> float:
    return float(a.double().std()) if a.numel() > 1 else float(a.double().abs().max())


def _report(plan: Plan, tally: _Tally, batch_sizes: Sequence[int]) -> VerifyReport:
    rounding = sum(ROUNDING[stage.edge.dtype] for stage in plan.stages[1:])
    tolerance = HEADROOM * rounding * tally.deviation
    return VerifyReport(
        holds=tally.equal_uncast and tally.max_abs <= tolerance and tally.rows_independent,
        equal=tally.equal,
        equal_uncast=tally.equal_uncast,
        max_abs=tally.max_abs,
        max_rel=tally.max_rel,
        tolerance=tolerance,
        top1_agreement=tally.agreed / tally.ranked if tally.ranked else None,
        rows_independent=tally.rows_independent,
        stages=len(plan.stages),
        batch_sizes=tuple(batch_sizes),
        samples=tally.samples,
        digest=plan.digest,
    )
