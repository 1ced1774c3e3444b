"""Plans of every shape without a model: the stages that a pipeline file of fans is laid out in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hypothesis import strategies as st

from streaminfer.plan import Edge, Plan, Source, StagePlan, TensorSpec
from streaminfer.spec import PipelineSpec
from streaminfer.spec.stages import PartSpec

DIGEST = "0123456789abcdef" * 4
MODEL = {"factory": "toy.py:build", "example": [3, 8, 8]}


def declare(stages: Sequence[dict[str, Any]], **changes: Any) -> PipelineSpec:
    """Make a pipeline of these stages; those of a model get their ends."""
    ended = [{"until": f"layer-{s['name']}", **s} for s in stages]
    whole = {"pipeline": "toy", "model": MODEL, "stages": _last_open(ended), **changes}
    if all("branches" in stage for stage in stages):
        del whole["model"]
    return PipelineSpec.model_validate(whole)


def _last_open(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the end off the last stage that has layers, and off what has none."""
    layered = [stage for stage in stages if "branches" not in stage]
    for stage in stages:
        if stage not in layered or stage is layered[-1]:
            stage.pop("until", None)
    return stages


def planned(spec: PipelineSpec, slicing: Collection[str] = (), row: int = 4) -> Plan:
    """Lay a pipeline out as a build does.

    `slicing` are the paths of the split stages that send each part a slice of its own; a number of
    `row` float32 is what a row has on every cut.
    """
    return _Planner(spec, slicing, row).plan()


class _Planner:
    def __init__(self, spec: PipelineSpec, slicing: Collection[str], row: int) -> None:
        self._spec, self._slicing, self._row = spec, slicing, row
        self._stages: list[StagePlan] = []

    def plan(self) -> Plan:
        spec, *_, last = self._spec, self._spec.stages[-1]
        layered = [(s.name, s) for s in spec.stages if not s.branches]
        before = self._road(layered, None, "") if layered else None
        if last.branches:
            if before is None:
                before = self._cell(f"{last.name}.scatter", last.name, kind="scatter")
            ends = []
            for branch in last.branches:
                path = f"{last.name}.{branch.name}"
                parts = [(f"{path}.{part.name}", part) for part in branch.stages]
                alone = [(path, PartSpec(name=branch.name))]
                ends.append(self._road(parts or alone, before, f"{last.name}.gather"))
            self._gather(last.name, ends, "", self._edge(last.name))
        return Plan(
            pipeline=spec.pipeline,
            digest=DIGEST,
            source="s",
            model="m",
            model_version="1",
            input=spec.input,
            stages=tuple(self._stages),
            top_k=0,
        )

    def _road(
        self, stages: Sequence[tuple[str, PartSpec]], before: StagePlan | None, gather: str
    ) -> StagePlan:
        for k, (path, stage) in enumerate(stages):
            if stage.split is None:
                inside = before is not None and before.gather == gather
                joined = inside and before is not None and self._joined(before)
                edge = Edge() if joined else self._edge(path)
                before = self._cell(path, path, before, gather=gather, edge=edge)
                continue
            follows = stages[k + 1] if k + 1 < len(stages) else None
            into = follows[0] if follows and follows[1].split is None else path
            before = self._fan(path, stage, before, gather, self._edge(into))
        assert before is not None
        return before

    def _fan(
        self, path: str, stage: PartSpec, before: StagePlan | None, gather: str, edge: Edge
    ) -> StagePlan:
        assert stage.split is not None
        count, slices = stage.split.count, path in self._slicing
        if before is None or slices:
            names = [f"{path}.x{k}" for k in range(count)] if slices else None
            opens = before is not None and before.gather != gather
            before = self._cell(
                f"{path}.scatter", path, before, kind="scatter", gather=gather, outputs=names,
                edge=self._edge(path) if opens else Edge(),
            )  # fmt: skip
        parts = [
            self._cell(
                f"{path}.{k}", path, before, kind="part", part=k, gather=f"{path}.gather",
                takes=[f"{path}.x{k}"] if slices else None, edge=self._edge(path),
            )
            for k in range(count)
        ]  # fmt: skip
        return self._gather(path, parts, gather, edge)

    def _gather(self, path: str, ends: list[StagePlan], gather: str, edge: Edge) -> StagePlan:
        return self._cell(f"{path}.gather", path, *ends, kind="gather", gather=gather, edge=edge)

    def _joined(self, before: StagePlan) -> bool:
        return before.kind == "gather" and self._spec.edge(before.path).transport == "kafka"

    def _edge(self, path: str) -> Edge:
        edge = self._spec.edge(path)
        return Edge(dtype=edge.dtype, compress=edge.compress)

    def _cell(
        self,
        name: str,
        path: str,
        *before: StagePlan | None,
        outputs: Sequence[str] | None = None,
        takes: Sequence[str] | None = None,
        **more: Any,
    ) -> StagePlan:
        sources = tuple(
            Source(stage=b.name, tensors=tuple(takes or [t.name for t in b.outputs]))
            for b in before
            if b is not None
        )
        taken = [t for source in sources for t in source.tensors] or ["image"]
        cell = StagePlan(
            name=name,
            path=path,
            inputs=self._specs(taken),
            outputs=self._specs(outputs or [name]),
            sources=sources,
            **more,
        )
        self._stages.append(cell)
        return cell

    def _specs(self, names: Sequence[str]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=n, dtype="F32", shape=(None, self._row)) for n in names)


# ---- any of them -----------------------------------------------------------------------------

EDGES = st.sampled_from(
    [
        {},
        {"transport": "local"},
        {"transport": "kafka"},
        {"dtype": "float16"},
        {"dtype": "int8"},
        {"partitioning": "balance"},
    ]
)


@st.composite
def roads(draw: st.DrawFn, names: str) -> list[dict[str, Any]]:
    """One to three stages, split or not."""
    found: list[dict[str, Any]] = []
    for name in names[: draw(st.integers(1, 3))]:
        parts = draw(st.sampled_from([1, 1, 2, 3]))
        split = {"split": {"by": "channels", "parts": parts}} if parts > 1 else {}
        found.append({"name": name, **split})
    return found


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[PipelineSpec, Plan]:
    """Any pipeline file that is valid, and its plan."""
    stages = draw(roads("abc"))
    if draw(st.booleans()):
        branches = []
        for name in "pqr"[: draw(st.integers(2, 3))]:
            inner = [] if draw(st.booleans()) else _last_open(
                [{"until": f"l-{s['name']}", **s} for s in draw(roads("uvw"))]
            )  # fmt: skip
            branches.append({"name": name, "model": MODEL, "stages": inner})
        quorum = draw(st.none() | st.integers(1, len(branches)))
        vote = {"name": "vote", "branches": branches, "quorum": quorum}
        stages = [vote] if draw(st.booleans()) else [*stages, vote]
    paths = [p for p in _paths(stages) if p.count(".") != 1]
    first = stages[0]
    if not ("split" in first or "branches" in first):
        paths.remove(first["name"])
    edges = {path: draw(EDGES) for path in ["default", *paths] if draw(st.booleans())}
    try:
        spec = declare(stages, edges=edges)
    except ValueError:
        spec = declare(stages)  # edges that the file's checks refuse
    every = [p for p, s in spec.placed().items() if getattr(s, "split", None)]
    slicing = [path for path in every if draw(st.booleans())]
    return spec, planned(spec, slicing)


def _paths(stages: Sequence[dict[str, Any]]) -> list[str]:
    found = []
    for stage in stages:
        found.append(stage["name"])
        for branch in stage.get("branches", ()):
            found.append(f"{stage['name']}.{branch['name']}")
            found += [f"{stage['name']}.{branch['name']}.{s['name']}" for s in branch["stages"]]
    return found
