"""What a pipeline must give: its models themselves, uncut, and what stands between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from streaminfer.parallel import Program, load
from streaminfer.parallel.capture import capture
from streaminfer.parallel.fuse import Fuse
from streaminfer.parallel.pipeline import Cutter
from streaminfer.parallel.program import dump
from streaminfer.planning.example import Inputs, example_inputs
from streaminfer.planning.factory import make_model
from streaminfer.planning.lower import FUSES, exit_model
from streaminfer.spec import ModelSpec, PipelineSpec
from streaminfer.spec.stages import StageSpec

__all__ = ["reference"]

Whole = Callable[[Inputs], Sequence[Tensor]]
Make = Callable[[ModelSpec], nn.Module]
_Head = Callable[[Inputs, list[Tensor]], list[Tensor]]
CPU = torch.device("cpu")


def reference(
    spec: PipelineSpec, *, random_weights: bool = False, device: torch.device = CPU
) -> Whole:
    """Return the function of a batch on a device that the stages of a plan must compute.

    Raises ConfigError if a model cannot be made.
    """
    base = spec.path.parent if spec.path else None

    def make(model: ModelSpec) -> nn.Module:
        made = make_model(model, base, random_weights=random_weights, trust=spec.trust)
        return made.to(device)

    *_, last = spec.stages
    whole = _model(spec, make, device) if spec.model else None
    if not last.branches:
        assert whole is not None  # noqa: S101 - the spec's checks
        return whole
    return _ensemble(spec, last, make, whole, device)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the tensors that a model gives, in order."""
    return [leaf for leaf in pytree.tree_leaves(inputs.into(model)) if isinstance(leaf, Tensor)]


def _model(spec: PipelineSpec, make: Make, device: torch.device) -> Whole:
    assert spec.model is not None  # noqa: S101 - asked by the caller
    model = make(spec.model)
    split = spec.stages[0].split
    if split and split.reduce != "exact":
        return _tiles(model, split.grid or (1, 1), split.reduce, classes=spec.output.top_k > 0)
    heads = _exits(spec, spec.model, model, make, device)

    def run(batch: Inputs) -> Sequence[Tensor]:
        outputs = _outputs(model, batch)
        for head in reversed(heads):  # the first that is sure has the last word
            outputs = head(batch, outputs)
        return outputs

    return run


def _tiles(model: nn.Module, grid: tuple[int, int], reduce: str, *, classes: bool) -> Whole:
    """Take each tile for an image, and reduce what the model says of them.

    Votes on classes are the logarithms of their shares.
    """

    def run(batch: Inputs) -> Sequence[Tensor]:
        rows = torch.tensor_split(batch.args[0], grid[0], 2)
        tiles = [tile for row in rows for tile in torch.tensor_split(row, grid[1], 3)]
        values = torch.stack(
            [_outputs(model, Inputs((tile.contiguous(),)))[0] for tile in tiles], 1
        )
        if reduce == "sum":
            return [values.sum(1)]
        if reduce == "vote":
            best = nn.functional.one_hot(values.argmax(2), values.shape[2])
            shares = best.to(values.dtype).mean(1)
            return [shares.log() if classes else shares]
        return [values.mean(1)]

    return run


def _exits(
    spec: PipelineSpec,
    declared: ModelSpec,
    model: nn.Module,
    make: Make,
    device: torch.device,
) -> list[_Head]:
    """Return, for every exit, what puts its answers in the place of the model's."""
    exits = [stage for stage in spec.stages if stage.exit is not None]
    if not exits:
        return []
    given = example_inputs(declared).to(device)
    cutter = Cutter(capture(model, given.args, given.kwargs, given.ranges))
    found = []
    for stage in exits:
        assert stage.exit is not None  # noqa: S101 - chosen by it
        until = (stage.until,) if stage.until else ()
        last = cutter.cuts(until)[0] if until else len(cutter.captured.nodes) - 1
        graph = cutter.stage(0, last)
        trunk = load(dump(graph), graph.weights, device)
        head = make(exit_model(stage.exit, graph.outputs[0]))
        found.append(_exit(trunk, head, stage.exit.threshold))
    return found


def _exit(trunk: Program, head: nn.Module, threshold: float) -> _Head:
    def run(batch: Inputs, outputs: list[Tensor]) -> list[Tensor]:
        (logits,) = _outputs(head, Inputs(trunk(*batch.ports(trunk.inputs))))
        sure = logits.float().softmax(1).amax(1) >= threshold
        return [torch.where(sure[:, None], logits, outputs[0])]

    return run


def _ensemble(
    spec: PipelineSpec,
    stage: StageSpec,
    make: Make,
    trunk: Whole | None,
    device: torch.device,
) -> Whole:
    models = [make(branch.model) for branch in stage.branches]
    if stage.fuse in FUSES:
        weights = [branch.weight for branch in stage.branches]
        fused = Fuse(stage.fuse, weights, classes=spec.output.top_k > 0)
        fuse: nn.Module = fused.to(device)
    else:
        fuse = make(ModelSpec(factory=stage.fuse, example=(1,)))

    def run(batch: Inputs) -> Sequence[Tensor]:
        inputs = Inputs(tuple(trunk(batch))) if trunk else batch
        values = [_outputs(model, inputs)[0] for model in models]
        if isinstance(fuse, Fuse):
            values = [torch.ones(len(batch), len(values), device=values[0].device), *values]
        return _outputs(fuse, Inputs(tuple(values)))

    return run
