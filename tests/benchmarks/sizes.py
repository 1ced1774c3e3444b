"""Images of many sizes, each as it is or rounded to a step, against all padded to the largest.

    rounded    32..96/32: 9 shapes        ÷  padded   every image in the corner of 96 x 96
    own        32..96: nearly as many
               shapes as images

ResNet-18 in two stages on the memory bus, all images waiting; two systems share each round.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import yaml
from PIL import Image

from streaminfer.app import LocalPipeline
from streaminfer.planning.source import ensure
from streaminfer.spec.file import load
from tests.benchmarks.rows import Rate, Row, alternate

__all__ = ["OWN", "ROUNDED", "measure"]

ROUNDED, OWN = "sizes_rounded", "sizes_own"
LOW, HIGH, STEP = 32, 96, 32  # pixels
IMAGES = 320
BATCH = 8
ROUNDS = 3
EXAMPLES = {
    "padded": [3, HIGH, HIGH],
    ROUNDED: [3, *[f"{LOW}..{HIGH}/{STEP}"] * 2],
    OWN: [3, *[f"{LOW}..{HIGH}"] * 2],
}
Images = Sequence[tuple[str, bytes]]


async def measure(goals: Mapping[str, str | None]) -> list[Row]:
    """Send the same pixels both ways: images a second, of many sizes ÷ padded."""
    with _one_thread(), TemporaryDirectory() as folder:
        own, padded = _images()
        systems = {
            name: partial(_rate, Path(folder), name, padded if name == "padded" else own)
            for name in EXAMPLES
            if name == "padded" or name in goals
        }
        rounds = await alternate(systems, ROUNDS)
    return [
        Row(name, rounds.ratio(name, "padded"), "x", goal, rounds.note(name, "padded"))
        for name, goal in goals.items()
    ]


async def _rate(folder: Path, name: str, images: Images) -> Rate:
    file = folder / f"{name}.yaml"
    raw = {
        "pipeline": name,
        "model": {
            "factory": "torchvision.models:resnet18",
            "kwargs": {"weights": None},
            "example": EXAMPLES[name],
        },
        "input": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "batch": {"max": BATCH, "wait": "4ms"},
        "kafka": {"partitions": 1},
        "metrics": {"port": 0},
        "stages": [
            {"name": "front", "until": "layer2", "threads": 1},
            {"name": "back", "threads": 1},
        ],
        "output": {"top_k": 1},
    }
    file.write_text(yaml.safe_dump(raw))
    spec = load(file, environ={})
    where = folder / f"plan-{name}"
    plan = ensure(spec, where, random_weights=True)
    async with LocalPipeline(spec, plan, where) as pipeline, pipeline.client() as client:

        async def send(some: Images) -> None:
            async for answer in client.stream(iter(some), concurrency=len(some), timeout=120):
                if answer.status != "ok":
                    raise RuntimeError(f"{answer.id}: {answer.error}")

        await send(images[: 3 * BATCH])
        began, used = time.perf_counter(), time.process_time()
        await send(images)
        seconds, used = time.perf_counter() - began, time.process_time() - used
    return Rate(len(images) / seconds, used / len(images) * 1e3)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _images() -> tuple[Images, Images]:
    """Return seeded images of any size in the range, and the same padded with black."""
    dice = np.random.default_rng(0)
    own, padded = [], []
    for k, (height, width) in enumerate(dice.integers(LOW, HIGH + 1, (IMAGES, 2))):
        pixels = dice.integers(0, 256, (height, width, 3), np.uint8)
        largest = np.zeros((HIGH, HIGH, 3), np.uint8)
        largest[:height, :width] = pixels
        own.append((str(k), _png(pixels)))
        padded.append((str(k), _png(largest)))
    return own, padded


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
