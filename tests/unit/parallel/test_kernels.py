"""Operators that are run another way: their bits must be torch's, or `verify` lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from streaminfer.parallel import kernels
from streaminfer.parallel.kernels import CHANNELS, quicker

CPU = torch.device("cpu")
MAX, AVG = torch.ops.aten.max_pool2d.default, torch.ops.aten.avg_pool2d.default
ODD = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, 3e38, -3e38]


def _bits(x: object) -> torch.Tensor:
    """Return the numbers as they lie in memory; a NaN's sign doesn't count."""
    assert isinstance(x, torch.Tensor)
    return x.masked_fill(x.isnan(), float("nan")).contiguous().view(torch.int32)


@st.composite
def _images(draw: st.DrawFn) -> torch.Tensor:
    shape = [draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 8, 9, 16, 33]))]
    shape += [draw(st.integers(3, 17)), draw(st.integers(3, 17))]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    flat = x.view(-1)
    for value in draw(st.lists(st.sampled_from(ODD), max_size=6)):
        flat[draw(st.integers(0, len(flat) - 1)) :: draw(st.integers(5, 99))] = value
    return x


@settings(max_examples=150, deadline=None)
@given(_images(), st.data())
def test_pools_give_the_same_bits(x: torch.Tensor, data: st.DataObject) -> None:
    kernel = [data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))]
    stride = data.draw(st.sampled_from([[1, 1], [2, 2], [1, 3], []]))
    padding = [data.draw(st.integers(0, n // 2)) for n in kernel]
    ceil = data.draw(st.booleans())
    dilation = data.draw(st.integers(1, 2))
    sides = zip(x.shape[2:], kernel, padding, strict=True)
    assume(all(n + 2 * p >= dilation * (k - 1) + 1 for n, k, p in sides))
    most = (kernel, stride, padding, [dilation, dilation], ceil)
    assert torch.equal(_bits(quicker(MAX, CPU)(x, *most)), _bits(MAX(x, *most)))
    mean = (kernel, stride, padding, ceil, data.draw(st.booleans()))
    assert torch.equal(_bits(quicker(AVG, CPU)(x, *mean)), _bits(AVG(x, *mean)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts_are_left_to_torch(dtype: torch.dtype) -> None:
    """bfloat16 has other bits with its channels last (the sign of zero)."""
    x = torch.randn(2, 2 * CHANNELS, 9, 9)
    x[0, :, ::2], x[0, :, 1::2] = -0.0, 0.0
    for given_x in (x.to(dtype), x.contiguous(memory_format=torch.channels_last), x[0]):
        found = quicker(MAX, CPU)(given_x, [3, 3], [2, 2])
        wanted = MAX(given_x, [3, 3], [2, 2])
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()


def test_other_devices_and_operators_are_left_alone() -> None:
    assert quicker(MAX, torch.device("cuda")) is MAX
    assert quicker(torch.ops.aten.relu.default, CPU) is torch.ops.aten.relu.default


def test_a_large_batch_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is made of fresh pages: VGG's first pool would take a fifth longer."""
    x = torch.randn(2, 2 * CHANNELS, 9, 9)
    assert kernels.far_apart(x)
    assert not kernels.far_apart(x, x.nbytes - 1)
    monkeypatch.setattr(kernels.far_apart, "__defaults__", (x.nbytes - 1, CHANNELS))
    assert torch.equal(_bits(quicker(MAX, CPU)(x, [3, 3])), _bits(MAX(x, [3, 3])))
