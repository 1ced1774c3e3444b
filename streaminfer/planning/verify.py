"""Cut against whole: run the plan as workers do, from disk, and compare with the model itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from streaminfer.cast import cast, uncast
from streaminfer.errors import PlanError
from streaminfer.parallel import DTYPES, Program, check_inputs, load, weights
from streaminfer.plan import PRESENT, Edge, Plan, StagePlan, exit_files, stage_files
from streaminfer.planning.example import Inputs, example_inputs
from streaminfer.planning.reference import Whole, reference
from streaminfer.planning.source import source_key
from streaminfer.spec import ModelSpec, PipelineSpec

__all__ = ["VerifyReport", "verify"]

CPU = torch.device("cpu")

# A value rounded to 16 bits is off by at most this much of itself. In int8 it is off by half a
# step, 0.5 / 127 of the largest value under its scale, which is some 4 times a usual one:
# measured, the error of int8 is 3 to 4 times that of bfloat16, whose rounding is the same 2⁻⁸.
ROUNDING = {"native": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 4 * 0.5 / 127}
# Measured, per unit of rounding: the largest error is 0.6 (a trained CNN cut in the middle) to 16
# (ResNet-50 with random weights) standard deviations of the outputs. 32 leaves room for worse.
HEADROOM = 32
# Of the largest output: parts of a stage are summed in another order than the whole, by other
# kernels. Measured, ResNet-50 at 448 pixels: 3e-6 in tiles up to layer2, and 2e-6 between the whole
# on one thread and on two.
SUMS = 1e-5
# Where sizes vary: all at the lowest, all at the highest, between, and the second unlike the first.
SHARES = ((0.0,), (1.0,), (0.37,), (0.83, 0.21))
SAME_ROW = 1e-4  # of the outputs' deviation: kernels sum in other orders at other batch sizes


@dataclass(frozen=True)
class VerifyReport:
    """What `streaminfer verify` says."""

    holds: bool  # max_abs within the tolerance, with native edges too, and rows_independent
    equal: bool  # bit for bit, at every batch size, as the workers compute
    equal_uncast: bool  # the same, were all edges native: the cut itself changes nothing
    max_abs: float
    max_rel: float  # max_abs over the largest absolute value of that output
    tolerance: float  # absolute; 0 where no stage is split and every edge is native
    top1_agreement: float | None  # share of rows with the same largest output; None: no classes
    rows_independent: bool  # a row alone gives what it gives in a batch
    stages: int
    batch_sizes: tuple[int, ...]
    samples: int
    sizes: tuple[tuple[int, ...], ...]  # of samples, where model.example has a range
    digest: str

    def to_json(self) -> str:
        """Return it as one JSON object."""
        return json.dumps(dataclasses.asdict(self))


def verify(
    spec: PipelineSpec,
    plan_folder: Path,
    *,
    images: torch.Tensor | Sequence[torch.Tensor] | None = None,
    batch_sizes: Sequence[int] = (1, 2, 3, 8),
    device: torch.device = CPU,
) -> VerifyReport:
    """Compare the stages of a plan directory with the whole model, all on one device.

    Native edges must give the same bits at the same batch size and number of threads; where a
    stage is split, within 1e-5 of the largest output. An edge of 16 or 8 bits rounds what crosses
    it; the tolerance is 32 times the sum of the edges' rounding (2⁻¹¹ for float16,
    2⁻⁸ for bfloat16, four half steps, 4 · 0.5/127, for int8) times the standard deviation of the
    model's outputs.

    Args:
        spec: the pipeline file.
        plan_folder: its plan directory.
        images: real input of the model's one argument, float32 [n, *example], or several such
            where the example has a range; None: seeded random input, of the smallest size, the
            largest and some between.
        batch_sizes: compared one by one; images beyond the largest follow in batches of it.
        device: where both compute. On a GPU in full float32: what TF32 rounds is not the cut's.

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
    model = reference(spec, random_weights=plan.random_weights, device=device)
    programs = _Programs(plan, plan_folder, device)
    native = plan.model_copy(
        update={"stages": tuple(s.model_copy(update={"edge": Edge()}) for s in plan.stages)}
    )
    tally = _Tally()
    with torch.inference_mode(), _plain_attention(), _full_float32():
        for rows in _batches(spec, plan, images, batch_sizes):
            batch = rows.to(device)
            whole = model(batch)
            tally.add(whole, programs.run(plan, batch))
            tally.add_uncast(whole, programs.run(native, batch))
            tally.check_rows(model, batch, whole)
            if spec.first_model.varies:
                tally.sizes[tuple(batch.ports(programs.inputs)[0].shape[1:])] = None
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


@contextmanager
def _full_float32() -> Iterator[None]:
    """Let a GPU multiply float32 with all of its bits; torch's default rounds for convolutions."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def _batches(
    spec: PipelineSpec,
    plan: Plan,
    images: torch.Tensor | Sequence[torch.Tensor] | None,
    sizes: Sequence[int],
) -> Iterator[Inputs]:
    model = spec.first_model
    if images is None:
        alike = [r.name for s in plan.stages[0].inputs for r in s.ranges if r is not None]
        shares = SHARES if model.varies else ((1.0,),)
        usable = [one for one in shares if len(one) == 1 or not any(alike)]
        found = [example_inputs(model, max(sizes), one) for one in usable]
    else:
        several = [images] if isinstance(images, torch.Tensor) else images
        found = [_one(model, one) for one in several]
    for rows in found:
        for size in sizes:
            if size <= len(rows):
                yield rows[:size]
        for start in range(max(sizes), len(rows), max(sizes)):
            yield rows[start : start + max(sizes)]


def _one(model: ModelSpec, images: torch.Tensor) -> Inputs:
    if isinstance(model.example, dict):
        return Inputs(kwargs={next(iter(model.example)): images})
    return Inputs((images,))


class _Programs:
    """The stages of a plan directory, run in one process as workers run them."""

    def __init__(self, plan: Plan, folder: Path, device: torch.device) -> None:
        self._device = device
        self._stages = {s.name: _load(stage_files(folder, s.name), device) for s in plan.stages}
        self.inputs = self._stages[plan.stages[0].name].inputs
        exits = [s for s in plan.stages if s.exit is not None]
        self._exits = {s.name: _load(exit_files(folder, s.name), device) for s in exits}

    def run(self, plan: Plan, batch: Inputs) -> list[torch.Tensor]:
        """Run all: cast for the edge, made contiguous, cast back, checked."""
        made: dict[str, dict[str, torch.Tensor]] = {}
        answers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for stage in plan.stages:
            inputs = self._inputs(stage, made, batch)
            check_inputs(stage.inputs, inputs)
            values = self._stages[stage.name](*inputs)
            made[stage.name] = dict(zip((s.name for s in stage.outputs), values, strict=True))
            if stage.exit is not None:
                (logits,) = self._exits[stage.name](*values)
                sure = logits.float().softmax(1).amax(1) >= stage.exit.threshold
                answers.append((sure, logits))
        outputs = list(made[plan.stages[-1].name].values())
        for sure, logits in reversed(answers):  # the first that is sure has the last word
            outputs = [torch.where(sure[:, None], logits, outputs[0])]
        return outputs

    def _inputs(
        self, stage: StagePlan, made: dict[str, dict[str, torch.Tensor]], batch: Inputs
    ) -> list[torch.Tensor]:
        if not stage.sources:
            return [tensor.contiguous() for tensor in batch.ports(self._stages[stage.name].inputs)]
        given = {name: made[s.stage][name] for s in stage.sources for name in s.tensors}
        sent = cast(given, stage.edge.dtype)
        sent.setdefault(PRESENT, torch.ones(len(batch), len(stage.sources), device=self._device))
        return [uncast(p.name, sent, DTYPES[p.dtype]).contiguous() for p in stage.inputs]


def _load(files: tuple[Path, Path], device: torch.device) -> Program:
    graph, file = files
    try:
        document = graph.read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read a stage: {error}", where=str(graph)) from None
    return load(document, weights.read(file), device)


class _Tally:
    """What was found over all batches."""

    def __init__(self) -> None:
        self.equal, self.equal_uncast, self.rows_independent = True, True, True
        self.max_abs, self.max_rel, self.deviation = 0.0, 0.0, 0.0
        self.max_uncast, self.largest = 0.0, 0.0
        self.samples, self.ranked, self.agreed = 0, 0, 0
        self.sizes: dict[tuple[int, ...], None] = {}

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

    def add_uncast(self, whole: Sequence[torch.Tensor], cut: Sequence[torch.Tensor]) -> None:
        """Compare as `add` does, with every edge native."""
        self.equal_uncast &= all(map(torch.equal, whole, cut))
        for a, b in zip(whole, cut, strict=True):
            self.largest = max(self.largest, float(a.double().abs().nan_to_num(0, 0, 0).max()))
            self.max_uncast = max(self.max_uncast, _gap(a, b))

    def check_rows(self, model: Whole, batch: Inputs, whole: Sequence[torch.Tensor]) -> None:
        """Compare the last row of a batch with that row alone: workers merge and split batches."""
        if len(batch) > 1:
            alone = model(batch[-1:])
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
    finite = a.double()[a.isfinite()]
    if not finite.numel():
        return 0.0
    return float(finite.std()) if finite.numel() > 1 else float(finite.abs().max())


def _report(plan: Plan, tally: _Tally, batch_sizes: Sequence[int]) -> VerifyReport:
    rounding = sum(ROUNDING[stage.edge.dtype] for stage in plan.stages if stage.sources)
    split = any(s.kind == "gather" for s in plan.stages)
    sums = SUMS * tally.largest if split else 0.0
    tolerance = HEADROOM * rounding * tally.deviation + sums
    return VerifyReport(
        holds=tally.max_uncast <= sums and tally.max_abs <= tolerance and tally.rows_independent,
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
        sizes=tuple(tally.sizes),
        digest=plan.digest,
    )
