"""Our side of every comparison: a pipeline file out of `stages/`, run as a user would run it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.load import Load
from tests.benchmarks.processes import ROOT, Process, running
from tests.benchmarks.rows import Rate

__all__ = ["Pipeline", "measured", "pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline file in a folder of its own, where its plan is kept from one run to the next."""

    file: Path
    source: str  # topics
    target: str

    @asynccontextmanager
    async def running(self, address: str) -> AsyncIterator[Process]:
        """Run it on Kafka, a process per worker."""
        arguments = ["-m", "streaminfer", "run", str(self.file), "--kafka", address]
        folder = self.file.parent
        async with running("streaminfer", [*arguments, "--random-weights"], cwd=folder) as process:
            yield process


def pipeline(
    folder: Path, model: str, changes: Mapping[str, Any], *, threads: int | None = 1
) -> Pipeline:
    """Write `stages/MODEL/pipeline.yaml` with other settings into a folder."""
    stage = ROOT / "stages" / model
    raw = yaml.safe_load((stage / "pipeline.yaml").read_text())
    for key in ("factory", "weights"):
        name = raw["model"].get(key, "")
        if (stage / name.partition(":")[0]).is_file():
            raw["model"][key] = str(stage / name)
    raw["input"]["topic"] = f"{model}.images"
    raw["output"]["topic"] = f"{model}.predictions"
    raw["metrics"] = {"port": 0}
    raw["stages"] = [{**one, "threads": threads} for one in raw["stages"]]
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, Mapping) else value
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(raw))
    return Pipeline(file, raw["input"]["topic"], raw["output"]["topic"])


async def measured(
    load: Load, processes: Sequence[Process], warm: Sequence[bytes], images: Sequence[bytes]
) -> Rate:
    """Warm up, then send the images through whatever runs, and say what it cost."""
    await load.run(warm)
    before = sum(process.cpu_seconds() for process in processes)
    seconds = await load.run(images)
    used = sum(process.cpu_seconds() for process in processes) - before
    return Rate(len(images) / seconds, used / len(images) * 1e3)
