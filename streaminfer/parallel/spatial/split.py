"""Stage → tiles of the image: each part computes its box of the result, halo and all, exactly.

image ──▶ scatter: one crop a tile, each as large as the walk back from its share has found
             ├──▶ part 0   pads at the borders of the image only, crops at joins
             └──▶ part 1 ──▶ gather: rows of columns; sums of what was pooled, and the head
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from streaminfer.errors import CaptureError
from streaminfer.parallel.capture import is_batched, is_rows
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.layers import path_of
from streaminfer.parallel.mutation import written
from streaminfer.parallel.pipeline import Cutter, StageGraph, port
from streaminfer.parallel.spatial.halo import Rule, operator_name
from streaminfer.parallel.spatial.rules import Pool, multiply_accumulates, pool_of, rule_of
from streaminfer.parallel.spatial.tile import (
    Box,
    Output,
    Size,
    Tile,
    area,
    map_size,
    port_of_box,
    shares,
    union,
)

__all__ = ["overhead", "split_tiles", "tiles_problem"]

Grid = tuple[int, int]  # tiles from top to bottom, tiles from left to right


class _Obstacle(Exception):
    """Why a stage cannot be split; every stage that ends before `position` goes without it."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(message)
        self.position, self.message = position, message


@dataclass
class _Survey:
    """What each value of a stage is to a tile.

    A value in none of these follows from weights and the number of rows alone.
    """

    maps: dict[fx.Node, Size] = field(default_factory=dict)  # each tile has a box of it
    whole: set[fx.Node] = field(default_factory=set)  # of the stage's inputs alone; has no places
    pooled: set[fx.Node] = field(default_factory=set)  # known to the gather alone
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    pools: dict[fx.Node, Pool] = field(default_factory=dict)


VARIES = "tiles are cut of images of one size, and this model's have a range"


def split_tiles(cutter: Cutter, first: int, last: int, grid: tuple[int, int]) -> Fan:
    """Split the stage of the nodes first..last into tiles that together give what it gives.

    Each part gets a box of the image with its halo and holds all weights of the stage's maps; what
    is pooled over the whole map travels as vectors, and what follows it is computed in the gather.

    Args:
        cutter: the model.
        first: position of the stage's first node.
        last: position of its last node.
        grid: tiles from top to bottom, and from left to right; part k is row k // columns.

    Raises:
        CaptureError: a layer that looks at all of the map, or a grid finer than the map; names
            the layer and the nearest stage end that works.
    """
    if cutter.captured.sizes:
        raise CaptureError(
            VARIES, hint="by: channels takes every size; or one size: input.resize and input.crop"
        )
    try:
        tiling = _Tiling(cutter, first, last, grid)
    except _Obstacle as obstacle:
        raise CaptureError(obstacle.message, hint=_hint(cutter, first, obstacle, grid)) from None
    return tiling.fan()


def tiles_problem(cutter: Cutter, first: int, last: int, grid: tuple[int, int]) -> str:
    """Say why the stage of the nodes first..last may not be split so; "" if it may."""
    if cutter.captured.sizes:
        return VARIES
    try:
        _Tiling(cutter, first, last, grid)
    except _Obstacle as obstacle:
        return obstacle.message
    return ""


def overhead(cutter: Cutter, first: int, last: int, grid: tuple[int, int]) -> float:
    """Return the work of the busiest tile by that of the whole stage: 1 / tiles without halo.

    Work is multiply-accumulates of convolutions; in a stage without any, places computed.

    Raises:
        CaptureError: as `split_tiles`.
    """
    try:
        tiling, whole = (_Tiling(cutter, first, last, g) for g in (grid, (1, 1)))
    except _Obstacle as obstacle:
        raise CaptureError(obstacle.message, hint=_hint(cutter, first, obstacle, grid)) from None
    for measure in (multiply_accumulates, lambda _, box: area(box)):
        (total,) = whole.work(measure)
        if total:
            return max(tiling.work(measure)) / total
    return 1.0


def _hint(cutter: Cutter, first: int, obstacle: _Obstacle, grid: Grid) -> str:
    """Name the nearest layer before an obstacle at which the stage may end."""
    ends = {y.last: y.path for y in reversed(list(cutter.captured.layers))}
    legal = set(cutter.legal)
    for last in sorted((end for end in ends if first <= end < obstacle.position), reverse=True):
        if last in legal and not tiles_problem(cutter, first, last, grid):
            return f"the nearest stage end that works: `until: {ends[last]}`"
    return "no stage that begins here can be split by this grid: split it in another way"


def _place(node: fx.Node) -> str:
    path = path_of(node)
    return f"layer {path!r}" if path else "the model's own forward"


def _text(size: Size) -> str:
    return "x".join(map(str, size))


# ---- what may be split ---------------------------------------------------------------------------


def _survey(cutter: Cutter, first: int, last: int, inputs: Sequence[fx.Node]) -> _Survey:
    """Sort the values of a stage.

    Raises:
        _Obstacle: an operator that no tile can compute.
    """
    found = _Survey()
    for node in inputs:
        size = map_size(node)
        if size is not None and size != (1, 1):
            found.maps[node] = size
        else:
            found.whole.add(node)
    for position in range(first, last + 1):
        _sort(cutter, position, found)
    return found


def _sort(cutter: Cutter, position: int, found: _Survey) -> None:
    node = cutter.captured.nodes[position]
    data = [
        n for n in node.all_input_nodes if n in found.maps or n in found.whole or n in found.pooled
    ]
    what = f"{_place(node)} cannot be computed by tiles: aten.{operator_name(node)}"
    if written(node):
        raise _Obstacle(position, f"{what} writes into memory that others read")
    if not data or is_rows(node, cutter.captured.batch):
        return
    maps = [n for n in data if n in found.maps]
    pooled = [n for n in data if n in found.pooled]
    if not maps:
        (found.pooled if pooled else found.whole).add(node)
        return
    if pooled:
        raise _Obstacle(
            position,
            f"{what} joins the map with a value that was pooled over all of it "
            f"({_place(pooled[0])}), which no tile has",
        )
    pool = pool_of(node)
    if pool is not None:
        found.pools[node] = pool
        found.pooled.add(node)
        return
    rule = rule_of(node)
    size = map_size(node)
    if isinstance(rule, str):
        raise _Obstacle(position, f"{what}: {rule}")
    if size is None or not _has_rows(node, cutter):
        raise _Obstacle(position, f"{what}: its result has no rows and columns")
    found.rules[node], found.maps[node] = rule, size


def _has_rows(node: fx.Node, cutter: Cutter) -> bool:
    value = node.meta["val"]
    return isinstance(value, list | tuple) or is_batched(node, cutter.captured.batch)


# ---- the split -----------------------------------------------------------------------------------


class _Tiling:
    """A stage and a grid that fit; raises _Obstacle where they do not."""

    def __init__(self, cutter: Cutter, first: int, last: int, grid: Grid) -> None:
        self._captured, self._first, self._last = cutter.captured, first, last
        self._grid = grid
        self._nodes = cutter.captured.nodes[first : last + 1]
        self._inputs, self._outputs = cutter.inputs(first), cutter.outputs(last)
        if min(grid) < 1:
            raise _Obstacle(first, f"a grid of {_text(grid)} has no tiles")
        self._survey = _survey(cutter, first, last, self._inputs)
        own_outputs = [n for n in self._outputs.values() if n not in self._inputs]
        self._stitched = [n for n in dict.fromkeys(own_outputs) if n in self._survey.maps]
        self._wanted = [*self._stitched, *(p.all_input_nodes[0] for p in self._survey.pools)]
        self._check_grid()
        self._needs = [dict(self._need(k)) for k in range(grid[0] * grid[1])]
        taken = [node.name for node in (*self._inputs, *self._nodes)]
        self._suffix = "_tile"
        while any(self._suffix in name for name in taken):
            self._suffix += "_"

    def _check_grid(self) -> None:
        if not self._wanted:
            raise _Obstacle(
                self._first,
                "no map [samples, channels, rows, columns] goes through the stage: nothing to tile",
            )
        sizes = [self._survey.maps[node] for node in self._wanted]
        finest = min(h for h, _ in sizes), min(w for _, w in sizes)
        if self._grid[0] > finest[0] or self._grid[1] > finest[1]:
            smallest = min(self._wanted, key=lambda node: self._survey.maps[node])
            raise _Obstacle(
                self._last,
                f"a grid of {_text(self._grid)} is finer than the map of {_place(smallest)} at the "
                f"end of the stage, {_text(self._survey.maps[smallest])}: the finest grid that "
                f"works is {_text(finest)}",
            )

    def _share(self, node: fx.Node, k: int) -> Box:
        """Return tile k's share of a map."""
        rows, columns = map(shares, self._survey.maps[node], self._grid)
        return rows[k // self._grid[1]], columns[k % self._grid[1]]

    def _need(self, k: int) -> Mapping[fx.Node, Box]:
        """Walk back: the box of each map that tile k must have."""
        need: dict[fx.Node, Box] = {}
        for node in self._wanted:
            need[node] = union(need.get(node), self._share(node, k))
        for node in reversed(self._nodes):
            rule = self._survey.rules.get(node)
            if rule is None or node not in need:
                continue
            for source in node.all_input_nodes:
                if source in self._survey.maps:
                    box = rule.need(need[node], self._survey.maps[source])
                    need[source] = union(need.get(source), box)
        return need

    def work(self, measure: Callable[[fx.Node, Box], int]) -> list[int]:
        """Return the sum of a measure over what each tile computes."""
        rules = self._survey.rules
        return [
            sum(measure(node, box) for node, box in need.items() if node in rules)
            for need in self._needs
        ]

    def fan(self) -> Fan:
        """Build the graphs."""
        carried = self._carried()
        parts = [self._part(k, carried if k == 0 else []) for k in range(len(self._needs))]
        return Fan(self._scatter(parts), tuple(parts), self._gather(parts, carried))

    def _name(self, node: fx.Node, k: int) -> str:
        return f"{node.name}{self._suffix}{k}"

    def _carried(self) -> list[fx.Node]:
        """Return what the gather needs whole: what passes through, and what has no places."""
        survey = self._survey
        read = [
            source
            for node in self._nodes
            if node in survey.pooled and node not in survey.pools
            for source in node.all_input_nodes
        ]
        through = [node for node in self._outputs.values() if node in self._inputs]
        wanted = [n for n in (*read, *self._outputs.values()) if n in survey.whole]
        return list(dict.fromkeys([*through, *wanted]))

    def _whole_inputs(self, k: int, carried: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the inputs that a part reads whole, also by values that follow from them."""
        survey, wanted = self._survey, set(carried)
        for node in reversed(self._nodes):
            if (node in wanted and node in survey.whole) or node in self._needs[k]:
                wanted.update(n for n in node.all_input_nodes if n in survey.whole)
        return [node for node in self._inputs if node in wanted]

    def _part(self, k: int, carried: Sequence[fx.Node]) -> StageGraph:
        survey, need, tile = self._survey, self._needs[k], Tile(self._captured)
        through = {n: tile.take(n, n.name) for n in self._whole_inputs(k, carried)}
        for node in self._inputs:
            if node in survey.maps and node in need:
                tile.take_box(node, self._name(node, k), need[node])
        for node in self._nodes:
            if node in survey.rules and node in need:
                tile.put(node, *survey.rules[node].emit(tile, node, need[node]))
        outputs = [Output(through.get(node) or tile.value(node), port(node)) for node in carried]
        for node in self._stitched:
            share = self._share(node, k)
            made = tile.window(node, share)
            outputs.append(Output(made, port_of_box(node, self._name(node, k), share)))
        for node, pool in survey.pools.items():
            share = self._share(node.all_input_nodes[0], k)
            made = pool.emit(tile, node, share)
            outputs.append(Output(made, port(node, self._name(node, k))))
        return tile.end(outputs, self._layers(survey.rules))

    def _layers(self, nodes: Container[fx.Node]) -> tuple[str, ...]:
        at = [self._first + i for i, n in enumerate(self._nodes) if n in nodes]
        return self._captured.layers.within(min(at), max(at)) if at else ()

    def _scatter(self, parts: Sequence[StageGraph]) -> StageGraph:
        tile = Tile(self._captured)
        whole = {node.name: Output(tile.take(node, node.name), port(node)) for node in self._inputs}
        outputs: dict[str, Output] = {}
        for k, part in enumerate(parts):
            wanted = {taken.name for taken in part.inputs}
            outputs |= {name: output for name, output in whole.items() if name in wanted}
            for node in self._inputs:
                if self._name(node, k) in wanted:
                    height, width = self._survey.maps[node]
                    tile.put(node, whole[node.name].made, ((0, height), (0, width)))
                    box = self._needs[k][node]
                    name = self._name(node, k)
                    outputs[name] = Output(tile.window(node, box), port_of_box(node, name, box))
        return tile.end(list(outputs.values()), ())

    def _gather(self, parts: Sequence[StageGraph], carried: Sequence[fx.Node]) -> StageGraph:
        survey, tile = self._survey, Tile(self._captured)
        through = {node: tile.take(node, node.name) for node in carried}
        made = {
            given.name: tile.take_part(given)
            for part in parts
            for given in part.outputs
            if given.name not in {node.name for node in carried}
        }
        for node in self._stitched:
            tile.put(
                node, self._stitch([made[self._name(node, k)] for k in range(len(parts))], tile)
            )
        for node, pool in survey.pools.items():
            joined = made[self._name(node, 0)]
            for k in range(1, len(parts)):
                joined = tile.call(pool.join, joined, made[self._name(node, k)])
            tile.put(node, joined)
        for node in self._nodes:
            if node in survey.pooled:
                tile.copy(node)
        outputs = [
            Output(through.get(node) or tile.value(node), port(node, name))
            for name, node in self._outputs.items()
        ]
        return tile.end(outputs, self._layers(survey.pooled - survey.pools.keys()))

    def _stitch(self, boxes: Sequence[fx.Node], tile: Tile) -> fx.Node:
        """Join the shares of a map: columns to rows, rows to the map."""
        columns = self._grid[1]
        rows = [boxes[i : i + columns] for i in range(0, len(boxes), columns)]
        joined = [tile.join(row, 3) for row in rows]
        return tile.join(joined, 2)
