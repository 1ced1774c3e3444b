"""What a user loses: the line of the model that cannot be cut, and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streaminfer.errors import CaptureError
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter

EXAMPLE = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("streaminfer_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Base(nn.Module):
    linear: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(6))


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:  # here
            return y * 2
        return y


class Loops(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        while y.norm() > 1:  # here
            y = y / 2
        return y


class CutsByValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        n = int(self.linear(x).abs().max().item()) + 1  # here
        return x[:, :n]


class Picks(Base):
    def forward(self, x: Tensor) -> Tensor:
        kept = (x > 0).nonzero()  # here
        return self.linear(x) + kept.shape[0]


class Masks(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y[y[:, 0] > 0]  # here


class Scales(Base):
    """It can be traced; but the largest value of a merged batch is another one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * y.max().item()  # here


class Autocasts(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x) + 1  # here


class Conditions(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))  # here
        return self.linear(y)


class Rolls(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand_like(x)  # here


class Drops(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5)  # here


class Customs(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(twice(x))  # here


class Strides(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).as_strided((x.shape[0], 3), (6, 1))  # here


class Remembers(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(x.mean(0))  # here
        return x + self.seen


class Asks(Base):
    """Export follows the road of the example's 2 rows and says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.shape[0] > 4:  # here
            return y * 2
        return y


class Sums(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum()  # here


class Leaves(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy())  # here


REFUSED: dict[type[nn.Module], tuple[str, str]] = {
    Branches: ("data-dependent", "torch.where"),
    Loops: ("data-dependent", "torch.where"),
    CutsByValue: ("data-dependent", "torch.where"),
    Picks: ("the size of what aten.nonzero.default gives depends on the values", "torch.where"),
    Masks: ("the size of what aten.index.Tensor gives depends on the values", "masks"),
    Scales: ("the number that aten.item.default gives depends on the values", "same road"),
    Autocasts: ("wrap_with_autocast cannot be part of a stage", "x.to(dtype)"),
    Conditions: ("operator cond cannot be part of a stage", "torch.where"),
    Rolls: ("aten.rand_like.default draws random numbers", "eval mode"),
    Drops: ("aten.dropout.default draws random numbers", "training=self.training"),
    Customs: ("streaminfer_tests.twice.default cannot be part", "torch's own operators"),
    Strides: ("aten.as_strided.default cannot be part of a stage", "unfold"),
    Remembers: ("writes into a parameter or buffer", "earlier batches"),
    Asks: ("a batch of 5 rows takes another road than one of 2", "workers merge batches"),
    Sums: ("output 'output' has no row per sample: its shape is []", "must be the batch"),
    Leaves: (".numpy() is not supported", "see that line"),
}


def marked(kind: type[nn.Module]) -> Iterator[int]:
    lines, first = inspect.getsourcelines(kind)
    return (first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here"))


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_captured_is_refused_with_its_line_and_a_remedy(
    kind: type[nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    message, hint = REFUSED[kind]
    with pytest.raises(CaptureError) as caught:
        capture(kind(), (EXAMPLE,))
    assert message in caught.value.message
    assert hint in caught.value.hint
    (line,) = marked(kind)
    assert f"test_refusals.py:{line}" in caught.value.where
    assert capfd.readouterr() == ("", ""), "torch prints what it traced"


class Several(Base):
    def __init__(self, results: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.results = results

    def forward(self, x: Tensor) -> object:
        return self.results(self.linear(x))


def test_an_output_that_is_a_number_is_named() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Several(lambda y: {"y": y, "rows": y.shape[0]}), (EXAMPLE,))
    assert "output 'rows' is SymInt, no tensor" in caught.value.message


class ByWeight(Base):
    """A number of the weights is the same for every batch."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.linear(y) * self.seen.sum().item() + y.shape[1] * y.shape[0] / x.shape[0]


def test_numbers_that_follow_from_weights_and_sizes_do_not_cross_but_are_computed_again() -> None:
    model = ByWeight()
    cutter = Cutter(capture(model, (EXAMPLE,)))
    assert len(cutter.legal) == len(cutter.captured.nodes) - 1
    for cut in cutter.legal:
        first, second = cutter.split([cut])
        assert all(port.dtype == "F32" for port in second.inputs), "numbers do not travel"
        assert first.outputs


class Centres(Base):
    """The mean of a batch lives across a cut."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean()
        return self.linear(self.linear(x)) - mean


def test_what_is_made_of_the_whole_batch_crosses_no_cut() -> None:
    cutter = Cutter(capture(Centres(), (EXAMPLE,)))
    assert not [cut for cut in cutter.legal if cutter.captured.nodes[cut].name == "linear"]
    with pytest.raises(CaptureError, match="depends on the whole batch, and workers merge batches"):
        cutter.cuts(["linear"])
