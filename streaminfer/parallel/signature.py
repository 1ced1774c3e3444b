"""What crosses a cut: the name, dtype and shape of every tensor, and the check of what arrives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from streaminfer.errors import SchemaError
from streaminfer.ranges import Range

__all__ = ["DTYPES", "Expected", "Port", "check_inputs", "dtype_name"]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # safetensors' names; what is not in here crosses no cut
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str | None:
    """Return safetensors' name of a dtype; None if it may not cross a cut."""
    return NAMES.get(dtype)


class Expected(Protocol):
    """A tensor as the plan declares it: dimension 0 is the batch, None = any size."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int | None, ...]: ...  # noqa: D102


class Port(NamedTuple):
    """A tensor at a cut, as the graph knows it; an `Expected`."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    ranges: tuple[Range | None, ...] = ()  # of each size of a row; () where all are fixed

    def sizes(self) -> tuple[int, ...]:
        """Return the shape of a row, at its largest; a size that nothing bounds is 1."""
        ranges = self.ranges or (None,) * len(self.shape[1:])
        pairs = zip(self.shape[1:], ranges, strict=True)
        return tuple(given.high if given else 1 if n is None else n for n, given in pairs)


def _text(dtype: str, shape: Sequence[int | None]) -> str:
    dims = ", ".join("any" if n is None else str(n) for n in shape)
    return f"{dtype} [{dims}]"


def _fits(expected: Expected, tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype == DTYPES.get(expected.dtype)
        and tensor.dim() == len(expected.shape)
        and all(
            want is None or want == n for want, n in zip(expected.shape, tensor.shape, strict=True)
        )
    )


def check_inputs(
    specs: Sequence[Expected], tensors: Mapping[str, torch.Tensor] | Sequence[torch.Tensor]
) -> None:
    """Check names, dtypes, ranks and fixed sizes before a stage runs.

    A sequence stands for the tensors in the order of `specs`.

    A cut-out of a graph has none of the checks of the model it came from, and a wrong shape may
    read beyond a tensor's memory.

    Raises:
        SchemaError: names the tensor, what was expected and what was found.
    """
    if not isinstance(tensors, Mapping):
        names = [spec.name for spec in specs][: len(tensors)]
        names += [f"#{i}" for i in range(len(names), len(tensors))]
        tensors = dict(zip(names, tensors, strict=True))
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None:
            raise SchemaError(
                f"tensor {spec.name!r} is missing: expected {_text(spec.dtype, spec.shape)}, "
                f"found {', '.join(sorted(tensors)) or 'no tensors'}"
            )
        if not _fits(spec, tensor):
            found = _text(NAMES.get(tensor.dtype, str(tensor.dtype)), tensor.shape)
            raise SchemaError(
                f"tensor {spec.name!r}: expected {_text(spec.dtype, spec.shape)}, found {found}"
            )
    if len(tensors) > len(specs):
        extra = sorted(set(tensors) - {spec.name for spec in specs})
        raise SchemaError(f"unexpected tensor {extra[0]!r}: this stage does not read it")
    rows = {spec.name: tensors[spec.name].shape[0] for spec in specs}
    if len(set(rows.values())) > 1 or 0 in rows.values():
        found = ", ".join(f"{name}: {n}" for name, n in rows.items())
        raise SchemaError(
            f"all tensors must have the same number of rows, 1 or more; found {found}"
        )
