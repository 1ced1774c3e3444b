"""What the parts of a split stage weigh and take: built as they would run, timed beside the whole.

whole     ├──────────── 40 ms ────────────┤      by turns, lower quartiles of a few repeats
scatter   ├┤
part      ├────── 21 ms ─────┤                   the one with the most to do: others wait for it
gather    ├─┤

Times are given as measured; a planner takes them as shares of `whole`, whose time it knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from streaminfer.parallel import Port, load
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.program import dump
from streaminfer.parallel.spatial import split_tiles, tiles_problem
from streaminfer.parallel.tensor import channels_problem, split_channels
from streaminfer.plan import TensorSpec
from streaminfer.planning.predict import How
from streaminfer.planning.profile import DeviceProfile, quartile
from streaminfer.planning.profiler import Captured, example_tensors
from streaminfer.planning.splitting.fans import Figures
from streaminfer.planning.timing import synchronize, threads_set

__all__ = ["Parts"]

REPEATS = range(4, 12)
SECONDS = 0.3  # of repeats of one split, once there are enough of them
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Parts:
    """The splits of one captured model. It keeps their figures, and the weights of none."""

    captured: Captured
    _peaks: dict[tuple[int, int, How], tuple[int, int]] = field(default_factory=dict)
    _given: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None

    @property
    def images(self) -> bool:
        """Whether an input has rows and columns."""
        return any(node.meta["val"].dim() == 4 for node in self.captured.graph.inputs)

    def problem(self, first: int, last: int, how: How) -> str:
        """Say why the nodes first to last may not be split so; "" if they may."""
        cutter = self.captured.cutter
        if how.grid:
            return tiles_problem(cutter, first, last, how.grid)
        return channels_problem(cutter, first, last, how.parts)

    def figures(
        self, first: int, last: int, how: How, batch: int, device: DeviceProfile
    ) -> Figures | None:
        """Build a split and time it on a device; None if even a part is too large for that.

        Raises:
            CaptureError: it may not be split so.
        """
        cutter = self.captured.cutter
        fan = (
            split_tiles(cutter, first, last, how.grid)
            if how.grid
            else split_channels(cutter, first, last, how.parts)
        )
        try:
            with threads_set(device.threads):
                timed = _timed(
                    cutter.stage(first, last),
                    fan,
                    self._inputs(first, batch),
                    torch.device(device.device),
                )
        except torch.OutOfMemoryError:
            return None
        key = first, last, how
        if key not in self._peaks:
            self._peaks[key] = self._most_alive(first, fan)
        peak, gather_peak = self._peaks[key]
        sets = [tuple(port.name for port in part.inputs) for part in fan.parts]
        return Figures(
            *timed,
            takes=tuple(_row_bytes(part.inputs) for part in fan.parts),
            gives=tuple(_row_bytes(part.outputs) for part in fan.parts),
            shared=len(set(sets)) == 1,
            weights=max(_weight_bytes(part) for part in fan.parts),
            peak=peak,
            gather_weights=_weight_bytes(fan.gather),
            gather_peak=gather_peak,
        )

    def _inputs(self, first: int, batch: int) -> dict[str, torch.Tensor]:
        """Return what comes into a stage, computed by what lies before it; keep the last alone."""
        if self._given is None or self._given[0] != (first, batch):
            cutter = self.captured.cutter
            rows = example_tensors(self.captured, batch)
            names = [node.name for node in cutter.captured.inputs]
            found = dict(zip(names, rows, strict=True))
            if first:
                found = _call(cutter.stage(0, first - 1), found)
            self._given = (first, batch), found
        return self._given[1]

    def _most_alive(self, first: int, fan: Fan) -> tuple[int, int]:
        """Return the bytes of activations for one row, of the largest part and of the gather."""
        sent = self._inputs(first, 2)
        if fan.scatter is not None:
            sent = _call(fan.scatter, sent)
        given: dict[str, torch.Tensor] = {}
        most = 0
        for part in fan.parts:
            peak, made = _walk(part, sent)
            most, given = max(most, peak), given | made
        return most // 2, _walk(fan.gather, given)[0] // 2


def _row_bytes(ports: Sequence[Port]) -> int:
    return sum(
        TensorSpec(name=p.name, dtype=p.dtype, shape=p.shape, ranges=p.ranges).row_bytes()
        for p in ports
    )


def _weight_bytes(graph: StageGraph) -> int:
    return sum(tensor.nbytes for tensor in graph.weights.values())


def _call(graph: StageGraph, tensors: Tensors) -> dict[str, torch.Tensor]:
    program = load(dump(graph), graph.weights)
    made = program(*(tensors[port.name] for port in program.inputs))
    return {port.name: t.contiguous() for port, t in zip(program.outputs, made, strict=True)}


def _timed(
    whole: StageGraph, fan: Fan, given: Tensors, device: torch.device
) -> tuple[float, float, float, float]:
    """Return seconds of the whole stage, the scatter, the part with the most to do, the gather."""
    sent = _call(fan.scatter, given) if fan.scatter is not None else given
    made: dict[str, torch.Tensor] = {}
    for part in fan.parts:
        made |= _call(part, sent)
    largest = max(fan.parts, key=lambda p: (_weight_bytes(p), _row_bytes(p.inputs)))
    runs = [(whole, given), (largest, sent), (fan.gather, made)]
    runs += [(fan.scatter, given)] if fan.scatter is not None else []
    calls = [_bound(graph, tensors, device) for graph, tensors in runs]
    seconds = _by_turns(calls, device)
    return seconds[0], seconds[3] if len(seconds) > 3 else 0.0, seconds[1], seconds[2]


def _bound(graph: StageGraph, tensors: Tensors, device: torch.device) -> Callable[[], object]:
    program = load(dump(graph), graph.weights, device)
    return partial(program, *(tensors[port.name].to(device) for port in program.inputs))


def _by_turns(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    now = time.thread_time if alone else time.perf_counter
    laps: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    began = time.perf_counter()
    while len(laps[0]) < REPEATS.start or (
        len(laps[0]) < REPEATS.stop and time.perf_counter() - began < SECONDS
    ):
        for call, taken in zip(calls, laps, strict=True):
            synchronize(device)
            start = now()
            call()
            synchronize(device)
            taken.append(now() - start)
    return [quartile(taken, 0.25) for taken in laps]


def _walk(graph: StageGraph, tensors: Tensors) -> tuple[int, dict[str, torch.Tensor]]:
    """Run a graph node by node; return the most bytes alive beside weights, and its outputs."""
    nodes = list(graph.graph.nodes)
    last = {source: i for i, node in enumerate(nodes) for source in node.all_input_nodes}
    values: dict[fx.Node, Any] = {}
    weights = {t.untyped_storage().data_ptr() for t in graph.weights.values()}
    most = 0
    with torch.inference_mode():
        for i, node in enumerate(nodes):
            if node.op == "output":
                (results,) = node.args
                break
            values[node] = _value(node, values, graph, tensors)
            most = max(most, _alive(values.values(), weights))
            for source in (*node.all_input_nodes, node):
                if last.get(source, i) <= i:
                    values.pop(source, None)
    assert isinstance(results, tuple)  # noqa: S101 - as the graphs of stages end
    made = [values[node] for node in results if isinstance(node, fx.Node)]
    return most, dict(zip([port.name for port in graph.outputs], made, strict=True))


def _value(
    node: fx.Node, values: Mapping[fx.Node, Any], graph: StageGraph, tensors: Tensors
) -> Any:
    if node.op == "placeholder":
        return tensors[str(node.target)]
    if node.op == "get_attr":
        return graph.weights[str(node.target)]
    function: Any = node.target
    args, kwargs = fx.node.map_aggregate(
        (node.args, node.kwargs), lambda n: values[n] if isinstance(n, fx.Node) else n
    )
    return function(*args, **kwargs)


def _alive(values: Any, weights: set[int]) -> int:
    """Return the bytes of the memory that values share, each once."""
    found: dict[int, int] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, torch.Tensor):
            memory = value.untyped_storage()
            if memory.data_ptr() not in weights:
                found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())
