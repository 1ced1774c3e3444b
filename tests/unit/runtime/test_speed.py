"""A replica whose speed is misjudged gets a share that it cannot keep up with."""

from __future__ import annotations

import time
from typing import cast

import pytest
import torch

from streaminfer.metrics import Metrics
from streaminfer.parallel import Program
from streaminfer.plan import StagePlan, TensorSpec
from streaminfer.runtime.forward import Forward, Stage
from streaminfer.runtime.speed import combined, measured
from streaminfer.spec import BatchSpec


class Clock:
    """Time that passes by naps alone; `run` takes the next of them."""

    def __init__(self, *naps: float) -> None:
        self.now, self.naps = 0.0, list(naps)

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.naps.pop(0)


def test_the_first_two_batches_do_not_count() -> None:
    """They load kernels and fill caches: ten times as long is no rare thing. (One ran before.)"""
    clock = Clock(20.0, 1.0)
    assert measured(8, clock.run, clock) == 8


def test_one_slow_batch_is_noise() -> None:
    clock = Clock(0.125, 0.125, 0.25, 0.125)
    assert measured(8, clock.run, clock) == 64
    assert not clock.naps, "it goes on for half a second"


def test_a_fast_stage_is_not_timed_for_ever() -> None:
    clock = Clock(*[2**-20] * 1000)
    assert measured(1, clock.run, clock) == 2**20
    assert len(clock.naps) > 900


def test_stages_on_one_device_take_turns_and_devices_work_at_once() -> None:
    assert combined([("cpu", 100.0), ("cpu", 100.0)]) == 50
    assert combined([("cuda:0", 100.0), ("cuda:1", 100.0)]) == 100
    assert combined([("cuda:0", 100.0), ("cuda:1", 50.0), ("cuda:0", 25.0)]) == 20


def test_noise_is_no_speed() -> None:
    """Or every restart would move partitions."""
    assert combined([("cpu", 104.2)]) == combined([("cpu", 99.7)]) == 100


def test_one_that_cannot_be_measured_is_like_all_others() -> None:
    assert combined([("cpu", 100.0), ("cpu", None)]) == 1.0


@pytest.mark.parametrize("width", [4, None])
async def test_a_stage_times_full_batches(width: int | None) -> None:
    sizes: list[int] = []

    def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sizes.append(len(x))
        time.sleep(0.002 * len(x))
        return (x,)

    row = TensorSpec(name="x", dtype="F32", shape=(None, width))
    stage = Stage(
        plan=StagePlan(name="s", path="s", layers=("l",), inputs=(row,), outputs=(row,)),
        load=lambda: cast(Program, program),
        device=torch.device("cpu"),
        threads=1,
        batch=BatchSpec(max=16),
    )
    step = Forward(stage, Metrics("p").stage("s"), timed=True)
    await step.start()
    await step.stop()
    if width is None:  # no batch can be made up
        assert (step.speed, sizes) == (None, [])
    else:
        assert sizes[:2] == [1, 16]
        assert set(sizes[2:]) == {16}
        assert step.speed is not None
        assert step.speed <= 501, "a row takes 2 ms at least"
