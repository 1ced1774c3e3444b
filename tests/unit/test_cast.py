"""An edge of 8 bits may round, by half a step and no more, and never one row because of another."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streaminfer.cast import cast, uncast
from streaminfer.errors import SchemaError
from streaminfer.plan import TensorSpec

SHAPES = st.one_of(
    st.tuples(st.integers(1, 4), st.integers(6, 40)),
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(8, 20)),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(2, 6)),
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Channels of every magnitude, zeros among them."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(SHAPES)
    channels = (*shape[:2], *[1] * (len(shape) - 2)) if len(shape) > 2 else (shape[0], 1)
    magnitudes = 10.0 ** torch.randint(-45, 4, channels, generator=random).double()
    values = torch.randn(shape, generator=random).double() * magnitudes
    return values.to(draw(DTYPES))


def back(tensor: torch.Tensor) -> torch.Tensor:
    return uncast("x", cast({"x": tensor}, "int8"), tensor.dtype)


@given(tensors())
@settings(deadline=None)
def test_no_value_comes_back_more_than_half_a_step_off(tensor: torch.Tensor) -> None:
    sent = cast({"x": tensor}, "int8")
    found = uncast("x", sent, tensor.dtype)
    assert found.dtype == tensor.dtype
    if "x@scale" not in sent:
        assert torch.equal(found, tensor)
        return
    scale = sent["x@scale"].double()
    steps = scale.view(*scale.shape, *[1] * (tensor.dim() - scale.dim()))
    last_digit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(tensor.dtype, 1e-6)
    allowed = 0.5 * steps * (1 + 1e-5) + last_digit * tensor.double().abs() + 1e-7 * (
        tensor.dtype == torch.float16
    )  # fmt: skip
    assert bool(((found.double() - tensor.double()).abs() <= allowed).all())
    flat = tensor.double().abs().reshape(*scale.shape, -1).amax(-1)
    assert bool((scale <= torch.where(flat < 2e-36, 1.0, flat / 127 * (1 + 1e-5))).all()), (
        "a step is 1/127 of the largest value under it"
    )


@given(tensors())
@settings(deadline=None)
def test_a_row_is_the_same_whatever_stands_beside_it(tensor: torch.Tensor) -> None:
    """Workers merge and split batches as samples come."""
    every = back(tensor)
    for row in range(len(tensor)):
        assert torch.equal(every[row], back(tensor[row : row + 1])[0])


@given(tensors())
@settings(deadline=None)
def test_the_plan_knows_the_bytes_to_the_byte(tensor: torch.Tensor) -> None:
    name = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16"}.get(tensor.dtype)
    spec = TensorSpec(name="x", dtype=name or "BF16", shape=(None, *tensor.shape[1:]))
    sent = sum(t.nbytes for t in cast({"x": tensor}, "int8").values())
    assert sent == len(tensor) * spec.row_bytes("int8")
    assert spec.row_bytes("int8") <= spec.row_bytes()


def test_a_quiet_channel_beside_a_loud_one_keeps_its_digits() -> None:
    """With one scale for all, what is 1,000 times smaller would be zero."""
    image = torch.stack([torch.randn(8, 8), 1e-3 * torch.randn(8, 8)])[None]
    gap = (back(image) - image).abs()
    assert float(gap[0, 1].max()) <= float(image[0, 1].abs().max()) / 250
    tokens = torch.cat([torch.randn(1, 1, 32), 1e-3 * torch.randn(1, 1, 32)], 1)
    assert cast({"x": tokens}, "int8")["x@scale"].shape == (1, 2)


@pytest.mark.parametrize(
    ("shape", "scales"), [((2, 64), (2,)), ((2, 3, 4, 4), (2, 3)), ((2, 512, 1, 1), (2,))]
)
def test_scales_are_worth_their_bytes(shape: tuple[int, ...], scales: tuple[int, ...]) -> None:
    sent = cast({"x": torch.randn(shape)}, "int8")
    assert (sent["x"].dtype, sent["x@scale"].shape) == (torch.int8, torch.Size(scales))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).view(3, 4),
        torch.ones(3, 4, dtype=torch.uint8),
        torch.ones(2, 9, dtype=torch.bool),
        torch.randn(4),  # a number a row: its scale would be larger than it is
        torch.randn(4, 1),
        torch.empty(4, 0),
    ],
)
def test_what_int8_makes_no_smaller_stays_as_it_is(tensor: torch.Tensor) -> None:
    (sent,) = cast({"x": tensor}, "int8").values()
    assert sent is tensor
    assert torch.equal(uncast("x", {"x": sent}, tensor.dtype), tensor)


def test_what_is_no_number_is_not_made_one() -> None:
    """A NaN that arrives as 0 would be a prediction out of nothing; the other rows keep theirs."""
    values = torch.randn(3, 2, 16)
    values[0, 0, 3], values[1, 1, 5] = float("nan"), float("-inf")
    found = back(values)
    assert bool(found[0, 0].isnan().all())
    assert bool(found[1, 1].isnan().all())
    assert bool(found[2].isfinite().all())
    assert bool(found[0, 1].isfinite().all())


@pytest.mark.parametrize(
    "scale", [torch.ones(3), torch.ones(2, 5), torch.ones(2, dtype=torch.float64)]
)
def test_scales_of_another_tensor_are_refused_by_name(scale: torch.Tensor) -> None:
    sent = {"x": torch.ones(2, 4, 8, dtype=torch.int8), "x@scale": scale}
    with pytest.raises(SchemaError, match=r"'x'.*scales"):
        uncast("x", sent, torch.float32)
