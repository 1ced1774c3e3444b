"""How exact a split by channels is, on stages of real networks, from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.tensor import split_channels
from tests.benchmarks.rows import Row
from tests.fans import Span, inputs, run, run_fan, span, split, torchvision_model

__all__ = ["EQUAL", "PAIRS", "measure"]

EQUAL = "shards_equal"
PAIRS = "shards_pairs"
# network, behind, until: one layer, whose shards are concatenated
SHARDS = (
    ("resnet18", "maxpool", "layer1.0.conv1"),
    ("resnet18", "layer2", "layer3.0.conv1"),
    ("mobilenet_v2", "features.1", "features.2.conv.0"),
    ("vgg11", "features.7", "features.8"),
)
# two layers without an exchange between them, and one sum
BLOCKS = (
    ("resnet18", "maxpool", "layer1.0"),
    ("resnet18", "layer3.0", "layer3.1"),
    ("mobilenet_v2", "features.2", "features.3"),
    ("vgg11", "avgpool", "classifier.3"),
)
PARTS = (2, 4)
IMAGE = (3, 224, 224)


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Measure both, or one."""
    torch.set_num_threads(1)
    rows = []
    if EQUAL in goals:
        found = _differences(SHARDS)
        share = sum(value == 0 for value in found.values()) / len(found)
        other = [name for name, value in found.items() if value]
        note = f"{len(found)} splits" + (f"; other bits: {', '.join(other)}" if other else "")
        rows.append(Row(EQUAL, share, "of the splits bit for bit", goals[EQUAL], note))
    if PAIRS in goals:
        found = _differences(BLOCKS)
        note = ", ".join(f"{name} {value:.1e}" for name, value in found.items())
        rows.append(Row(PAIRS, max(found.values()), "relative error", goals[PAIRS], note))
    return rows


def _differences(stages: tuple[tuple[str, str, str], ...]) -> dict[str, float]:
    """Return, per stage in 2 and in 4 parts, the distance from the whole by the whole's norm."""
    found = {}
    with TemporaryDirectory() as folder:
        for network, behind, until in stages:
            cutter = split(torchvision_model(network), *IMAGE)
            stage = span(cutter, behind, until)
            for parts in PARTS:
                fan = split_channels(cutter, *stage, parts)
                name = f"{network} {until} / {parts}"
                found[name] = max(_distance(cutter, stage, fan, Path(folder), n) for n in (1, 8))
    return found


def _distance(cutter: Cutter, stage: Span, fan: Fan, folder: Path, rows: int) -> float:
    sent = inputs(cutter, stage[0], rows)
    whole, parts = run(cutter.stage(*stage), sent, None), run_fan(fan, sent, folder)
    return max(float((parts[n] - a).norm() / a.norm()) for n, a in whole.items())
