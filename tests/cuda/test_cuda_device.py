"""What only a GPU can do to a stage: run out of memory, and be measured behind one's back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
import torch
import torchvision
from prometheus_client import generate_latest
from typer.testing import CliRunner

from streaminfer.cli import app
from streaminfer.metrics import Metrics
from streaminfer.parallel import Program, load
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump
from streaminfer.parallel.replay import KEPT, OFTEN, Replay
from streaminfer.plan import StagePlan, TensorSpec
from streaminfer.runtime.device import Device, Stage
from streaminfer.runtime.rows import as_bytes, view
from streaminfer.spec import BatchSpec
from streaminfer.wire import Envelope, Sample, Tensor
from tests.cuda.device import GPU, WITHOUT
from tests.pipelines.forms import DIGITS

pytestmark = WITHOUT

ROWS = 8
ROOM = 256 << 20  # bytes that each row of the hungry program takes
STAGE = StagePlan(
    name="s",
    path="s",
    layers=("l",),
    inputs=(TensorSpec(name="x", dtype="F32", shape=(None, 4)),),
    outputs=(TensorSpec(name="y", dtype="F32", shape=(None, 4)),),
)


def hungry(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Double; takes ROOM per row while it does."""
    (x,) = tensors
    room = torch.empty((len(x), ROOM), dtype=torch.uint8, device=x.device)
    room[:, 0] = 1
    return (x * 2 * room[:, :1],)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Leave this process room for three rows of the hungry program, and a bit."""
    whole = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved(GPU)
    torch.cuda.set_per_process_memory_fraction((taken + 3.5 * ROOM) / whole, GPU)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, GPU)


@pytest.mark.usefixtures("little_memory")
def test_a_batch_too_large_is_halved_and_the_size_is_remembered() -> None:
    metrics = Metrics("p")
    device = Device(
        Stage(
            plan=STAGE,
            load=lambda: cast(Program, lambda *x: hungry(x)),
            device=torch.device(GPU),
            threads=1,
            batch=BatchSpec(max=ROWS),
        ),
        metrics.stage("s"),
    )
    device.warm()
    assert device.limit == 2
    device.limit = ROWS  # others have left the memory, and come back
    given = torch.arange(ROWS * 4.0).view(ROWS, 4)
    samples = tuple(Sample(i, i, str(i), None, 0) for i in range(ROWS))
    tensor = Tensor("F32", (ROWS, 4), as_bytes(given))
    (done,) = device.compute([Envelope(0, samples, "d" * 64, "i", {"x": tensor})])
    assert not done.failures
    assert torch.equal(view(done.tensors["y"]), given * 2)
    assert device.limit == 2
    text = generate_latest(metrics.registry).decode()
    (found,) = re.findall(r"torch_memory_reserved_bytes\{.*\} (.*)", text)
    assert float(found) >= 2 * ROOM


@pytest.mark.parametrize("rows", [1, 3])
def test_a_shape_that_comes_often_is_recorded_and_gives_the_same_bits(rows: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    (stage,) = Cutter(capture(model, [torch.randn(2, 3, 64, 64)])).split(())
    program, other = (load(dump(stage), stage.weights, GPU) for _ in range(2))
    with torch.inference_mode():
        for _ in range(OFTEN + 3):
            x = torch.randn(rows, 3, 64, 64, device=GPU)
            (wanted,) = other.stepped([x], lambda _name, run, _values: run())
            (found,) = program(x)
            assert torch.equal(found, wanted)
    assert isinstance(program._by, Replay)
    assert len(program._by._graphs) == 1


def test_no_more_than_so_many_shapes_are_kept_recorded() -> None:
    replay = Replay(lambda tensors: (tensors[0] * 2,), torch.device(GPU))
    for rows in range(1, KEPT + 4):
        for _ in range(OFTEN):
            x = torch.randn(rows, 3).to(GPU)
            assert torch.equal(replay([x])[0], x * 2)
    assert len(replay._graphs) == KEPT


def test_what_waits_for_the_gpu_is_run_without_a_recording() -> None:
    replay = Replay(lambda tensors: (tensors[0] * float(tensors[0].sum()),), torch.device(GPU))
    for _ in range(2 * OFTEN):
        x = torch.randn(2, 3).to(GPU)
        assert torch.equal(replay([x])[0], x * float(x.sum()))
    assert not replay._graphs


def test_devices_record_and_drop_side_by_side() -> None:
    """Two at once ended the process: torch's list of recordings has no lock."""

    def work(seed: int) -> None:
        for _ in range(6):
            replay = Replay(lambda tensors: (tensors[0] * seed + 1,), torch.device(GPU))
            for rows in range(1, KEPT + 3):
                x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)).to(GPU)
                for _ in range(OFTEN + 2):
                    assert torch.equal(replay([x])[0].clone(), x * seed + 1)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(1, 5)]:
            done.result()


@pytest.mark.usefixtures("little_memory")
def test_recordings_give_their_memory_back_when_it_runs_out() -> None:
    replay = Replay(hungry, torch.device(GPU))
    for rows in (1, 2, 3, 1):
        for _ in range(OFTEN + 1):
            x = torch.randn(rows, 4).to(GPU)
            assert torch.equal(replay([x])[0], x * 2)


def test_a_plan_for_the_gpu_and_the_cpu_is_measured_on_both(tmp_path: Path) -> None:
    file = tmp_path / "planned.yaml"
    run = CliRunner().invoke(
        app,
        ["plan", str(DIGITS), "--devices", "cuda:0,cpu", "--json", "-o", str(file)],
        catch_exceptions=False,
    )
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["best"]
    proof = CliRunner().invoke(app, ["verify", str(file), "--device", GPU, "--json"])
    assert proof.exit_code == 0, proof.output
    assert json.loads(proof.stdout)["holds"]
