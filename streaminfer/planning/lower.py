"""What the user declared → the stages of the plan: models are captured, cut, split and joined.

road      the stages of one model, one behind the other
fan       a split stage: scatter ─▶ parts ─▶ gather
ensemble  the roads of several models side by side, and their gather
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from torch import nn

from streaminfer.errors import CaptureError, ConfigError
from streaminfer.parallel.capture import capture
from streaminfer.parallel.fan import Fan
from streaminfer.parallel.fuse import Fuse
from streaminfer.parallel.pipeline import Cutter, StageGraph
from streaminfer.parallel.relabel import example, identity, renamed
from streaminfer.parallel.signature import Port
from streaminfer.parallel.spatial import approximate_tiles, split_tiles
from streaminfer.parallel.tensor import split_channels
from streaminfer.plan import PRESENT, Edge, Source
from streaminfer.planning.example import example_inputs
from streaminfer.ranges import describe
from streaminfer.spec import ModelSpec, PipelineSpec
from streaminfer.spec.stages import ExitSpec, PartSpec, StageSpec

__all__ = ["FUSES", "Draft", "exit_model", "lower"]

Make = Callable[[ModelSpec], nn.Module]
FUSES = ("mean", "max", "vote")


@dataclass(frozen=True)
class Draft:
    """A stage of the plan with its graph; the fields are those of `StagePlan`."""

    name: str
    path: str
    graph: StageGraph
    sources: tuple[Source, ...]
    edge: Edge
    kind: Literal["stage", "scatter", "part", "gather"] = "stage"
    part: int | None = None
    gather: str = ""
    pixels: bool = False
    exit: StageGraph | None = None
    threshold: float = 1.0


def lower(spec: PipelineSpec, make: Make) -> list[Draft]:
    """Capture the models of a pipeline and lay out the stages of its plan, first to last.

    Raises:
        ConfigError: branches or an exit do not fit what they stand beside.
        CaptureError: a model cannot be captured, cut or split as declared.
    """
    return _Lowering(spec, make).drafts()


def _taken(graph: StageGraph, draft: Draft | None) -> tuple[Source, ...]:
    """Say what a graph takes of the one draft before it."""
    return (Source(stage=draft.name, tensors=_names(graph.inputs)),) if draft else ()


def _names(ports: Sequence[Port]) -> tuple[str, ...]:
    return tuple(port.name for port in ports)


class _Lowering:
    """One pass over a pipeline file."""

    def __init__(self, spec: PipelineSpec, make: Make) -> None:
        self._spec, self._make = spec, make
        self._drafts: list[Draft] = []
        self._image = spec.input.decode == "image"

    def drafts(self) -> list[Draft]:
        *_, last = self._spec.stages
        layered = [stage for stage in self._spec.stages if not stage.branches]
        before: Draft | None = None
        if self._spec.model is not None:
            stages = [(stage.name, stage) for stage in layered]
            before = self._road(self._cutter(self._spec.model), stages, None, "")
        if last.branches:
            self._ensemble(last, before)
        return self._drafts

    def _cutter(self, model: ModelSpec) -> Cutter:
        given = example_inputs(model)
        return Cutter(capture(self._make(model), given.args, given.kwargs, given.ranges))

    def _add(self, draft: Draft) -> Draft:
        self._drafts.append(draft)
        return draft

    def _edge(self, path: str) -> Edge:
        edge = self._spec.edge(path)
        return Edge(dtype=edge.dtype, compress=edge.compress)

    # ---- one model -----------------------------------------------------------------------------

    def _road(
        self,
        cutter: Cutter,
        stages: Sequence[tuple[str, PartSpec]],
        before: Draft | None,
        gather: str,
        *,
        pixels: bool = True,
    ) -> Draft:
        """Add the stages of one model behind `before` (None: the pipeline's input).

        `pixels`: what it takes is the pipeline's input. Returns the last one.
        """
        untils = [stage.until for _, stage in stages if stage.until is not None]
        ends = [-1, *cutter.cuts(untils), len(cutter.captured.nodes) - 1]
        for k, ((path, stage), (start, last)) in enumerate(
            zip(stages, pairwise(ends), strict=True)
        ):
            first, raw = start + 1, pixels and k == 0 and self._image
            if stage.split is None:
                before = self._plain(path, stage, cutter.stage(first, last), before, gather, raw)
                continue
            with _blaming(f"stages.{path}.split"):
                fan = self._split(cutter, stage, first, last)
            following = stages[k + 1] if k + 1 < len(stages) else None
            joined = following is not None and following[1].split is None
            edge = self._edge(following[0] if following and joined else path)
            before = self._fan(path, fan, before, gather, raw=raw, edge=edge)
        assert before is not None  # noqa: S101 - a road has stages
        return before

    def _plain(
        self,
        path: str,
        stage: PartSpec,
        graph: StageGraph,
        before: Draft | None,
        gather: str,
        raw: bool,
    ) -> Draft:
        alone = before is not None and before.gather == gather and self._is_joined(before)
        return self._add(
            Draft(
                path,
                path,
                graph,
                _taken(graph, before),
                Edge() if alone else self._edge(path),
                gather=gather,
                pixels=raw,
                exit=self._exit(path, stage.exit, graph, gather) if stage.exit else None,
                threshold=stage.exit.threshold if stage.exit else 1.0,
            )
        )

    def _is_joined(self, before: Draft) -> bool:
        """Whether what follows runs in the worker of this gather, whose parts are elsewhere."""
        return before.kind == "gather" and self._spec.edge(before.path).transport == "kafka"

    def _split(self, cutter: Cutter, stage: PartSpec, first: int, last: int) -> Fan:
        split = stage.split
        assert split is not None  # noqa: S101 - asked by the caller
        if split.by == "channels":
            return split_channels(cutter, first, last, split.count, split.form)
        assert split.grid is not None  # noqa: S101 - the spec's checks
        if split.reduce == "exact":
            return split_tiles(cutter, first, last, split.grid)
        if (first, last) != (0, len(cutter.captured.nodes) - 1):
            raise CaptureError(
                f"stage {stage.name!r}: tiles with reduce: {split.reduce} take each tile for an "
                "image, so they need the whole model",
                hint="make it the only stage; or reduce: exact, which takes any stage of "
                "convolutions",
            )
        ranked = self._spec.output.top_k > 0
        return approximate_tiles(
            cutter.stage(first, last), split.grid, split.reduce, classes=ranked
        )

    def _fan(
        self, path: str, fan: Fan, before: Draft | None, gather: str, *, raw: bool, edge: Edge
    ) -> Draft:
        """Add the parts of a split stage; the gather's `edge` is what their outputs take."""
        own, sliced = f"{path}.gather", fan.scatter is not None
        # a slice of channels has lost the means of the others: normalise before
        whole = raw and sliced and fan.scatter is not None and _channels_differ(fan.scatter)
        if fan.scatter is not None or before is None:
            graph = fan.scatter or identity(fan.inputs())
            opens = before is not None and before.gather != gather  # a branch: others take it, too
            before = self._add(
                Draft(
                    f"{path}.scatter", path, graph, _taken(graph, before),
                    self._edge(path) if opens else Edge(),
                    kind="scatter", gather=gather, pixels=whole,
                )
            )  # fmt: skip
        parts = []
        for k, graph in enumerate(fan.parts):
            taken, edge_in = _taken(graph, before), self._edge(path)
            part = Draft(
                f"{path}.{k}", path, graph, taken, edge_in, kind="part", part=k, gather=own
            )
            parts.append(self._add(replace(part, pixels=raw and not whole)))
        sources = tuple(Source(stage=p.name, tensors=_names(p.graph.outputs)) for p in parts)
        return self._add(Draft(own, path, fan.gather, sources, edge, kind="gather", gather=gather))

    def _exit(self, path: str, declared: ExitSpec, graph: StageGraph, gather: str) -> StageGraph:
        where = f"stages.{path}.exit"
        if gather:
            raise ConfigError(
                "a branch has no exit: its gather needs every row",
                where=where,
                hint="drop it; an exit stands behind a stage of the pipeline's own model",
            )
        if len(graph.outputs) != 1:
            raise ConfigError(
                f"{len(graph.outputs)} tensors cross the cut behind {path!r}; an exit takes one",
                where=where,
                hint="end the stage where one tensor crosses: streaminfer cut shows it",
            )
        (port,) = graph.outputs
        head = self._make(exit_model(declared, port))
        ranges = [port.ranges]
        (made,) = Cutter(capture(head, example(graph.outputs), ranges=ranges)).split([])
        if len(made.outputs) != 1 or len(made.outputs[0].shape) != 2:
            found = ", ".join(f"{p.name} {list(p.shape)}" for p in made.outputs)
            raise ConfigError(
                f"an exit gives logits [batch, classes]; this one gives {found}",
                where=where,
                hint="end it with nn.Flatten and nn.Linear, or with a mean over rows and columns",
            )
        return renamed(made, {made.inputs[0].name: port.name}, {made.outputs[0].name: "output"})

    # ---- several models ------------------------------------------------------------------------

    def _ensemble(self, stage: StageSpec, before: Draft | None) -> None:
        """Add the branches of a stage and their gather."""
        path, own = stage.name, f"{stage.name}.gather"
        cutters = [self._cutter(branch.model) for branch in stage.branches]
        ports = [Cutter.stage(c, 0, len(c.captured.nodes) - 1) for c in cutters]
        pixels = before is None
        if before is None:
            root = identity(ports[0].inputs)
            before = self._add(Draft(f"{path}.scatter", path, root, (), Edge(), kind="scatter"))
        ends = []
        for k, (branch, cutter, whole) in enumerate(
            zip(stage.branches, cutters, ports, strict=True)
        ):
            here = f"{path}.{branch.name}"
            _fits(here, before.graph.outputs, whole.inputs)
            alias = dict(zip(_names(whole.inputs), _names(before.graph.outputs), strict=True))
            begin = len(self._drafts)
            parts = [(f"{here}.{part.name}", part) for part in branch.stages]
            alone = [(here, PartSpec(name=branch.name))]
            self._road(cutter, parts or alone, before, own, pixels=pixels)
            self._drafts[begin:] = _attach(self._drafts[begin:], before, alias, f"branch{k}")
            ends.append(self._drafts[-1])
        _alike(stage, ends)
        fused = self._fuse(stage, ends)
        sources = tuple(Source(stage=e.name, tensors=_names(e.graph.outputs)) for e in ends)
        self._add(Draft(own, path, fused, sources, self._edge(path), kind="gather"))

    def _fuse(self, stage: StageSpec, ends: Sequence[Draft]) -> StageGraph:
        outputs = [port for end in ends for port in end.graph.outputs]
        given = example(outputs)
        if stage.fuse in FUSES:
            weights = [branch.weight for branch in stage.branches]
            module: nn.Module = Fuse(stage.fuse, weights, classes=self._spec.output.top_k > 0)
            present = Port(PRESENT, "F32", (None, len(ends)))
            outputs, given = [present, *outputs], (given[0].new_ones(2, len(ends)), *given)
        else:
            module = self._make(ModelSpec(factory=stage.fuse, example=outputs[0].sizes()))
        ranges = [port.ranges for port in outputs]
        (made,) = Cutter(capture(module.eval(), given, ranges=ranges)).split([])
        return renamed(made, dict(zip(_names(made.inputs), _names(outputs), strict=True)))


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Name the key of the pipeline file where an error has no place."""
    try:
        yield
    except CaptureError as error:
        if error.where:
            raise
        raise CaptureError(error.message, where=where, hint=error.hint) from error


def exit_model(declared: ExitSpec, port: Port) -> ModelSpec:
    """Return an exit as the model of the one tensor that crosses the cut before it."""
    return ModelSpec(
        factory=declared.factory,
        kwargs=declared.kwargs,
        weights=declared.weights,
        example=port.sizes(),
    )


def _channels_differ(scatter: StageGraph) -> bool:
    """Tell whether a scatter cuts channels and not only the image."""
    whole = {port.shape[1] for port in scatter.inputs}
    return any(port.shape[1] not in whole for port in scatter.outputs)


def _attach(
    drafts: Sequence[Draft], before: Draft, alias: dict[str, str], branch: str
) -> list[Draft]:
    """Give a branch's first stages the names of what they take, and its last one's its own."""
    attached = []
    for draft in drafts:
        inputs = alias if any(s.stage == before.name for s in draft.sources) else {}
        outputs = (
            {name: f"{branch}_{at}" for at, name in enumerate(_names(draft.graph.outputs))}
            if draft is drafts[-1]
            else {}
        )
        graph = renamed(draft.graph, inputs, outputs) if inputs or outputs else draft.graph
        sources = tuple(
            Source(stage=s.stage, tensors=tuple(inputs.get(t, t) for t in s.tensors))
            for s in draft.sources
        )
        attached.append(replace(draft, graph=graph, sources=sources))
    return attached


def _fits(branch: str, given: Sequence[Port], wanted: Sequence[Port]) -> None:
    """Raise ConfigError unless a branch takes what it is given."""
    kinds = [[(p.dtype, p.shape[1:]) for p in ports] for ports in (given, wanted)]
    within = kinds[0] == kinds[1] and all(map(_covers, wanted, given))
    if not within:
        text = [
            ", ".join(f"{p.dtype} {describe(p.shape[1:], p.ranges)}" for p in ports)
            for ports in (given, wanted)
        ]
        raise ConfigError(
            f"branch {branch!r} takes {text[1]}; it is given {text[0]}",
            where=f"stages.{branch}.model.example",
            hint="all branches take the same input",
        )


def _covers(wanted: Port, given: Port) -> bool:
    """Tell whether all sizes of one tensor are sizes of another."""
    return all(
        a is None or b is None or (a.low <= b.low and b.high <= a.high and a.step in (1, b.step))
        for a, b in zip(wanted.ranges, given.ranges, strict=True)
    )


def _alike(stage: StageSpec, ends: Sequence[Draft]) -> None:
    """Raise ConfigError unless all branches give one output of the same kind."""
    kinds = [[(p.dtype, p.shape[1:]) for p in end.graph.outputs] for end in ends]
    for branch, kind in zip(stage.branches, kinds, strict=True):
        if len(kind) != 1 or kind != kinds[0]:
            found = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kind)
            first = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds[0])
            raise ConfigError(
                f"branch {branch.name!r} gives {found}; {stage.branches[0].name!r} gives {first}",
                where=f"stages.{stage.name}.branches",
                hint="branches give one output each, of the same shape",
            )
