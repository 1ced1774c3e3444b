"""What a user loses: the same numbers from a cut model as from the whole one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streaminfer.errors import CaptureError
from streaminfer.parallel import Program, check_inputs, load, weights
from streaminfer.parallel.capture import capture
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.program import dump
from tests.models import MODELS, Aliased, SkipMLP, make, numbers


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    """Torch's fused attention of eager mode sums in another order than what export sees."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    yield
    torch.backends.mha.set_fastpath_enabled(value=before)


@functools.cache
def whole(name: str) -> tuple[nn.Module, Cutter]:
    model = make(name)
    return model, Cutter(capture(model, (MODELS[name].rows(2),)))


def reload(stages: Sequence[StageGraph], folder: Path) -> list[Program]:
    programs = []
    for i, stage in enumerate(stages):
        weights.write(folder / f"{i}.safetensors", stage.weights)
        programs.append(load(dump(stage), weights.read(folder / f"{i}.safetensors")))
    return programs


def run(programs: Sequence[Program], rows: Tensor) -> Sequence[Tensor]:
    """Run stages as workers do: what crosses is contiguous, checked, and nobody else's memory."""
    tensors: Sequence[Tensor] = [rows]
    for program in programs:
        tensors = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        check_inputs(program.inputs, tensors)
        before = [t.clone() for t in tensors]
        outputs = program(*tensors)
        assert all(map(torch.equal, tensors, before)), "a stage wrote into what it was sent"
        check_inputs(program.outputs, outputs)
        tensors = outputs
    return tensors


def assert_equal(
    model: nn.Module, programs: Sequence[Program], rows: Tensor, tolerance: float = 0.0
) -> None:
    with torch.no_grad():
        expected = [t for t in pytree.tree_leaves(model(rows)) if isinstance(t, Tensor)]
    found = run(programs, rows)
    assert len(found) == len(expected)
    if tolerance:
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    else:
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_from_disk_give_the_bits_of_the_whole(
    name: str, stages: int, tmp_path: Path
) -> None:
    model, cutter = whole(name)
    cuts = [cutter.legal[(len(cutter.legal) - 1) * k // stages] for k in range(1, stages)]
    programs = reload(cutter.split(sorted(set(cuts))), tmp_path)
    for n in (1, 2, 3, 5):
        assert_equal(model, programs, MODELS[name].rows(n))


@pytest.mark.parametrize("name", ["dense", "branches", "causal", "in_place", "tagger", "tied"])
def test_every_legal_cut_gives_the_bits_of_the_whole(name: str, tmp_path: Path) -> None:
    model, cutter = whole(name)
    assert cutter.legal
    # what crosses a cut is laid out anew, and the sums behind an LSTM follow the layout
    tolerance = 1e-6 if name == "tagger" else 0.0
    for cut in cutter.legal:
        programs = reload(cutter.split([cut]), tmp_path)
        assert_equal(model, programs, MODELS[name].rows(3), tolerance)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_what_is_written_through_an_operator_that_did_nothing_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = Aliased().eval(), numbers(6)
    exported = torch.export.export(model, (rows(2),)).run_decompositions({})
    if not torch.equal(exported.module()(rows(2)), model(rows(2))):
        pytest.skip(f"torch {torch.__version__} itself loses such a write (2.11 does)")
    cutter = Cutter(capture(model, (rows(2),)))
    for cut in cutter.legal:
        assert_equal(model, reload(cutter.split([cut]), tmp_path), rows(3))


def test_a_cut_that_would_part_two_views_of_written_memory_is_refused_because_it_is_wrong(
    tmp_path: Path,
) -> None:
    model, cutter = whole("in_place")
    refused = [
        i
        for i in range(len(cutter.captured.nodes) - 1)
        if i not in cutter.legal and not cutter.problem(i)
    ]
    assert refused
    rows = numbers(6)(3)
    wrong = 0
    for cut in refused:
        found = reload(cutter.split([cut]), tmp_path)
        tensors: Sequence[Tensor] = [rows]
        for program in found:
            tensors = program(*[t.clone() for t in tensors])
        wrong += not torch.equal(tensors[0], model(rows))
    assert wrong > len(refused) / 2, "the rule refuses what would have been right"


@settings(max_examples=40, deadline=None)
@given(
    skips=st.lists(st.integers(0, 9), min_size=2, max_size=8),
    positions=st.sets(st.integers(0, 23), max_size=4),
    rows=st.integers(1, 5),
)
def test_any_cuts_of_any_skip_network_are_exact(
    skips: list[int], positions: set[int], rows: int
) -> None:
    model, cutter = skip_network(tuple(skips))
    cuts = sorted({cutter.legal[p % len(cutter.legal)] for p in positions})
    programs = [load(dump(stage), stage.weights) for stage in cutter.split(cuts)]
    assert len(programs) == len(cuts) + 1
    assert_equal(model, programs, numbers(8)(rows))


@functools.lru_cache(maxsize=64)
def skip_network(skips: tuple[int, ...]) -> tuple[nn.Module, Cutter]:
    torch.manual_seed(0)
    model = SkipMLP(list(skips)).eval()
    return model, Cutter(capture(model, (numbers(8)(2),)))


def test_each_stage_holds_its_own_weights_and_all_together_the_whole(tmp_path: Path) -> None:
    model, cutter = whole("resnet18")
    stages = cutter.split(cutter.cuts(["layer1", "layer3.0"]))
    names = [set(stage.weights) for stage in stages]
    for one, other in itertools.combinations(names, 2):
        assert not one & other
    assert names[0] >= {"conv1.weight", "layer1.1.bn2.running_var"}
    assert names[2] >= {"layer3.1.conv1.weight", "fc.bias"}
    used = {n: t for n, t in model.state_dict().items() if "num_batches" not in n}
    assert set.union(*names) == set(used)
    sizes = [weights.write(tmp_path / f"{i}", stage.weights) for i, stage in enumerate(stages)]
    assert sum(sizes) == sum(t.nbytes for t in used.values())
    assert (tmp_path / "0").stat().st_size < sizes[0] + 20_000, "the file drags others along"


def test_a_weight_under_two_names_is_kept_once_per_stage(tmp_path: Path) -> None:
    _, cutter = whole("tied")
    (one,) = cutter.split([])
    assert len(one.weights) == 2, "a and b are one tensor, c another"
    first, second = cutter.split(cutter.cuts(["c"]))
    assert len(first.weights) == 2
    assert len(second.weights) == 1
    assert weights.write(tmp_path / "w", one.weights) == 2 * 36 * 4


def test_masks_made_of_sizes_alone_are_computed_again_not_sent() -> None:
    _, cutter = whole("causal")
    (cut,) = cutter.cuts(["second"])
    shapes = [port.shape for port in cutter.split([cut])[1].inputs]
    assert shapes == [(None, 4, 6)], "the mask [4, 4] has no rows and must not cross"


def test_layers_are_those_the_user_knows() -> None:
    _, cutter = whole("resnet18")
    first, second, third = cutter.split(cutter.cuts(["layer2.0", "layer2.1.conv1"]))
    assert first.layers == ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2.0")
    assert second.layers == ("layer2.1.conv1",)
    assert third.layers[:2] == ("layer2.1.bn1", "layer2.1.relu")
    assert third.layers[-1] == "fc"
    assert [p.name for p in third.outputs] == ["output"]


def test_outputs_have_the_names_the_model_gives_them() -> None:
    _, cutter = whole("tagger")
    assert list(cutter.captured.outputs) == ["tags", "pool.0"]


def test_names_of_tensors_are_the_same_at_every_build() -> None:
    _, cutter = whole("dense")
    again = Cutter(capture(make("dense"), (MODELS["dense"].rows(2),)))
    cuts = [cutter.legal[7]]
    assert [s.inputs for s in again.split(cuts)] == [s.inputs for s in cutter.split(cuts)]
    assert [dump(s) for s in again.split(cuts)] == [dump(s) for s in cutter.split(cuts)]


@pytest.mark.parametrize(
    ("untils", "message", "hint"),
    [
        (["layer9"], "no layer 'layer9'", "layer"),
        (["layr3.0"], "no layer 'layr3.0'", "layer3.0"),
        (["layer3.0.conv9"], "no layer 'layer3.0.conv9'", "layer3.0.conv"),
        (["layer3", "layer2"], "'layer2' does not end after 'layer3'", "order of the model"),
        (["layer3", "layer3.1"], "'layer3.1' does not end after 'layer3'", "order of the model"),
        (["fc"], "no cut behind 'fc': it ends the model", "avgpool (before)"),
    ],
)
def test_a_wrong_layer_is_answered_with_right_ones(
    untils: list[str], message: str, hint: str
) -> None:
    _, cutter = whole("resnet18")
    with pytest.raises(CaptureError) as caught:
        cutter.cuts(untils)
    assert message in caught.value.message
    assert hint in caught.value.hint


class TimeFirst(nn.Module):
    """Between `there` and `back` the batch is not dimension 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.there, self.middle, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.there(self.first(x).transpose(0, 1))
        return self.last(self.middle(y).transpose(0, 1))  # type: ignore[no-any-return]


def test_a_layer_without_rows_is_refused_and_the_nearest_are_named() -> None:
    cutter = Cutter(capture(TimeFirst(), (torch.randn(2, 4, 6),)))
    with pytest.raises(CaptureError) as caught:
        cutter.cuts(["middle"])
    assert "no row per sample" in caught.value.message
    assert "first (before)" in caught.value.hint
    assert "last" not in caught.value.hint, "it ends the model"


def test_bytes_and_weights_at_a_cut_are_what_is_sent_and_held() -> None:
    _, cutter = whole("resnet18")
    (cut,) = cutter.cuts(["layer2"])
    first, second = cutter.split([cut])
    assert cutter.row_bytes(cut) == 128 * 8 * 8 * 4
    sizes = [sum(t.nbytes for t in s.weights.values()) for s in (first, second)]
    assert cutter.weights_before()[cut] == sizes[0]
    assert cutter.weights_before()[-1] == sum(sizes)
