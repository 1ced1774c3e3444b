"""Scripts of operators: the bits of call by call, in one step, and rarely with Python's lock."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from streaminfer.parallel import Program, load, script, torchscript
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump

pytestmark = pytest.mark.usefixtures("one_thread")


class Told(nn.Module):
    """A function as a model, with some weights."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self._function = function
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> object:
        return self._function(x, self.weight)


def _sizes(x: Tensor, w: Tensor) -> Tensor:
    n, rest = x.shape[0], x.shape[1] - 1
    return (x @ w).reshape(n * 2, -1).view(n, (rest + 1) * 5 // 5 - 0 * n)


def _lists(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    one, two, *more = (x @ w).chunk(3, 1)
    both = torch.cat([one, two, x.new_zeros(x.shape[0], 1)], 1)
    return both, torch.stack(more, 1), *torch.split(x, [2, 4], 1)


def _numbers(x: Tensor, w: Tensor) -> Tensor:
    y = (x * 2 + 1) / 3 - 0.25
    return (y**2).clamp(-1e30, float("inf")) + torch.where(w[0] > 0, y, -float("inf")).exp()


def _indices(x: Tensor, w: Tensor) -> Tensor:
    columns = torch.arange(3) * 2 % 5
    return x[:, columns].to(torch.float64).sum(-1, keepdim=True) + w.mean().double()


def _dtypes(x: Tensor, w: Tensor) -> Tensor:
    return (x.to(torch.bfloat16) @ w.to(torch.bfloat16)).float() + (x > 0).to(torch.int32)


def _made(x: Tensor, w: Tensor) -> Tensor:
    ramp = torch.arange(0, 12, 2, dtype=torch.float32) + torch.full((6,), 0.5)
    return F.layer_norm(x @ w, [6]) + ramp + torch.zeros(x.shape[0], 1)


def _larger(x: Tensor, w: Tensor) -> Tensor:
    images = (x @ w).reshape(-1, 1, 2, 3)
    up = F.interpolate(images, scale_factor=2.0, mode="bilinear", align_corners=False)
    return F.interpolate(up, size=(5, 7), mode="nearest") + F.pad(up, [0, 1, 0, 1])


def _over(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)
    z = F.linear(F.relu(y), w)
    return (y + z) * z.mean(0), F.linear(x, w) + x.double()  # the last has another dtype


TOLD = [_sizes, _lists, _numbers, _indices, _dtypes, _made, _larger, _over]


def _program(model: nn.Module, rows: Tensor) -> Program:
    (stage,) = Cutter(capture(model.eval(), (rows,))).split([])
    return load(dump(stage), stage.weights)


def _same(program: Program, x: Tensor) -> None:
    before = x.clone()
    wanted = program._all([x])
    program(x)
    found = program(x)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", TOLD)
def test_a_model_is_one_script_with_the_same_bits(function: Callable[..., object]) -> None:
    torch.manual_seed(0)
    program = _program(Told(function), torch.randn(2, 6))
    assert program.steps == len(program._calls) > 1
    for rows in (1, 2, 5):
        _same(program, torch.randn(rows, 6))
    assert program.steps == 1


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 7, 8, 16]), st.integers(3, 9), st.booleans(), st.booleans(), st.booleans()
)
def test_images_keep_their_bits(
    channels: int, side: int, average: bool, norm: bool, last: bool
) -> None:
    torch.manual_seed(channels)
    pool = nn.AvgPool2d(2, 1) if average else nn.MaxPool2d(3, 2, 1)
    layers = [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels, affine=norm)]
    model = nn.Sequential(*layers, nn.ReLU(), pool, nn.SiLU())
    program = _program(model, torch.randn(2, channels, side, side))
    layout = torch.channels_last if last else torch.contiguous_format
    for rows in (3, 1):
        _same(program, torch.randn(rows, channels, side, side).contiguous(memory_format=layout))
    assert program.steps == 1 or channels == 1  # the last is a stem that is tried out here


def test_what_has_no_form_stays_a_call_between_two_scripts() -> None:
    stem = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 4, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip
    program = _program(stem, torch.randn(2, 3, 8, 8))
    _same(program, torch.randn(4, 3, 8, 8))
    assert program.steps == 4  # the convolution, norm and relu, the pool, and the rest


def test_an_error_says_what_the_operator_says() -> None:
    program = _program(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.tensor([[1], [2]]))
    program(torch.tensor([[1], [2]]))
    program(torch.tensor([[1], [2]]))
    assert program.steps == 1
    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        program(torch.tensor([[1], [9]]))
    assert torch.isfinite(program(torch.tensor([[8]]))[0]).all()


@pytest.mark.parametrize("gone", [True, False])
def test_without_torchscript_all_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    def none(*_: object) -> NoReturn:
        raise RuntimeError("not any more")

    for name in ("CompilationUnit", "script"):
        monkeypatch.delattr(torch.jit, name) if gone else monkeypatch.setattr(torch.jit, name, none)
    program = _program(Told(_numbers), torch.randn(2, 6))
    _same(program, torch.randn(3, 6))
    assert program.steps == len(program._calls)
    weights = [torch.ones(2)]
    assert torchscript.compiled(lambda x, y: x + y, weights[0])(torch.ones(1)).tolist() == [
        2.0,
        2.0,
    ]
    assert torchscript.held(weights) is weights


def test_another_overload_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = script._operators

    def others(block: torch.Graph) -> Iterator[tuple[str, str]]:
        for overload, kind in operators(block):
            yield overload.replace("pow.Tensor_Scalar", "pow.Tensor_Tensor"), kind

    monkeypatch.setattr(script, "_operators", others)
    program = _program(Told(_numbers), torch.randn(2, 6))
    _same(program, torch.randn(3, 6))
    assert program.steps == len(program._calls)


@contextmanager
def _beside_python(seconds: float) -> Iterator[None]:
    """Let another thread keep the lock for so long whenever it has it."""
    before, stop, spins = sys.getswitchinterval(), threading.Event(), threading.Event()

    def spin() -> None:
        spins.set()
        while not stop.is_set():
            pass

    sys.setswitchinterval(seconds)
    thread = threading.Thread(target=spin)
    thread.start()
    spins.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)


def test_a_script_takes_the_lock_once_or_twice() -> None:
    """20 layers take it 40 times else, and 20 times more if only Python has the weights.

    They are large: who waits for the lock needs some of a millisecond to wake up and take it.
    """
    layers = [layer for _ in range(20) for layer in (nn.Linear(512, 512), nn.Tanh())]
    rows = torch.randn(64, 512)
    program, held = _program(nn.Sequential(*layers), rows), 0.004
    for _ in range(3):
        program(rows)

    def takes(run: Callable[[], object]) -> float:
        took = []
        for _ in range(5):
            began = time.perf_counter()
            run()
            took.append(time.perf_counter() - began)
        return statistics.median(took) / held

    for _ in range(6):  # on a busy machine the other thread has no core, and keeps no lock
        alone = takes(lambda: program(rows))
        with _beside_python(held):
            plainly, scripted = takes(lambda: program._all([rows])), takes(lambda: program(rows))
        if plainly - alone > 20:
            assert scripted - alone < (plainly - alone) / 3
            return
    pytest.skip("the machine is too busy: the other thread was never in the way")
