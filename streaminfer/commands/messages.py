"""Commands about messages: send images, watch predictions."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaminfer.client import Client, Prediction
from streaminfer.errors import ConfigError

if TYPE_CHECKING:
    from streaminfer.spec import PipelineSpec

__all__ = ["either", "files", "on_signals", "print_answers", "send", "watch"]

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


async def send(spec: PipelineSpec, paths: Sequence[str], *, wait: bool, rate: float | None) -> int:
    """Send files; with `wait` print each outcome, and return 1 if any has no prediction."""
    stop = on_signals()
    async with Client(pipeline=spec) as client:
        if wait:
            return await print_answers(client, paths, stop, rate)
        acks, count = [], 0
        async for name, value in _paced(paths, rate):
            acks.append(await client.send(value, id=name))
            count += 1
            if stop.is_set():
                break
        await asyncio.gather(*acks)
        print(f"sent {count} images to {spec.input.topic}")
    return 0


async def print_answers(
    client: Client, paths: Sequence[str], stop: asyncio.Event, rate: float | None = None
) -> int:
    """Stream files, print each outcome as a JSON line; return 1 if any has no prediction."""
    bad = 0
    async with aclosing(client.stream(_paced(paths, rate))) as answers:
        async for answer in answers:
            print(json.dumps(answer.raw), flush=True)
            bad += answer.status != "ok"
            if stop.is_set():
                break
    return 1 if bad else 0


async def watch(
    spec: PipelineSpec, *, from_beginning: bool, count: int | None, as_json: bool
) -> None:
    """Print predictions until Ctrl-C, or `count` of them."""
    stop = on_signals()
    async with Client(pipeline=spec) as client:

        async def show() -> None:
            seen = 0
            async with aclosing(client.watch(from_beginning=from_beginning)) as answers:
                async for answer in answers:
                    print(json.dumps(answer.raw) if as_json else _line(answer), flush=True)
                    seen += 1
                    if seen == count:
                        return

        await either(show(), stop.wait())


def _line(answer: Prediction) -> str:
    if answer.error:
        what = answer.error
        return f"{answer.id}  {answer.status}  {what.stage}/{what.kind}: {what.message}"
    best = "  ".join(f"{p.label} {p.score:.3f}" for p in answer.predictions[:3])
    return f"{answer.id}  {best or 'ok'}  {answer.e2e_ms:.0f} ms"


async def _paced(paths: Sequence[str], rate: float | None) -> AsyncIterator[tuple[str, bytes]]:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    for k, (name, value) in enumerate(files(paths)):
        if rate and (pause := begin + k / rate - loop.time()) > 0:
            await asyncio.sleep(pause)
        yield name, value


def files(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read what the user named: files, the images of folders (sorted, recursive), stdin."""
    for text in paths:
        path = Path(text)
        if text == "-":
            yield "stdin", sys.stdin.buffer.read()
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGES)
            if not found:
                raise ConfigError(
                    f"no images in {path}", hint=f"looked for {', '.join(sorted(IMAGES))}"
                )
            for image in found:
                yield str(image.relative_to(path)), image.read_bytes()
        elif path.is_file():
            yield path.name, path.read_bytes()
        else:
            raise ConfigError(f"no such file or folder: {path}")


def on_signals() -> asyncio.Event:
    """Return the event that SIGTERM and Ctrl-C set; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def again(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, again, number)
    return stop


async def either(*works: Any) -> None:
    """Run until the first of them ends; cancel the others, raise what it raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
