"""What a loaded stage writes over: never what is read again, and always with torch's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from streaminfer.parallel import Program, inplace, kernels, load
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.ELU, nn.GELU,
    nn.LeakyReLU,
]  # fmt: skip


def _program(model: nn.Module, rows: torch.Tensor, cuts: tuple[int, ...] = ()) -> list[Program]:
    stages = Cutter(capture(model.eval(), (rows,))).split(cuts)
    return [load(dump(stage), stage.weights) for stage in stages]


def _overwritten(program: Program) -> list[str]:
    over = [call for call in program._calls if call.function is not call.operator]
    return [call.name for call in over]


class Block(nn.Module):
    """conv → norm → activation, squeezed, excited, and added to what came."""

    def __init__(self, activation: nn.Module, *, affine: bool = True) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=affine)
        self.act, self.squeeze = activation, nn.Conv2d(8, 8, 1)
        assert self.norm.running_mean is not None
        self.norm.running_mean.uniform_(-1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.norm(self.conv(x)))
        scale: torch.Tensor = self.squeeze(y.mean((2, 3), keepdim=True)).sigmoid()
        z: torch.Tensor = self.act(self.norm(self.conv(y)) * scale + x)
        return z


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(ACTIVATIONS), st.booleans(), st.integers(1, 5), st.integers(1, 9), st.booleans()
)
def test_a_block_keeps_its_bits_and_its_inputs(
    activation: Callable[[], nn.Module], affine: bool, rows: int, side: int, last: bool
) -> None:
    torch.manual_seed(rows)
    model = Block(activation(), affine=affine).eval()
    (program,) = _program(model, torch.randn(2, 8, side, side))
    x = torch.randn(rows, 8, side, side)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    before, kept = x.clone(), {n: t.clone() for n, t in model.state_dict().items()}
    with torch.inference_mode():
        wanted = model(x)
    for _ in range(2):
        (found,) = program(x)
        assert torch.equal(found, wanted)
    assert torch.equal(x, before)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "shape", [(4, 16), (5, 16, 7), (3, 16, 1, 1), (2, 16, 3, 5), (2, 16, 3, 4, 5)]
)
def test_a_norm_in_place_has_the_bits_of_a_new_one(shape: tuple[int, ...], affine: bool) -> None:
    batch_norm = torch.ops.aten.batch_norm.default
    torch.manual_seed(len(shape))
    mean, variance, scale, shift = torch.randn(16), torch.rand(16), torch.randn(16), torch.randn(16)
    rest = (scale, shift) if affine else (None, None)
    rest = (*rest, mean, variance, False, 0.1, 1e-5, True)
    layouts = [torch.randn(shape)]
    if len(shape) == 4:
        layouts.append(layouts[0].contiguous(memory_format=torch.channels_last))
    for x in layouts:
        with torch.inference_mode():
            wanted = batch_norm(x, *rest)
            mine = x.clone()
            found = inplace.norm(mine, *rest)
        assert isinstance(found, torch.Tensor)
        assert found is mine and torch.equal(found, wanted)
        assert found.stride() == wanted.stride()


def test_what_is_overwritten() -> None:
    (program,) = _program(Block(nn.ReLU()), torch.randn(2, 8, 4, 4))
    assert _overwritten(program) == [
        "batch_norm", "relu", "sigmoid", "batch_norm_1", "mul", "add", "relu_1",
    ]  # fmt: skip


class Shared(nn.Module):
    """The same numbers are read twice, seen through a view, given out, or not ours."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b, c = self.linear(x), self.linear(x + 1), self.linear(x + 2)
        seen = b[:, 1:]
        return {
            "twice": a.relu() + a,
            "viewed": torch.cat([b.relu(), seen], 1),
            "given": c,
            "positive": c.relu(),
            "input": x.relu(),
        }


def test_nothing_that_is_read_again_is_overwritten() -> None:
    model, x = Shared().eval(), torch.randn(3, 4)
    (program,) = _program(model, torch.randn(2, 4))
    assert not any(name.startswith("relu") for name in _overwritten(program))
    with torch.inference_mode():
        wanted = model(x)
    for port, found in zip(program.outputs, program(x), strict=True):
        assert torch.equal(found, wanted[port.name])


def test_a_result_of_another_shape_or_type_is_a_new_tensor() -> None:
    class Wider(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.linear(x) * x, self.linear(x) + x.double()

    model, x = Wider().eval(), torch.randn(3, 4)
    (program,) = _program(model, torch.randn(2, 4))
    with torch.inference_mode():
        wanted = model(x)
    for found, want in zip(program(x), wanted, strict=True):
        assert torch.equal(found, want) and found.dtype == want.dtype


def _stem(bias: bool, pool: nn.Module, activation: nn.Module) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=bias), nn.BatchNorm2d(16), activation, pool,
        nn.Conv2d(16, 8, 3),
    )  # fmt: skip
    return model.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))],
)
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
@pytest.mark.parametrize("side", [32, 65])
def test_a_stem_keeps_its_bits_and_its_layout(
    bias: bool, pool: nn.Module, activation: nn.Module, side: int
) -> None:
    torch.manual_seed(side)
    model = _stem(bias, pool, activation)
    (program,) = _program(model, torch.randn(2, 3, side, side))
    for rows in (1, 3):
        x = torch.randn(rows, 3, side, side)
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            with torch.inference_mode():
                wanted = model(image)
            (found,) = program(image)
            assert torch.equal(found, wanted) and found.stride() == wanted.stride()


def test_a_stem_of_other_bits_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another machine's kernels may do: sum in another order."""
    together = kernels._Stem._together
    monkeypatch.setattr(
        kernels._Stem, "_together", lambda *args: together(*args).mul(1 + torch.finfo().eps)
    )
    model = _stem(False, nn.MaxPool2d(2), nn.ReLU())
    (program,) = _program(model, torch.randn(2, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(program(x)[0], model(x))


def test_a_stem_that_is_read_elsewhere_is_left_to_torch() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 16, 3), nn.MaxPool2d(2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return self.pool(y), y

    (program,) = _program(Forked(), torch.randn(2, 3, 32, 32))
    assert _overwritten(program) == ["max_pool2d"]  # a quick pool, but no stem
    (quick,) = _program(_stem(True, nn.MaxPool2d(2), nn.ReLU()), torch.randn(2, 3, 32, 32))
    assert _overwritten(quick)[0] == "conv2d"
