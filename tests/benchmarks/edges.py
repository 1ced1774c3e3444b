"""What casting an edge saves and costs: bytes of ResNet-50's activations, digits' answers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from stages.digits.images import scans
from streaminfer.cast import cast
from streaminfer.commands import plan_of
from streaminfer.parallel import load
from streaminfer.parallel.program import dump
from streaminfer.planning.profiler import capture_model, example_tensors
from streaminfer.planning.subject import subject
from streaminfer.planning.verify import verify
from streaminfer.runtime.postprocess import batch_of
from streaminfer.runtime.rows import NAMES, as_bytes
from streaminfer.spec.file import load as load_spec
from streaminfer.wire import Tensor, compress
from tests.benchmarks.rows import Row
from tests.pipelines.forms import DIGITS, copied

__all__ = ["FP16", "INT8", "measure"]

FP16, INT8 = "edge_fp16", "edge_int8"
KINDS = {FP16: "float16", INT8: "int8"}
LAYERS = ("layer1", "layer2", "layer3")


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Give bytes native by bytes as sent, without a codec; the note has zstd's and the drift."""
    live = _activations()
    rows = []
    for name, goal in goals.items():
        dtype = KINDS[name]
        saved, packed = {}, {}
        for layer, tensors in live.items():
            sent = {n: t.contiguous() for n, t in cast(tensors, dtype).items()}
            native = sum(t.nbytes for t in tensors.values())
            saved[layer] = native / sum(t.nbytes for t in sent.values())
            packed[layer] = native / sum(_zstd(t) for t in sent.values())
        told = ", ".join(f"{y} {saved[y]:.2f} ({packed[y]:.2f} with zstd)" for y in LAYERS)
        note = f"ResNet-50, random weights, behind {told}; {_drift(dtype)}"
        rows.append(Row(name, min(saved.values()), "x", goal, note))
    return rows


def _activations() -> dict[str, dict[str, torch.Tensor]]:
    """Return what crosses ResNet-50 behind a few layers, for four rows of seeded input."""
    captured = capture_model(
        subject("torchvision.models:resnet50", "{}", "3x224x224").spec, random_weights=True
    )
    *stages, _ = captured.cutter.split(captured.cutter.cuts(LAYERS))
    values = example_tensors(captured, 4)
    found = {}
    with torch.inference_mode():
        for layer, stage in zip(LAYERS, stages, strict=True):
            values = list(load(dump(stage), stage.weights)(*values))
            names = [port.name for port in stage.outputs]
            found[layer] = dict(zip(names, values, strict=True))
    return found


def _zstd(tensor: torch.Tensor) -> int:
    raw = Tensor(NAMES[tensor.dtype], tuple(tensor.shape), as_bytes(tensor))
    return compress(raw, "zstd").data.nbytes


def _drift(dtype: str) -> str:
    """Cut the trained digits in three and compare all scans with the whole model."""
    images = [value for _, _, value in scans()]
    with tempfile.TemporaryDirectory() as name:
        file = copied(DIGITS, Path(name), {"edges": {"default": {"dtype": dtype}}})
        spec = load_spec(file, environ={})
        where, _ = plan_of(spec, Path(name) / "plan", False)
        report = verify(spec, where, images=batch_of(images, spec.input), batch_sizes=(64,))
    return (
        f"trained digits in three stages, {report.samples} scans: top-1 as the whole "
        f"{report.top1_agreement:.2%}, largest error {report.max_rel:.1e} of the largest logit"
    )
