"""The first screen: 1,797 real scans through a model cut in three, answered, checked, explained.

`python stages/digits/demo.py [--serve]`; `make demo` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.live import Live
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from stages.digits.images import scans  # noqa: E402
from stages.digits.model import build  # noqa: E402
from stages.digits.train import normalise, split  # noqa: E402
from streaminfer import LocalPipeline, Prediction  # noqa: E402
from streaminfer.commands import plan_of  # noqa: E402
from streaminfer.screen import Progressing, Rows, table  # noqa: E402
from streaminfer.spec.file import load  # noqa: E402

YAML = HERE / "pipeline.yaml"


async def main(serve: bool) -> int:
    """Run the demo; 0 if every image got its one right-looking answer."""
    console = Console()
    spec = load(YAML)
    folder, plan = plan_of(spec, None, False)
    images = scans()
    devices = " ".join(device for s in spec.stages for device in s.devices)
    console.print(
        f"[bold]streaminfer[/]  pipeline {plan.pipeline}  bus memory  devices {devices}  "
        f"model {plan.model}@{plan.model_version}  plan {plan.digest[:8]}"
    )
    for stage in plan.stages:
        size = sum(t.row_bytes(stage.edge.dtype) for t in stage.inputs)
        console.print(
            f"  {stage.name:<8} {stage.layers[0]} … {stage.layers[-1]}".ljust(34)
            + f"weights {stage.weight_bytes:>8,} B   in {size:>7,} B/image",
            highlight=False,
        )
    async with LocalPipeline(spec, plan, folder, port=spec.metrics.port) as pipeline:
        answers, seconds = await stream(pipeline, images, [s.name for s in plan.stages], console)
        good = report(answers, images, seconds, console)
        console.print(
            f"metrics {pipeline.address}/metrics\n"
            "next    streaminfer run stages/digits/pipeline.yaml --kafka HOST:PORT   "
            "the same on Kafka, a process per stage\n"
            "        streaminfer verify stages/digits/pipeline.yaml   "
            "proof that the cut model is the model\n"
            "        streaminfer cut stages/digits/pipeline.yaml      where else it may be cut",
            highlight=False,
        )
        if serve:
            console.print("serving until Ctrl-C")
            await interrupted()
    return 0 if good else 1


async def stream(
    pipeline: LocalPipeline,
    images: Sequence[tuple[str, int, bytes]],
    stages: Sequence[str],
    console: Console,
) -> tuple[list[Prediction], float]:
    """Send all images and draw the stages while they are computed."""
    rows, bar = Rows([*stages, "sink"]), Progressing(len(images))
    answers: list[Prediction] = []
    began = time.perf_counter()

    async def draw(live: Live) -> None:
        while True:
            bar.done(len(answers))
            live.update(bar.draw(rows.look(pipeline.metrics.readings())))
            await asyncio.sleep(0.2)

    with Live(console=console, auto_refresh=False, transient=True) as live:
        drawing = asyncio.create_task(draw(live))
        async with pipeline.client() as client:
            answered = client.stream((name, value) for name, _, value in images)
            async for answer in answered:
                answers.append(answer)  # noqa: PERF401 - the screen looks at it meanwhile
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drawing
    seconds = time.perf_counter() - began
    console.print(table(rows.totals(pipeline.metrics.readings(), seconds)))
    return answers, seconds


def report(
    answers: Sequence[Prediction],
    images: Sequence[tuple[str, int, bytes]],
    seconds: float,
    console: Console,
) -> bool:
    """Compare with the labels and with the whole model; print what came out."""
    labels = {name: label for name, label, _ in images}
    fine = [a for a in answers if a.status == "ok"]
    right = {a.id for a in fine if a.top1.index == labels[a.id]}
    held = split(np.array([label for _, label, _ in images])).held_out
    held_names = {images[i][0] for i in held}
    held_right = sum(name in right for name in held_names)
    whole = uncut([value for _, _, value in images])
    names = [name for name, _, _ in images]
    scores = dict(zip(names, whole, strict=True))
    delta = max(abs(p.score - float(scores[a.id][p.index])) for a in fine for p in a.predictions)
    same = sum(a.top1.index == int(scores[a.id].argmax()) for a in fine)
    times = sorted(a.e2e_ms for a in answers)
    p50, p99 = times[len(times) // 2], times[int(len(times) * 0.99)]
    once = len({(a.source.partition, a.source.offset) for a in answers})
    console.print(
        f"{len(images)} images, {once} predictions   {len(images) / seconds:,.0f} images/s   "
        f"p50 {p50:.0f} ms   p99 {p99:.0f} ms\n"
        f"accuracy {len(right) / len(images):.4f} of all, "
        f"{held_right / len(held_names):.4f} of the {len(held_names)} scans held out of training\n"
        f"equal to the uncut model: top-1 of {same}/{len(fine)}, "
        f"largest score difference {delta:.1e}",
        highlight=False,
    )
    return once == len(images) == len(fine) and same == len(fine)


def uncut(values: Sequence[bytes]) -> torch.Tensor:
    """Return what the whole model says of the same files: softmax [N, 10]."""
    network = build()
    network.load_state_dict(load_file(HERE / "weights.safetensors"))
    grey = np.stack([np.asarray(Image.open(io.BytesIO(v)).convert("L")) for v in values])
    with torch.inference_mode():
        scores: torch.Tensor = network.eval()(normalise(grey)).softmax(1)
    return scores


async def interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="keep the pipeline up at the end")
    sys.exit(asyncio.run(main(parser.parse_args().serve)))
