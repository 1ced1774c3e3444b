"""How long each node of a captured graph takes on a device, by batch size.

The graph runs in order on real input, node by node under a clock; the node times are then scaled
so that they sum to the time of the whole model without clocks in between:

    whole    ├──────────────── 40 ms ────────────────┤    lower quartiles of several repeats
    nodes    ├── 21 ──┤├─ 9 ─┤├──── 14 ────┤              44 ms together, so each 40/44 of it

A CPU worker with one thread is timed by that thread's own CPU clock, which stands still while
another program has the core. The wall clock tells whether one had.

Some passes come after a pause, when caches hold other things, and some while another thread runs
the same model, as the device of another stage will: both take longer, and not all nodes alike.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import Program, Values, dump, load
from streaminfer.planning.profile import Timing, quartile

__all__ = [
    "BUSY",
    "PAUSE",
    "PAUSES",
    "Runner",
    "available_memory",
    "cores",
    "measure",
    "threads_set",
]

WARM = 2  # passes: a program's second one compiles it
REPEATS = range(5, 26)
SECONDS = 1.5  # of repeats per batch size, once there are enough of them
PAUSES, PAUSE = 5, 0.01  # single passes, and the seconds before each
BESIDE = 3  # passes beside another thread
LONG = 1.0  # seconds of a pass, from which on one of each kind will do
BUSY = 0.35  # upper ÷ lower quartile, minus 1: above it something else was running


class Runner:
    """The whole model as a worker runs it, whose nodes can be timed and looked at one by one."""

    def __init__(self, cutter: Cutter, device: torch.device) -> None:
        (stage,) = cutter.split([])
        self.nodes, self.device = cutter.captured.nodes, device
        self._stage = stage
        self.whole = self.again()
        position = {node: i for i, node in enumerate(self.nodes)}
        self._name_here = {node.name: name for name, node in stage.origins.items()}
        self._position = {n: position[o] for n, o in stage.origins.items() if o in position}

    def again(self) -> Program:
        """Return the program once more, of the same weights, for another thread."""
        return load(dump(self._stage), self._stage.weights, self.device)

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        clock: _Clock | None = None,
        watch: Callable[[int, Values], None] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run all nodes; `clock` times each, `watch` sees the live values behind each position."""

        def step(name: str, run: Callable[[], None], values: Values) -> None:
            at = self._position.get(name)  # None: a copy of an input, or the like
            if clock:
                clock.begin()
            run()
            if clock and at is not None:
                clock.end(at)
            if watch and at is not None:
                watch(at, values)

        return self.whole.stepped(inputs, step)

    def here(self, node: fx.Node) -> str:
        """Return the name of a node's value in this run."""
        return self._name_here.get(node.name, node.name)


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


def measure(runner: Runner, inputs: Sequence[torch.Tensor]) -> Timing:
    """Time the nodes and the whole model, by turns, on one batch.

    Args:
        runner: the model on the device.
        inputs: on the device; dimension 0 is the batch.
    """
    now = _time_of(runner.device)
    clock = _Clock(len(runner.nodes), runner.device, now)
    totals: list[float] = []
    walls: list[float] = []
    for _ in range(WARM):
        runner.whole(*inputs)
        runner.run(inputs)
    began = time.perf_counter()
    while len(totals) < REPEATS.start or (
        len(totals) < REPEATS.stop and time.perf_counter() - began < SECONDS
    ):
        synchronize(runner.device)
        start, wall = now(), time.perf_counter()
        runner.whole(*inputs)
        synchronize(runner.device)
        totals.append(now() - start)
        walls.append(time.perf_counter() - wall)
        runner.run(inputs, clock=clock)
        clock.collect()
    # what follows from weights alone may not be run at all
    nodes = [quartile(seconds, 0.25) if seconds else 0.0 for seconds in clock.seconds]
    low = quartile(totals, 0.25)
    scale = low / max(sum(nodes), 1e-12)
    return Timing(
        batch=len(inputs[0]),
        seconds=tuple(t * scale for t in nodes),
        whole=low,
        spread=quartile(walls, 0.75) / quartile(walls, 0.25) - 1,
        single=_single(runner, inputs, scale, PAUSES if low < LONG else 1),
        beside=_beside(runner, inputs, scale, BESIDE if low < LONG else 1),
    )


def _time_of(device: torch.device) -> Callable[[], float]:
    """Return the clock of what this thread computes."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _single(
    runner: Runner, inputs: Sequence[torch.Tensor], scale: float, passes: int
) -> tuple[tuple[float, ...], ...]:
    """Time the nodes in passes that come after a pause each."""
    found = []
    for _ in range(passes):
        clock = _Clock(len(runner.nodes), runner.device, _time_of(runner.device))
        time.sleep(PAUSE)
        runner.run(inputs, clock=clock)
        clock.collect()
        found.append(tuple(scale * sum(seconds) for seconds in clock.seconds))
    return tuple(found)


def _beside(
    runner: Runner, inputs: Sequence[torch.Tensor], scale: float, passes: int
) -> tuple[float, ...]:
    """Time the nodes while another thread runs the model; () if there is no core for it."""
    threads = torch.get_num_threads()
    if runner.device.type != "cpu" or cores() < 2 * threads:
        return ()
    other, stop, warm = runner.again(), threading.Event(), threading.Event()

    def work() -> None:
        torch.set_num_threads(threads)
        try:
            while not stop.is_set():
                other(*inputs)
                warm.set()
        finally:
            warm.set()

    clock = _Clock(len(runner.nodes), runner.device, _time_of(runner.device))
    thread = threading.Thread(target=work, name="beside")
    thread.start()
    try:
        warm.wait()
        for _ in range(passes):
            runner.run(inputs, clock=clock)
    finally:
        stop.set()
        thread.join()
    return tuple(scale * statistics.median(s) if s else 0.0 for s in clock.seconds)


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
