"""How long each node of a captured graph takes on a device, by batch size.

The graph runs in order on real input, node by node under a clock; the node times are then scaled
so that they sum to the time of the whole model without clocks in between:

    whole    ├──────────────── 40 ms ────────────────┤    lower quartiles of several repeats
    nodes    ├── 21 ──┤├─ 9 ─┤├──── 14 ────┤              44 ms together, so each 40/44 of it

A CPU worker with one thread is timed by that thread's own CPU clock, which stands still while
another program has the core. The wall clock tells whether one had.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from streaminfer.parallel.capture import Capture
from streaminfer.parallel.mutation import written
from streaminfer.parallel.weights import aligned
from streaminfer.planning.profile import Timing, quartile

__all__ = ["BUSY", "Runner", "available_memory", "cores", "measure", "threads_set"]

WARM = 1
REPEATS = range(5, 26)
SECONDS = 1.5  # of repeats per batch size, once there are enough of them
BUSY = 0.35  # upper ÷ lower quartile, minus 1: above it something else was running


@dataclass
class Runner:
    """A captured graph as calls that can be timed one by one; values are freed when dead."""

    captured: Capture
    device: torch.device
    _calls: list[tuple[fx.Node, tuple[Any, ...], dict[str, Any], list[fx.Node]]] = field(init=False)
    _weights: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        nodes = self.captured.nodes
        self._weights = {n: aligned(t.to(self.device)) for n, t in self.captured.tensors.items()}
        end = set(self.captured.outputs.values())
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(nodes):
            last[node] = i
            for source in node.all_input_nodes:
                last[source] = i
        dead: dict[int, list[fx.Node]] = {}
        for node, i in last.items():
            if node.op != "get_attr" and node not in end:
                dead.setdefault(i, []).append(node)
        self._calls = [
            (n, self._bound(n.args), self._bound(n.kwargs), dead.get(i, []))
            for i, n in enumerate(nodes)
        ]
        self._writes = any(written(node) for node in nodes)

    def _bound(self, value: Any) -> Any:
        """Put weights and the device in place; what is left are values of the run."""

        def put(item: object) -> object:
            if isinstance(item, fx.Node) and item.op == "get_attr":
                return self._weights[str(item.target)]
            return self.device if isinstance(item, torch.device) else item

        return map_aggregate(value, put)  # type: ignore[arg-type]

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        clock: _Clock | None = None,
        watch: Callable[[int, Mapping[fx.Node, Any]], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Run all nodes; `clock` times each, `watch` sees the values behind each position."""
        if self._writes:
            inputs = [tensor.clone() for tensor in inputs]
        values: dict[fx.Node, Any] = dict(zip(self.captured.inputs, inputs, strict=True))

        def get(item: object) -> object:
            return values[item] if isinstance(item, fx.Node) else item

        with torch.inference_mode():
            for i, (node, args, kwargs, dead) in enumerate(self._calls):
                args, kwargs = map_aggregate(args, get), map_aggregate(kwargs, get)  # type: ignore
                function: Any = node.target
                if clock:
                    clock.begin()
                values[node] = function(*args, **kwargs)
                if clock:
                    clock.end(i)
                if watch:
                    watch(i, values)
                del args, kwargs
                for gone in dead:
                    values.pop(gone, None)
        return {name: values[node] for name, node in self.captured.outputs.items()}


class _Clock:
    """Seconds per node: a clock on the CPU, events on a GPU, which computes behind our back."""

    def __init__(self, size: int, device: torch.device, now: Callable[[], float]) -> None:
        self.seconds: list[list[float]] = [[] for _ in range(size)]
        self._device, self._now, self._began = device, now, 0.0
        self._events: list[tuple[int, Any, Any]] = []

    def begin(self) -> None:
        if self._device.type == "cuda":
            self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._start.record()
        else:
            self._began = self._now()

    def end(self, position: int) -> None:
        if self._device.type == "cuda":
            stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            stop.record()
            self._events.append((position, self._start, stop))
        else:
            self.seconds[position].append(self._now() - self._began)

    def collect(self) -> None:
        """Read the events of a run that has ended."""
        synchronize(self._device)
        for position, start, stop in self._events:
            self.seconds[position].append(start.elapsed_time(stop) / 1000)
        self._events.clear()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(runner: Runner, whole: Callable[..., object], inputs: Sequence[torch.Tensor]) -> Timing:
    """Time the nodes and the whole model, by turns, on one batch.

    Args:
        runner: the captured graph on the device.
        whole: the model as a worker runs it, uncut.
        inputs: on the device; dimension 0 is the batch.
    """
    alone = runner.device.type == "cpu" and torch.get_num_threads() == 1
    now = time.thread_time if alone else time.perf_counter
    clock = _Clock(len(runner.captured.nodes), runner.device, now)
    totals: list[float] = []
    walls: list[float] = []
    for _ in range(WARM):
        whole(*inputs)
        runner.run(inputs)
    began = time.perf_counter()
    while len(totals) < REPEATS.start or (
        len(totals) < REPEATS.stop and time.perf_counter() - began < SECONDS
    ):
        synchronize(runner.device)
        start, wall = now(), time.perf_counter()
        whole(*inputs)
        synchronize(runner.device)
        totals.append(now() - start)
        walls.append(time.perf_counter() - wall)
        runner.run(inputs, clock=clock)
        clock.collect()
    nodes = [quartile(seconds, 0.25) for seconds in clock.seconds]
    low = quartile(totals, 0.25)
    scale = low / max(sum(nodes), 1e-12)
    return Timing(
        batch=len(inputs[0]),
        seconds=tuple(t * scale for t in nodes),
        whole=low,
        spread=quartile(walls, 0.75) / quartile(walls, 0.25) - 1,
    )


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Compute with so many threads, as the worker will."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory; of the CPU's, what is free now."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError):
        return 8 << 30
