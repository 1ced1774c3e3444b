"""What a user loses: attention of packed query, key and value by heads, a share on each device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformerBlock, SwinTransformerBlockV2

from streaminfer.errors import CaptureError
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.tensor import channels_problem, split_channels
from tests.fans import (
    ROUNDED,
    Span,
    assert_refused_or_equal,
    difference,
    networked,
    operators,
    size,
    span,
    split,
)

TOKENS = (5, 24)
ROWS = (1, 2, 3)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# ---- models --------------------------------------------------------------------------------------


def unbound(y: Tensor, heads: int) -> Sequence[Tensor]:
    """Query, key and value [B, heads, N, d] as timm has them."""
    b, n, width = y.shape
    return y.reshape(b, n, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)


def chunked(y: Tensor, heads: int) -> Sequence[Tensor]:
    """As GPT's: three pieces of the channels, then heads."""
    b, n, _ = y.shape
    return [piece.view(b, n, heads, -1).transpose(1, 2) for piece in y.chunk(3, -1)]


def sliced(y: Tensor, heads: int) -> Sequence[Tensor]:
    b, n, width = y.shape
    third = width // 3
    pieces = (y[..., :third], y.narrow(-1, third, third), y[..., -third:])
    return [piece.reshape(b, n, heads, -1).transpose(1, 2) for piece in pieces]


def selected(y: Tensor, heads: int) -> Sequence[Tensor]:
    packed = torch.unflatten(y, -1, (3, heads, y.shape[-1] // 3 // heads)).transpose(1, 3)
    return [packed[:, :, i] for i in range(3)]


def headed(y: Tensor, heads: int) -> Sequence[Tensor]:
    """As GPT-NeoX's: query, key and value of one head together."""
    b, n, _ = y.shape
    return y.view(b, n, heads, -1).transpose(1, 2).chunk(3, -1)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two products, with a bias that all parts have whole, a number for each head."""
    scores: Tensor = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    bias = torch.arange(q.shape[1], dtype=q.dtype, device=q.device).view(1, -1, 1, 1)
    return (scores * bias).softmax(-1) @ v


Apart = Callable[[Tensor, int], Sequence[Tensor]]


class Attention(nn.Module):
    """A residual block of packed attention."""

    def __init__(self, heads: int, apart: Apart, attend: Callable[..., Tensor] = fused) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.heads, self.apart, self.attend = heads, apart, attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.apart(self.qkv(self.norm(x)), self.heads)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class MultiHead(nn.Module):
    def __init__(self, heads: int, *, need_weights: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.attention = nn.MultiheadAttention(24, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=self.need_weights)[0]  # type: ignore[no-any-return]


def vit_tiny(heads: int, *, fused_attn: bool = True) -> nn.Module:
    """timm's vit_tiny, with fewer and smaller blocks."""
    name = "vit_tiny_patch16_224"
    more: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": heads}
    model: nn.Module = timm.create_model(name, pretrained=False, **more)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused_attn
    return model


def vision_transformer() -> nn.Module:
    model: nn.Module = torchvision.models.VisionTransformer(32, 16, 1, 6, 24, 48, num_classes=5)
    return model


class Case(NamedTuple):
    """A stage of attention with 24 channels, and where its weights are."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    behind: str | None
    until: str | None
    qkv: str
    out: str
    heads: int = 6
    blockwise: bool = True  # [q │ k │ v], each of all heads; else of one head after another


PATCHES = (3, 32, 32)
ENCODER = "encoder.layers.encoder_layer_0"
PACKED = {
    **{
        f"{apart.__name__}, {attend.__name__}": Case(
            lambda apart=apart, attend=attend: Attention(6, apart, attend),  # type: ignore[misc]
            TOKENS, None, None, "qkv.weight", "out.weight", 6, apart is not headed,
        )
        for apart in (unbound, chunked, sliced, selected, headed)
        for attend in (fused, spelled)
    },
    "timm's block": Case(
        lambda: vit_tiny(3), PATCHES, "blocks.0", "blocks.1.attn",
        "blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight", 3,
    ),
    "timm's block, two products": Case(
        lambda: vit_tiny(6, fused_attn=False), PATCHES, "blocks.0", "blocks.1.attn",
        "blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight",
    ),
    "torchvision's encoder block": Case(
        vision_transformer, PATCHES, "encoder.dropout", f"{ENCODER}.dropout",
        f"{ENCODER}.self_attention.in_proj_weight", f"{ENCODER}.self_attention.out_proj.weight",
    ),
    "MultiheadAttention": Case(
        lambda: MultiHead(6, need_weights=False), TOKENS, None, None,
        "attention.in_proj_weight", "attention.out_proj.weight",
    ),
    "MultiheadAttention, two products": Case(
        lambda: MultiHead(6, need_weights=True), TOKENS, None, None,
        "attention.in_proj_weight", "attention.out_proj.weight",
    ),
    "Swin's windows": Case(
        lambda: SwinTransformerBlock(24, 6, [4, 4], [2, 2]), (8, 8, 24), None, "attn",
        "attn.qkv.weight", "attn.proj.weight",
    ),
    "Swin v2's windows": Case(
        lambda: SwinTransformerBlockV2(24, 6, [4, 4], [0, 0]), (8, 8, 24), None, "attn",
        "attn.qkv.weight", "attn.proj.weight",
    ),
}  # fmt: skip


def staged(case: Case) -> tuple[Cutter, Span]:
    cutter = networked(case.make, case.shape)
    return cutter, span(cutter, case.behind, case.until)


@pytest.mark.parametrize("name", PACKED)
def test_packed_attention_goes_to_parts_by_heads(name: str, tmp_path: Path) -> None:
    case = PACKED[name]
    cutter, stage = staged(case)
    for parts in (2, 3):
        if case.heads % parts:
            continue
        fan = split_channels(cutter, *stage, parts)
        assert difference(cutter, stage, fan, tmp_path, rows=ROWS) <= ROUNDED
        assert_heads(case, cutter, stage, fan)
        assert set(operators(fan.gather)[: parts - 1]) == {"add"}, "the parts are not added up once"
        assert all(len(part.outputs) == 1 for part in fan.parts[1:]), "a whole is sent twice"


def assert_heads(case: Case, cutter: Cutter, stage: Span, fan: Fan) -> None:
    """Check that a part has the rows and columns of its heads, and no others."""
    whole, n = cutter.stage(*stage).weights, len(fan.parts)
    head = torch.arange(24).view(case.heads, -1)
    rows = torch.arange(72).view((3, case.heads, -1) if case.blockwise else (case.heads, 3, -1))
    for i, part in enumerate(fan.parts):
        mine = slice(i * case.heads // n, (i + 1) * case.heads // n)
        of_head = rows[:, mine] if case.blockwise else rows[mine]
        held = part.weights[f"{case.qkv}.{i}of{n}"], part.weights[f"{case.out}.{i}of{n}"]
        assert torch.equal(held[0], whole[case.qkv][of_head.flatten()])
        assert torch.equal(held[1], whole[case.out][:, head[mine].flatten()])
        assert not {case.qkv, case.out} & part.weights.keys()
    assert not {case.qkv, case.out} & fan.gather.weights.keys()


def test_a_part_of_attention_weighs_its_share() -> None:
    cutter, stage = staged(PACKED["unbound, fused"])
    total = size(cutter.stage(*stage))
    small = 4 * (24 + 24 + 24)  # the norm, that each part has, and the bias of one
    for parts in (2, 3, 6):
        fan = split_channels(cutter, *stage, parts)
        assert all(size(part) <= total / parts + small for part in fan.parts)
        assert size(fan.gather) == 0


def test_both_halves_of_a_vision_transformers_block_are_split() -> None:
    cutter = networked(lambda: vit_tiny(6), PATCHES)
    for behind, until in (("blocks.0", "blocks.1.attn"), ("blocks.1.attn", "blocks.1")):
        stage = span(cutter, behind, until)
        for parts in (2, 3):
            fan = split_channels(cutter, *stage, parts)
            assert difference(cutter, stage, fan, rows=ROWS) <= ROUNDED
            assert all(size(p) < size(cutter.stage(*stage)) / parts + 500 for p in fan.parts)


UNEVEN: dict[str, tuple[Callable[[], nn.Module], int, str, str]] = {
    "unbound": (lambda: Attention(4, unbound), 3, "4 heads", "parts: 2, or parts: 4"),
    "spelled": (lambda: Attention(3, unbound, spelled), 2, "3 heads", "parts: 3"),
    "headed": (lambda: Attention(4, headed), 3, "4 heads", "parts: 2, or parts: 4"),
    "fewer than parts": (lambda: Attention(2, chunked), 3, "2 heads", "parts: 2"),
    "MultiheadAttention": (
        lambda: MultiHead(4, need_weights=False), 3, "4 heads", "parts: 2, or parts: 4"
    ),
    "MultiheadAttention, fewer": (
        lambda: MultiHead(2, need_weights=True), 3, "2 heads", "parts: 2"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEVEN)
def test_heads_that_do_not_divide_are_refused_with_numbers_that_do(name: str) -> None:
    make, parts, heads, hint = UNEVEN[name]
    cutter = split(make(), *TOKENS)
    stage = span(cutter)
    with pytest.raises(CaptureError) as caught:
        split_channels(cutter, *stage, parts)
    assert f"{heads} do not divide among {parts} parts" in caught.value.message
    assert caught.value.hint == hint
    for words in caught.value.hint.split(", or "):
        assert not channels_problem(cutter, *stage, int(words.removeprefix("parts: ")))


def test_attention_that_ends_a_stage_needs_no_even_heads() -> None:
    """Heads that do not divide meet behind the parts, where nothing with weights follows."""
    cutter = split(Attention(3, unbound), *TOKENS)
    first, last = span(cutter, None, "qkv")
    fan = split_channels(cutter, first, last, 2)
    assert difference(cutter, (first, last), fan, rows=ROWS) <= ROUNDED


# ---- any views -----------------------------------------------------------------------------------


class Views(nn.Module):
    """Two layers, and between them channels that are parted, moved, taken apart and merged.

    Dimension 0 stays the rows', or 1 becomes part of them.
    """

    def __init__(self, sizes: Sequence[int], order: Sequence[int], at: int, how: int) -> None:
        super().__init__()
        self.a, self.sizes, self.how = nn.Linear(6, 48), sizes, how
        self.order = [n for n in order if n < len(sizes) + 2]
        self.at = 1 + at % (len(self.order) - 1)
        made = self.between(torch.zeros(2, 5, 48))
        self.b = nn.Linear(made.shape[-1], 7)
        self.double()

    def between(self, y: Tensor) -> Tensor:
        y = y.reshape(*y.shape[:2], *self.sizes).permute(self.order)
        at, how = self.at, self.how % 7
        if how == 1:
            y = y.softmax(at)
        if how == 2 and y.shape[at] % 2 == 0:
            one, other = y.chunk(2, at)
            y = one * other.sin() + one
        if how == 3 and self.order[at] > 1:
            y = sum(piece * (i + 1) for i, piece in enumerate(y.unbind(at)))  # type: ignore[assignment]
        if how == 4 and self.order[at] > 1:
            y = y.select(at, 0) - y.select(at, -1).tanh()
        if how == 5 and self.order[at] > 1 and y.shape[at] > 2:
            y = y.narrow(at, 1, y.shape[at] - 1)
        if how == 6 and self.order[at] > 1:
            y = y.mean(at, keepdim=True) * y
        return y.flatten(min(1 + self.how // 7, y.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))  # type: ignore[no-any-return]


FACTORS = [
    (48,),
    (3, 16),
    (16, 3),
    (2, 24),
    (3, 4, 4),
    (4, 3, 4),
    (2, 3, 8),
    (8, 2, 3),
    (2, 2, 3, 4),
]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.sampled_from(FACTORS),
    order=st.permutations(range(6)),
    at=st.integers(0, 5),
    how=st.integers(0, 20),
    parts=st.integers(2, 4),
)
def test_any_views_of_a_split_dimension_are_refused_or_equal(
    sizes: tuple[int, ...], order: list[int], at: int, how: int, parts: int
) -> None:
    order = [0, *[n for n in order if n]]  # what a sample's output is has its row first
    model = Views(sizes, order, at, how)
    cutter = split(model, 5, 6)
    assert_refused_or_equal(cutter, span(cutter), parts, "auto")
