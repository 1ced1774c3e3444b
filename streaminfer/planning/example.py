"""Input that a model's example describes: rows of it, by position or by name, seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from streaminfer.errors import ConfigError
from streaminfer.parallel import DTYPES, Port
from streaminfer.ranges import Range
from streaminfer.spec import ModelSpec, TensorExample

__all__ = ["SEED", "Inputs", "example_batch", "example_inputs"]

SEED = 0


@dataclass(frozen=True)
class Inputs:
    """What a model is called with; dimension 0 of every tensor is the rows."""

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    ranges: tuple[tuple[Range | None, ...], ...] = ()  # of the sizes of each, in that order

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter((*self.args, *self.kwargs.values()))))

    def __getitem__(self, rows: slice) -> Inputs:
        """Return some of the rows."""
        named = {name: tensor[rows] for name, tensor in self.kwargs.items()}
        return Inputs(tuple(tensor[rows] for tensor in self.args), named, self.ranges)

    def to(self, device: torch.device) -> Inputs:
        """Return them on a device."""
        named = {name: tensor.to(device) for name, tensor in self.kwargs.items()}
        return Inputs(tuple(tensor.to(device) for tensor in self.args), named, self.ranges)

    def into(self, model: nn.Module) -> object:
        """Call a model."""
        return model(*self.args, **self.kwargs)

    def ports(self, ports: tuple[Port, ...]) -> list[Tensor]:
        """Return the tensors in the order of a first stage's inputs, which have their names."""
        given = self.named([port.name for port in ports])
        return [given[port.name] for port in ports]

    def named(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors by a first stage's inputs: those by place get the names left over."""
        rest = [name for name in names if name not in self.kwargs]
        return {**self.kwargs, **dict(zip(rest, self.args, strict=True))}


def example_inputs(model: ModelSpec, rows: int = 2, shares: Sequence[float] = (1.0,)) -> Inputs:
    """Return seeded random input: floats are normal, whole numbers from 0 to below `max`.

    The ranges of an input are by turns at a share of the way from the lowest to the highest size.
    Each row has its own brightness per channel, as images do: rows of pure noise look all alike to
    a network.
    """
    generator = torch.Generator().manual_seed(SEED)
    examples = model.examples()
    made = {name: _random(one, rows, generator, shares) for name, one in examples.items()}
    ranges = tuple(one.ranges for one in examples.values())
    if isinstance(model.example, dict):
        return Inputs(kwargs=made, ranges=ranges)
    return Inputs(tuple(made.values()), ranges=ranges)


def example_batch(model: ModelSpec, rows: int = 2) -> Tensor:
    """Return the one tensor of `example_inputs`, [rows, *example].

    Raises:
        ConfigError: the model has several inputs, or takes its one by name.
    """
    inputs = example_inputs(model, rows)
    if inputs.kwargs or len(inputs.args) > 1:
        raise ConfigError("the model takes more than one tensor by position", where="model.example")
    return inputs.args[0]


def _random(
    example: TensorExample, rows: int, generator: torch.Generator, shares: Sequence[float]
) -> Tensor:
    dtype = next(d for d in DTYPES.values() if str(d) == f"torch.{example.dtype}")
    size = (rows, *example.sizes(shares))
    if not dtype.is_floating_point:
        return torch.randint(0, example.max or 2, size, generator=generator).to(dtype)
    noise = torch.randn(size, generator=generator)
    if len(size) > 2:
        shape = (rows, size[1], *[1] * (len(size) - 2))
        noise = noise + torch.randn(shape, generator=generator)
    return noise.to(dtype)
