"""Stage → independent tiles without halo, each answered like an image of its own: approximate.

The exact split is `spatial.split_tiles`. This one sends no halo and takes any model that runs on a
smaller image; what lies across the border of two tiles, or is larger than one, is not seen whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import fx

from streaminfer.errors import CaptureError
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.program import dump, load
from streaminfer.parallel.signature import DTYPES, Port
from streaminfer.parallel.spatial.tile import Box, crop, shares

__all__ = ["Reduce", "approximate_tiles"]

Reduce = Literal["mean", "sum", "vote"]
ROWS = 2  # of the batch that a tile is tried with

aten = torch.ops.aten


def approximate_tiles(
    stage: StageGraph, grid: tuple[int, int], reduce: Reduce, *, classes: bool = False
) -> Fan:
    """Run a stage on tiles of its image as if each were all of it.

    Args:
        stage: from the image [samples, channels, rows, columns] to the outputs of the model.
        grid: tiles from top to bottom, and from left to right; as equal as possible.
        reduce: what becomes of the tiles' outputs: their mean, their sum, or of [samples, classes]
            the share of the tiles that each class is the largest in.
        classes: votes go on as their logarithms, so that the softmax of them is the shares.

    Raises:
        CaptureError: the stage has no image, or the grid is finer; the model does not run on
            images of a tile's size, or its outputs would have another shape.
    """
    image = _image(stage)
    height, width = _pixels(image, grid)
    boxes = [
        (rows, columns) for rows in shares(height, grid[0]) for columns in shares(width, grid[1])
    ]
    _check_outputs(stage, reduce)
    sizes = [(bottom - top, right - left) for (top, bottom), (left, right) in boxes]
    for size in dict.fromkeys(sizes):
        _try(stage, image, size)
    parts = [_part(stage, image, k, box) for k, box in enumerate(boxes)]
    return Fan(_scatter(stage, image, boxes), tuple(parts), _gather(stage, parts, reduce, classes))


def _image(stage: StageGraph) -> Port:
    images = [port for port in stage.inputs if len(port.shape) == 4]
    if len(images) != 1:
        found = ", ".join(f"{port.name} {list(port.shape)}" for port in stage.inputs)
        raise CaptureError(
            f"approximate tiles need one image [samples, channels, rows, columns]; found {found}",
            hint="split the first stage, whose input is the image",
        )
    return images[0]


def _pixels(image: Port, grid: tuple[int, int]) -> tuple[int, int]:
    height, width = image.shape[2:]
    assert height is not None  # noqa: S101 - only dimension 0 is free
    assert width is not None  # noqa: S101 - only dimension 0 is free
    if min(grid) < 1 or grid[0] > height or grid[1] > width:
        raise CaptureError(
            f"a grid of {grid[0]}x{grid[1]} does not fit an image of {height}x{width}",
            hint=f"the finest grid is {height}x{width}",
        )
    return height, width


def _check_outputs(stage: StageGraph, reduce: Reduce) -> None:
    for port in stage.outputs:
        if not DTYPES[port.dtype].is_floating_point:
            raise CaptureError(f"output {port.name!r} is of {port.dtype}: it has no {reduce}")
        if reduce == "vote" and len(port.shape) != 2:
            raise CaptureError(
                f"output {port.name!r} has the shape {_text(port.shape)}: tiles vote on "
                "[samples, classes]",
                hint="reduce: mean",
            )


def _text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('samples' if n is None else str(n) for n in shape)}]"


def _try(stage: StageGraph, image: Port, size: tuple[int, int]) -> None:
    """Run the stage on a tile's size, with tensors that have shapes alone."""
    program = load(dump(stage), {n: t.to("meta") for n, t in stage.weights.items()}, "meta")
    inputs = [_cropped(port, size) if port is image else port for port in stage.inputs]
    tensors = [
        torch.empty(
            [ROWS if n is None else n for n in port.shape], dtype=DTYPES[port.dtype], device="meta"
        )
        for port in inputs
    ]
    tile = f"a tile of {size[0]}x{size[1]} of the image {image.shape[2]}x{image.shape[3]}"
    try:
        outputs = program(*tensors)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptureError(
            f"the model does not run on {tile}: {reason}",
            hint="a coarser grid, or exact tiles: split: {by: tiles} without reduce",
        ) from error
    for port, output in zip(stage.outputs, outputs, strict=True):
        if tuple(output.shape[1:]) != port.shape[1:]:
            raise CaptureError(
                f"output {port.name!r} of {tile} has the shape "
                f"{_text((None, *output.shape[1:]))}, of the whole {_text(port.shape)}",
                hint="reduce joins outputs of the same shape, such as [samples, classes]",
            )


def _cropped(image: Port, size: tuple[int, int]) -> Port:
    return image._replace(shape=(*image.shape[:2], *size))


def _tile_name(name: str, k: int) -> str:
    return f"{name}_tile{k}"


def _results(stage: StageGraph) -> Sequence[fx.Node]:
    results = stage.graph.output_node().args[0]
    assert isinstance(results, tuple)  # noqa: S101 - as `pipeline` makes it
    return [node for node in results if isinstance(node, fx.Node)]


def _part(stage: StageGraph, image: Port, k: int, box: Box) -> StageGraph:
    (top, bottom), (left, right) = box
    tile = _cropped(image, (bottom - top, right - left))._replace(name=_tile_name(image.name, k))
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            made[node] = graph.placeholder(tile.name if node.name == image.name else node.name)
        elif node.op != "output":
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in _results(stage)))
    return StageGraph(
        graph,
        stage.weights,
        tuple(tile if port is image else port for port in stage.inputs),
        tuple(
            port._replace(name=_tile_name(f"output{i}", k)) for i, port in enumerate(stage.outputs)
        ),
        stage.layers,
    )


def _scatter(stage: StageGraph, image: Port, boxes: Sequence[Box]) -> StageGraph:
    graph = fx.Graph()
    inputs = {port.name: graph.placeholder(port.name) for port in stage.inputs}
    height, width = _pixels(image, (1, 1))
    outputs = {port: inputs[port.name] for port in stage.inputs if port is not image}
    for k, box in enumerate(boxes):
        (top, bottom), (left, right) = box
        port = _cropped(image, (bottom - top, right - left))
        outputs[port._replace(name=_tile_name(image.name, k))] = crop(
            graph, inputs[image.name], box, ((0, height), (0, width))
        )
    return _finish(graph, stage.inputs, outputs)


def _finish(graph: fx.Graph, inputs: Sequence[Port], outputs: Mapping[Port, fx.Node]) -> StageGraph:
    graph.output(tuple(outputs.values()))
    return StageGraph(graph, {}, tuple(inputs), tuple(outputs), ())


def _gather(
    stage: StageGraph, parts: Sequence[StageGraph], reduce: Reduce, classes: bool
) -> StageGraph:
    graph = fx.Graph()
    call = graph.call_function
    ports = [port for part in parts for port in part.outputs]
    made = {port.name: graph.placeholder(port.name) for port in ports}
    outputs: dict[Port, fx.Node] = {}
    for i, port in enumerate(stage.outputs):
        answers = [made[_tile_name(f"output{i}", k)] for k in range(len(parts))]
        if reduce == "vote":
            best = [call(aten.argmax.default, (answer, 1)) for answer in answers]
            votes = [call(aten.one_hot.default, (one, port.shape[1])) for one in best]
            answers = [call(aten.to.dtype, (vote, DTYPES[port.dtype])) for vote in votes]
        stacked = call(aten.stack.default, (answers,))
        target = aten.sum.dim_IntList if reduce == "sum" else aten.mean.dim
        reduced = call(target, (stacked, [0]))
        logs = reduce == "vote" and classes
        outputs[port] = call(aten.log.default, (reduced,)) if logs else reduced
    return _finish(graph, ports, outputs)
