"""Split stages, run as workers run them, and small models to split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from streaminfer.errors import CaptureError
from streaminfer.parallel import check_inputs, load, weights
from streaminfer.parallel.capture import capture
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump
from streaminfer.parallel.tensor import channels_problem, split_channels
from streaminfer.parallel.tensor.layout import Form

Tensors = Mapping[str, Tensor]
Span = tuple[int, int]  # positions of a stage's first and last node

# relative to the largest number: sums, and kernels that treat what fills no vector in another way
ROUNDED = 1e-6
PIXELS = (6, 9, 9)
IMAGE = (3, 64, 64)

# ---- running -------------------------------------------------------------------------------------


def run(graph: StageGraph, tensors: Tensors, folder: Path | None) -> Tensors:
    """Run a graph as a worker does: from its files, on tensors that came over a wire."""
    held = graph.weights
    if folder is not None:
        file = folder / "stage.safetensors"
        weights.write(file, held)
        held = weights.read(file)
    program = load(dump(graph), held)
    given = [tensors[p.name].clone(memory_format=torch.contiguous_format) for p in program.inputs]
    check_inputs(program.inputs, given)
    before = [t.clone() for t in given]
    found = program(*given)
    assert all(map(torch.equal, given, before)), "a part wrote into what it was sent"
    check_inputs(program.outputs, found)
    return dict(zip([p.name for p in program.outputs], found, strict=True))


def run_fan(fan: Fan, tensors: Tensors, folder: Path | None = None) -> Tensors:
    if fan.scatter is not None:
        tensors = run(fan.scatter, tensors, folder)
    given: dict[str, Tensor] = {}
    for part in fan.parts:
        found = run(part, tensors, folder)
        assert not given.keys() & found.keys(), "two parts give tensors of one name"
        given |= found
    assert set(given) == {port.name for port in fan.gather.inputs}, "something is sent for nothing"
    return run(fan.gather, given, folder)


def split(model: nn.Module, *shape: int) -> Cutter:
    """Capture a model on an input of this shape."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.05)
            module.running_var.uniform_(0.8, 1.2)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    model.eval().requires_grad_(requires_grad=False)
    return Cutter(capture(model, (torch.randn(2, *shape, dtype=dtype),)))


def span(cutter: Cutter, behind: str | None = None, until: str | None = None) -> Span:
    layers = cutter.captured.layers
    first = layers.find(behind).last + 1 if behind else 0
    return first, layers.find(until).last if until else len(cutter.captured.nodes) - 1


def inputs(cutter: Cutter, first: int, rows: int) -> Tensors:
    """Return what the stage that begins with this node is sent."""
    image = cutter.captured.inputs[0]
    shape = image.meta["val"].shape[1:]
    generator = torch.Generator().manual_seed(rows)
    sent = torch.randn(rows, *shape, generator=generator, dtype=image.meta["val"].dtype)
    tensors = {image.name: sent}
    return run(cutter.stage(0, first - 1), tensors, None) if first else tensors


def worst(found: Tensors, expected: Tensors) -> float:
    """Return the largest difference, in units of the largest number; 0 for the same bits."""
    assert list(found) == list(expected), "the outputs of a stage are not the stage's"
    differences = [0.0]
    for name, want in expected.items():
        assert found[name].shape == want.shape
        if not torch.equal(found[name], want):
            differences.append(((found[name] - want).abs().max() / want.abs().max()).item())
    return max(differences)


def difference(
    cutter: Cutter, stage: Span, fan: Fan, folder: Path | None = None, rows: Sequence[int] = (1, 3)
) -> float:
    whole = cutter.stage(*stage)
    found = 0.0
    for n in rows:
        sent = inputs(cutter, stage[0], n)
        found = max(found, worst(run_fan(fan, sent, folder), run(whole, sent, None)))
    return found


def operators(graph: StageGraph) -> list[str]:
    names = [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]
    return [name for name in names if name != "sym_size"]


def size(graph: StageGraph) -> int:
    return sum(t.nbytes for t in graph.weights.values())


def assert_held_once(cutter: Cutter, stage: Span, fan: Fan, layers: Sequence[str]) -> None:
    """Check that over all parts the weights of these layers are held once."""
    n = len(fan.parts)
    whole = cutter.stage(*stage).weights
    for layer in layers:
        name = f"{layer}.weight"
        slices = [part.weights[f"{name}.{i}of{n}"] for i, part in enumerate(fan.parts)]
        assert sum(t.numel() for t in slices) == whole[name].numel()
        assert max(t.numel() for t in slices) < whole[name].numel() / n * 2
        assert not any(name in graph.weights for graph in (*fan.parts, fan.gather))
        assert all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in slices)


def assert_refused_or_equal(cutter: Cutter, stage: Span, parts: int, form: Form) -> None:
    """Check that a split has the numbers of the whole (of float64), or says why there is none."""
    problem = channels_problem(cutter, *stage, parts, form)
    try:
        fan = split_channels(cutter, *stage, parts, form)
    except CaptureError as error:
        assert problem
        assert problem in error.message
        assert error.hint
        return
    assert not problem
    assert difference(cutter, stage, fan, rows=(2,)) <= 1e-12


# ---- models --------------------------------------------------------------------------------------


class Chain(nn.Module):
    """A function of an input and of named layers."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(i: int, o: int, k: int = 3, **more: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **more)  # type: ignore[arg-type]


def sequence(**layers: nn.Module) -> Callable[[], nn.Module]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        for name in layers:
            x = getattr(model, name)(x)
        return x

    return lambda: Chain(forward, **layers)


def of(function: Callable[..., Tensor], **layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Chain(function, **layers)


def torchvision_model(name: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None, **more)
    return model


def resnet18() -> nn.Module:
    return torchvision_model("resnet18")


@functools.cache
def networked(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Cutter:
    return split(make(), *shape)
