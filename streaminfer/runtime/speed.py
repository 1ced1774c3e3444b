"""How fast a worker is: what it asks its share of the partitions by.

one device     0.5 ms + 1.5 ms a sample   → 500/s: its stages take turns
two devices    0.5 ms ‖ 1.5 ms a sample   → 666/s: they work at once
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

__all__ = ["combined", "measured"]

log = logging.getLogger(__name__)

MOST = 50  # batches
ENOUGH = 0.5  # seconds


def measured(
    rows: int, run: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the samples per second of `run`, one batch of `rows`, that has run once before.

    The second one is not counted either: it may still fill caches. At least one more is.
    """
    run()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < ENOUGH and len(seconds) < MOST):
        began = clock()
        run()
        seconds.append(clock() - began)
    return rows / max(statistics.median(seconds), 1e-9)


def combined(stages: Iterable[tuple[Hashable, float | None]]) -> float:
    """Return the speed of a worker from (device, samples per second) of each of its stages.

    To two digits: noise must move no partitions. 1.0 where one could not be measured.
    """
    seconds: dict[Hashable, float] = defaultdict(float)
    for device, speed in stages:
        if speed is None:
            log.warning(
                "only the data settle the sizes here, so no speed was measured: replicas get equal"
                " shares; name them (shares: [2, 1]) if they are unlike"
            )
            return 1.0
        seconds[device] += 1 / speed
    return float(f"{1 / max(seconds.values()):.2g}")
