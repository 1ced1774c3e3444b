"""If these fail, a stage with several threads is a fifth slower after whatever came before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streaminfer.planning.timing import cores

SCRIPT = """
import asyncio, json, os, sys, threading
from pathlib import Path
import torch
from streaminfer import LocalPipeline
from streaminfer.commands import plan_of
from streaminfer.openmp import release_team
from streaminfer.planning.source import ensure
from streaminfer.spec.file import load

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.set_num_threads(2)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
    torch.randn(10_000_000).exp()

torch.set_num_threads(2)
found = {"begin": threads()}
compute()
found["computed"] = threads()
found["could"] = release_team()
found["released"] = threads()
found["again"] = release_team()  # there is none
compute()
found["anew"] = threads()

async def run():
    spec = load(Path(sys.argv[1]))
    folder = Path(sys.argv[2])
    before = threads()
    plan = await asyncio.to_thread(ensure, spec, folder)  # whose thread stays
    found["built"] = threads() - before
    compute()
    async with LocalPipeline(spec, plan, folder):
        ours = sum(not t.name.startswith("Main") for t in threading.enumerate())
        found["others"] = threads() - ours

asyncio.run(run())
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_no_team_is_left_when_stages_begin(tmp_path: Path) -> None:
    file = Path("stages/digits/pipeline.yaml").resolve()
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), str(tmp_path / "plan")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    if not found["could"]:
        pytest.skip("another OpenMP than GNU's")
    assert found["computed"] == found["begin"] + 1
    assert found["released"] == found["begin"]
    assert found["again"]
    assert found["anew"] == found["computed"]
    assert found["built"] == 1  # the executor's own thread, without a team
    assert found["others"] == found["begin"]  # the main thread's went
