"""Where a model may be cut: one row per layer end, with what would cross there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.planning.example import example_inputs
from streaminfer.planning.factory import make_model
from streaminfer.spec import ModelSpec

__all__ = ["CutRow", "list_cuts"]


class CutRow(NamedTuple):
    """A legal cut behind a layer. `nbytes`: per image, as the edge's dtype `native` sends it."""

    layer: str
    position: int
    tensors: int
    nbytes: int
    weights_before: float  # share of all weight bytes, 0 to 1


def list_cuts(
    model: ModelSpec,
    path: Path | None = None,
    *,
    random_weights: bool = False,
    trust: bool = False,
) -> list[CutRow]:
    """Return the legal cuts at layer ends, first to last.

    Of layers that end at the same point, the outermost is named.

    Args:
        model: of a pipeline file, or made of a factory and an example's shape.
        path: the pipeline file, at whose folder relative paths start.
        random_weights: don't load weights; they change nothing here.
        trust: read `model.file`, though its reader can run what is in it.

    Raises:
        ConfigError, CaptureError: the model cannot be made or captured.
    """
    base = path.parent if path else None
    made = make_model(model, base, random_weights=random_weights, trust=trust)
    example = example_inputs(model)
    cutter = Cutter(capture(made, example.args, example.kwargs))
    outermost: dict[int, str] = {}
    for layer in cutter.captured.layers:
        known = outermost.setdefault(layer.last, layer.path)
        outermost[layer.last] = min(known, layer.path, key=len)
    legal = set(cutter.legal)
    weights = cutter.weights_before()
    return [
        CutRow(name, cut, len(cutter.live(cut)), cutter.row_bytes(cut), weights[cut] / weights[-1])
        for cut, name in sorted(outermost.items())
        if cut in legal
    ]
