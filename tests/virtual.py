"""An event loop whose clock is this program's CPU time: a loaded machine measures as an idle one.

    a callback runs          the clock moves by the CPU time of the loop's thread
    a job in an executor     runs at once, in its thread; its result comes after its CPU time,
                             behind the jobs before it (one thread per executor)
    nothing is ready         the clock jumps to the next timer

So every thread has a core of its own, and a prediction made here is told so. What the runtime's
modules call `time` becomes this clock, so the engine's own code runs unchanged.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

from streaminfer.planning import timing
from streaminfer.runtime import device, forward, outbox, receive, sink, steps, worker
from streaminfer.runtime.gather import Gather
from streaminfer.runtime.receive import Raw

__all__ = ["run"]

T = TypeVar("T")
CORES = 64  # more than there are threads
EPOCH = 1.7e9  # Unix seconds at the clock's 0


class _Selector(selectors.SelectSelector):
    """Never sleeps: the loop's clock jumps instead."""

    jump: Callable[[float], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(None)  # only a thread can wake it
        events = super().select(0)
        if not events and timeout > 0:
            self.jump(timeout)
        return events


class Loop(asyncio.SelectorEventLoop):
    """The loop; `time()` is its clock."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.jump = self._jump
        self._jumped = 0.0
        self._began = time.thread_time()
        self._free: dict[Executor | None, float] = {}
        self._threads = ThreadPoolExecutor(1)
        super().__init__(selector)

    def time(self) -> float:
        """Return the seconds of CPU time and of waiting so far."""
        return time.thread_time() - self._began + self._jumped

    def _jump(self, seconds: float) -> None:
        self._jumped += seconds

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        """Run it now; let its future be done when its thread would be."""
        future: asyncio.Future[Any] = self.create_future()

        def timed() -> tuple[float, Any, BaseException | None]:
            began = time.thread_time()
            try:
                result, error = func(*args), None
            except Exception as caught:
                result, error = None, caught
            return time.thread_time() - began, result, error

        seconds, result, error = (executor or self._threads).submit(timed).result()
        end = max(self.time(), self._free.get(executor, 0.0)) + seconds
        self._free[executor] = end

        def finish() -> None:
            if not future.done():
                future.set_result(result) if error is None else future.set_exception(error)

        self.call_at(end, finish)
        return future


class _Clock:
    """What a module sees as `time`."""

    def __init__(self, loop: Loop) -> None:
        self.monotonic = loop.time
        self.perf_counter = time.thread_time  # what a thread did: others may have run meanwhile

    def time(self) -> float:
        return EPOCH + self.monotonic()


@contextmanager
def _as_time(loop: Loop) -> Iterator[None]:
    clock = _Clock(loop)
    with ExitStack() as stack:
        for module in (device, forward, outbox, receive, sink, steps, worker):
            stack.enter_context(patch.object(module, "time", clock))
        stack.enter_context(patch.object(timing, "cores", lambda: CORES))
        # their default is the function itself, taken when the class was made
        for made in (Raw, Gather):
            stack.enter_context(patch.object(made.__init__, "__defaults__", (loop.time,)))
        yield


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end on such a loop."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, Loop)
        with _as_time(loop):
            return runner.run(work)
