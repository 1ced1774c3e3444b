"""The ceiling: one of two processes with the whole ResNet-50, half of the images each.

`python -m tests.benchmarks.plain WEIGHTS IMAGES`: for each line on stdin it works once, prints the
seconds that it took.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.images import photos
from tests.benchmarks.network import BATCH, best, halves, prepare


def main(weights: Path, count: int) -> None:
    """Compute `count` images in batches for every line."""
    torch.set_num_threads(1)
    first, second = halves(weights)
    jpegs = list(photos(count))

    def work(images: list[bytes]) -> None:
        with torch.inference_mode():
            for k in range(0, len(images), BATCH):
                best(second(first(prepare(images[k : k + BATCH]))))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    work(jpegs[: 2 * BATCH])
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work(jpegs)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
