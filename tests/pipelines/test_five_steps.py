"""A reader who follows stages/README.md to the letter gets answers."""

from __future__ import annotations

import asyncio
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.e2e.conftest import ROOT, streaminfer

TITLE = "## Bring your own model in five steps"


class Block(NamedTuple):
    language: str
    text: str


def blocks() -> list[Block]:
    """Return the fenced blocks of the five steps, in order, without their indent."""
    section = (ROOT / "stages" / "README.md").read_text().split(TITLE)[1].split("\n## ")[0]
    found = re.findall(r"^   ```(\w+)\n(.*?)^   ```$", section, re.M | re.S)
    return [Block(kind, re.sub(r"^   ", "", text, flags=re.M)) for kind, text in found]


def photo(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


async def said(line: str, folder: Path) -> str:
    """Run a line as it stands there; return what it prints."""
    program, *arguments = line.split()
    assert program == "streaminfer"
    environment = {"KAFKA_BOOTSTRAP_SERVERS": "", "STREAMINFER_METRICS_PORT": "0", "COLUMNS": "120"}
    async with streaminfer(*arguments, cwd=folder, **environment) as run, asyncio.timeout(180):
        assert await run.process.wait() == 0, run.text
    return run.text


@pytest.mark.timeout(600)
async def test_five_steps(tmp_path: Path) -> None:
    model, weights, file, cut, cuts, proof = blocks()
    assert [b.language for b in (model, weights, file, cut, cuts, proof)] == [
        "python", "python", "yaml", "sh", "yaml", "sh",
    ]  # fmt: skip
    mine, photos = tmp_path / "mine", tmp_path / "photos"
    mine.mkdir()
    photos.mkdir()
    for seed in range(5):
        (photos / f"{seed}.jpg").write_bytes(photo(seed))

    (mine / "model.py").write_text(model.text)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", weights.text, cwd=mine)
    async with asyncio.timeout(180):
        assert await process.wait() == 0

    (mine / "pipeline.yaml").write_text(file.text)
    table = await said(cut.text.strip(), tmp_path)
    replacing = yaml.safe_load(cuts.text)
    for stage in replacing["stages"][:-1]:
        assert re.search(rf"\b{stage['until']}\b", table), table

    (mine / "pipeline.yaml").write_text(yaml.safe_dump(yaml.safe_load(file.text) | replacing))
    verify, run = proof.text.splitlines()
    assert (await said(verify, tmp_path)).startswith("holds  2 stages")
    answers = await said(run, tmp_path)
    for seed in range(5):
        assert f"{seed}.jpg" in answers
    assert re.search(r"cat|dog|owl", answers)
