"""`streaminfer plan` as a user types it, and what the file that it writes does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from streaminfer import LocalPipeline
from streaminfer.cli import app
from streaminfer.commands.records import inputs_of
from streaminfer.planning import profiler
from streaminfer.planning.build import build
from streaminfer.planning.verify import verify
from streaminfer.spec.file import load

__all__ = ["answered", "planned", "streaminfer", "work_in"]


def work_in(folder: Path, model: str, patch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with model.py; measure and foresee little, and keep it on a busy machine."""
    patch.chdir(folder)
    patch.setattr(profiler, "BUSY", float("inf"))
    patch.setattr("streaminfer.commands.planning.BATCHES", (1, 2))
    patch.setattr("streaminfer.planning.timing.SECONDS", 0.0)
    patch.setattr("streaminfer.planning.profiler.cores", lambda: 2)
    patch.setattr("streaminfer.commands.tryout.SECONDS", 0.3)
    patch.setattr("streaminfer.commands.engine.SECONDS", 0.2)
    patch.setattr("streaminfer.commands.timing.LEAST", 0.002)
    patch.setattr("streaminfer.planning.forecast.MANY", 500)
    patch.setattr("streaminfer.planning.forecast.RANDOM", 500)
    (folder / "model.py").write_text(model)
    return folder


def streaminfer(*arguments: str) -> Result:
    """Run a command. Raises what it raises."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def planned(*arguments: str) -> dict[str, Any]:
    """Run `plan`, and return its JSON."""
    found = streaminfer("plan", *arguments, "--json")
    assert found.exit_code == 0, found.output
    answer: dict[str, Any] = json.loads(found.stdout)
    return answer


def answered(file: Path) -> int:
    """Verify and run a file as it is; return how many of 8 inputs were answered well."""
    return asyncio.run(_answered(file))


async def _answered(file: Path) -> int:
    spec = load(file, environ={})
    built = build(spec, file.parent / "plan")
    assert verify(spec, file.parent / "plan").holds
    records = inputs_of(spec, built, 8)
    pipeline = LocalPipeline(spec, built, file.parent / "plan")
    async with pipeline, pipeline.client() as client:
        answers = [await client.predict(value, headers=headers) for value, headers in records]
    return sum(answer.status == "ok" for answer in answers)
