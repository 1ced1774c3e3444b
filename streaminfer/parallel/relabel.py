"""Small operations on a stage's graph: one that changes nothing, one with other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx

from streaminfer.parallel.pipeline import StageGraph
from streaminfer.parallel.signature import DTYPES, Port

__all__ = ["example", "identity", "renamed"]


def identity(ports: Sequence[Port]) -> StageGraph:
    """Return the graph whose outputs are its inputs."""
    graph = fx.Graph()
    graph.output(tuple(graph.placeholder(port.name) for port in ports))
    return StageGraph(graph, {}, tuple(ports), tuple(ports), ())


def renamed(
    stage: StageGraph, inputs: Mapping[str, str] = {}, outputs: Mapping[str, str] = {}
) -> StageGraph:
    """Return the same stage with other names of tensors; those left out keep theirs."""
    graph, made = fx.Graph(), {}
    for node in stage.graph.nodes:  # first, so that nothing else takes their names
        if node.op == "placeholder":
            made[node] = graph.placeholder(inputs.get(node.name, node.name))
    results = graph.graph_copy(stage.graph, made)
    graph.output(results)
    return replace(
        stage,
        graph=graph,
        inputs=tuple(p._replace(name=inputs.get(p.name, p.name)) for p in stage.inputs),
        outputs=tuple(p._replace(name=outputs.get(p.name, p.name)) for p in stage.outputs),
    )


def example(ports: Sequence[Port], rows: int = 2) -> tuple[torch.Tensor, ...]:
    """Return seeded random tensors as they cross a cut; a size of a range is its largest."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for port in ports:
        value = torch.randn(rows, *port.sizes(), generator=generator)
        tensors.append(value.to(DTYPES[port.dtype]))
    return tuple(tensors)
