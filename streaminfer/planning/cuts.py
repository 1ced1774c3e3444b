"""Where a model may be cut: one row per layer end, with what would cross there.

And what could be done with the layers up to there: split by channels, or in tiles of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.spatial import tiles_problem
from streaminfer.parallel.tensor import channels_problem
from streaminfer.planning.example import example_inputs
from streaminfer.planning.factory import make_model
from streaminfer.spec import ModelSpec

__all__ = ["CutRow", "list_cuts"]

PARTS, GRID = 2, (2, 2)  # what is tried of a split


class CutRow(NamedTuple):
    """A legal cut behind a layer. `nbytes`: per image, as the edge's dtype `native` sends it.

    `channels` and `tiles` are of the stage from the cut before (the row above) to this one,
    `channels_of_layer` of the layer with all that is in it, as attention or a block; not where that
    is the same. `tiles_up_to_here` is of the model's beginning to this cut.
    """

    layer: str
    position: int
    tensors: int
    nbytes: int
    weights_before: float  # share of all weight bytes, 0 to 1
    channels: bool  # split: {by: channels, parts: 2} works
    channels_of_layer: bool
    tiles: bool  # split: {by: tiles, grid: [2, 2]} works, exactly
    tiles_up_to_here: bool
    sample: tuple[int, ...] = ()  # what `nbytes` is of, where samples have many sizes: the largest


def list_cuts(
    model: ModelSpec,
    path: Path | None = None,
    *,
    random_weights: bool = False,
    trust: bool = False,
    seen: Callable[[int, int], None] = lambda done, total: None,
) -> list[CutRow]:
    """Return the legal cuts at layer ends, first to last.

    Of layers that end at the same point, the outermost is named.

    Args:
        model: of a pipeline file, or made of a factory and an example's shape.
        path: the pipeline file, at whose folder relative paths start.
        random_weights: don't load weights; they change nothing here.
        trust: read `model.file`, though its reader can run what is in it.
        seen: is told how many of how many cuts were looked at.

    Raises:
        ConfigError, CaptureError: the model cannot be made or captured.
    """
    base = path.parent if path else None
    made = make_model(model, base, random_weights=random_weights, trust=trust)
    example = example_inputs(model)
    cutter = Cutter(capture(made, example.args, example.kwargs, example.ranges))
    outermost: dict[int, str] = {}
    for layer in cutter.captured.layers:
        known = outermost.setdefault(layer.last, layer.path)
        outermost[layer.last] = min(known, layer.path, key=len)
    legal = set(cutter.legal)
    cuts = [(cut, name) for cut, name in sorted(outermost.items()) if cut in legal]
    weights = cutter.weights_before()
    rows: list[CutRow] = []
    first = 0
    for cut, name in cuts:
        seen(len(rows), len(cuts))
        before = cutter.captured.layers.find(name).first - 1
        begins = max((row.position + 1 for row in rows if row.position <= before), default=0)
        row = CutRow(
            layer=name,
            position=cut,
            tensors=len(cutter.live(cut)),
            nbytes=cutter.row_bytes(cut),
            weights_before=weights[cut] / weights[-1] if weights[-1] else 0.0,
            channels=not channels_problem(cutter, first, cut, PARTS),
            channels_of_layer=begins < first and not channels_problem(cutter, begins, cut, PARTS),
            tiles=not tiles_problem(cutter, first, cut, GRID),
            tiles_up_to_here=not tiles_problem(cutter, 0, cut, GRID),
            sample=next(iter(model.examples().values())).sizes() if model.varies else (),
        )
        rows.append(row)
        first = cut + 1
    return rows
