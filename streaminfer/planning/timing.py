"""How long each node of a captured graph takes on a device, by batch size.

The graph runs in order on real input, node by node under a clock; the node times are then scaled
so that they sum to the time of the whole model without clocks in between:

    whole    ├──────────────── 40 ms ────────────────┤    lower quartiles of several repeats
    nodes    ├── 21 ──┤├─ 9 ─┤├──── 14 ────┤              44 ms together, so each 40/44 of it

A CPU worker with one thread is timed by that thread's own CPU clock, which stands still while
another program has the core. The wall clock tells whether one had.

Some passes come after a pause, when caches hold other things. In others two threads run a half of
the model each, as the devices of two stages will: each has its own weights in its caches, and loses
to what the other moves through those they share. Neither changes all nodes alike.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import fx

from streaminfer.openmp import release_team
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import Values, dump, load
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
BESIDE, NEAR = 3, 0.3  # passes of each half beside the other, and seconds, in each of two rounds
LONG = 1.0  # seconds of a pass, from which on one of each kind will do
BUSY = 0.35  # upper ÷ lower quartile, minus 1: above it something else was running


class Runner:
    """Nodes of a model as a worker runs them, that can be timed and looked at one by one."""

    def __init__(
        self, cutter: Cutter, device: torch.device, first: int = 0, last: int | None = None
    ) -> None:
        self.nodes, self.device = cutter.captured.nodes, device  # all of the model's
        self._cutter = cutter
        stage = cutter.stage(first, len(self.nodes) - 1 if last is None else last)
        self.program = load(dump(stage), stage.weights, device)
        position = {node: i for i, node in enumerate(self.nodes)}
        self._name_here = {node.name: name for name, node in stage.origins.items()}
        self._position = {n: position[o] for n, o in stage.origins.items() if o in position}

    def halves(self, seconds: Sequence[float]) -> tuple[Runner, Runner] | None:
        """Cut where both sides take about as long; None: the model cannot be cut."""
        spent = list(accumulate(seconds))
        if not (legal := self._cutter.legal):
            return None
        cut = min(legal, key=lambda at: abs(spent[at] - spent[-1] / 2))
        return (
            Runner(self._cutter, self.device, 0, cut),
            Runner(self._cutter, self.device, cut + 1),
        )

    def run(
        self,
        inputs: Sequence[torch.Tensor],
        *,
        clock: _Clock | None = None,
        watch: Callable[[int, Values], None] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run its nodes; `clock` times each, `watch` sees the live values behind each position."""

        def step(name: str, run: Callable[[], None], values: Values) -> None:
            at = self._position.get(name)  # None: a copy of an input, or the like
            if clock:
                clock.begin()
            run()
            if clock and at is not None:
                clock.end(at)
            if watch and at is not None:
                watch(at, values)

        return self.program.stepped(inputs, step)

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
    for _ in range(WARM):
        runner.program(*inputs)
        runner.run(inputs)
    found = _by_turns(runner, inputs)
    return Timing(
        batch=len(inputs[0]),
        seconds=tuple(found.seconds),
        whole=found.whole,
        spread=found.spread,
        single=_single(runner, inputs, found.scale, PAUSES if found.whole < LONG else 1),
        beside=_beside(runner, inputs, found.seconds),
    )


class _Turns(NamedTuple):
    seconds: list[float]  # by node
    whole: float
    spread: float
    scale: float  # whole ÷ the nodes under a clock each


def _by_turns(runner: Runner, inputs: Sequence[torch.Tensor]) -> _Turns:
    """Time the nodes and all of them together, by turns."""
    now = _time_of(runner.device)
    clock = _Clock(len(runner.nodes), runner.device, now)
    totals: list[float] = []
    walls: list[float] = []
    began = time.perf_counter()
    while len(totals) < REPEATS.start or (
        len(totals) < REPEATS.stop and time.perf_counter() - began < SECONDS
    ):
        synchronize(runner.device)
        start, wall = now(), time.perf_counter()
        runner.program(*inputs)
        synchronize(runner.device)
        totals.append(now() - start)
        walls.append(time.perf_counter() - wall)
        runner.run(inputs, clock=clock)
        clock.collect()
    # what follows from weights alone may not be run at all
    nodes = [quartile(seconds, 0.25) if seconds else 0.0 for seconds in clock.seconds]
    low = quartile(totals, 0.25)
    scale = low / max(sum(nodes), 1e-12)
    spread = quartile(walls, 0.75) / quartile(walls, 0.25) - 1
    return _Turns([t * scale for t in nodes], low, spread, scale)


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
    runner: Runner, inputs: Sequence[torch.Tensor], seconds: Sequence[float]
) -> tuple[float, ...]:
    """Time the nodes while two threads run a half of the model each, over and over.

    Returns:
        Seconds by node; () if there are no cores for two, or the model cannot be cut.
    """
    threads = torch.get_num_threads()
    if runner.device.type != "cpu" or cores() < 2 * threads:
        return ()
    if (halves := runner.halves(seconds)) is None:
        return ()
    between = [value.contiguous() for value in halves[0].program(*inputs)]
    release_team()  # this thread only waits for the two
    pair = (_Half(halves[0], inputs), _Half(halves[1], between))
    for where in _places()[: 1 if sum(seconds) >= LONG else None]:
        _side_by_side(pair, where, threads)
    one, other = (half.nodes() for half in pair)
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _places() -> Sequence[tuple[set[int], set[int]]]:
    """Return the cores of both halves, round by round; two cores need not be alike: by turns."""
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(every) == 2:
        return [({every[0]}, {every[1]}), ({every[1]}, {every[0]})]
    return [(set(), set())] * 2  # where the kernel puts them


def _side_by_side(
    pair: tuple[_Half, _Half], where: tuple[set[int], set[int]], threads: int
) -> None:
    start = threading.Barrier(2)

    def work(half: _Half, other: _Half, cores: set[int]) -> None:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)  # of this thread, which ends soon
        try:
            half.warm()
            start.wait()
            half.measure(other)
            start.wait()
            half.look()
        except threading.BrokenBarrierError:
            pass  # the other one failed, and says why
        except BaseException:  # only then: an abort also stops who has not yet left a full barrier
            half.ended = True
            start.abort()
            raise

    with ThreadPoolExecutor(2, thread_name_prefix="beside") as pool:
        for done in [pool.submit(work, *one) for one in zip(pair, pair[::-1], where, strict=True)]:
            done.result()


class _Half:
    """One of two that run side by side, each in its thread."""

    def __init__(self, runner: Runner, inputs: Sequence[torch.Tensor]) -> None:
        self._runner, self._inputs = runner, inputs
        self._now = _time_of(runner.device)
        self._totals: list[float] = []  # a round's median each
        self._clock = _Clock(len(runner.nodes), runner.device, self._now)
        self.ended = False

    def warm(self) -> None:
        self.ended = False
        for _ in range(1 if self._totals else WARM):
            self._runner.program(*self._inputs)
            self._runner.run(self._inputs)

    def measure(self, other: _Half) -> None:
        """Time passes without clocks in between, for as long as the other does."""
        totals: list[float] = []
        began = time.perf_counter()
        while not (self.ended and other.ended):
            start = self._now()
            self._runner.program(*self._inputs)
            totals.append(self._now() - start)
            self.ended = len(totals) >= BESIDE and time.perf_counter() - began >= NEAR
        self._totals.append(statistics.median(totals))

    def look(self) -> None:
        """Time the nodes of a few passes."""
        for _ in range(BESIDE):
            self._runner.run(self._inputs, clock=self._clock)

    def nodes(self) -> list[float]:
        """Divide what a pass took among the nodes."""
        nodes = [statistics.median(seconds) if seconds else 0.0 for seconds in self._clock.seconds]
        scale = statistics.fmean(self._totals) / max(sum(nodes), 1e-12)
        return [scale * node for node in nodes]


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
