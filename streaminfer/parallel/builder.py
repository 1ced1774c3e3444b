"""A range of nodes → a graph that stands alone, with all it needs that does not cross the cut."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable

import torch
from torch import fx

from streaminfer.parallel.graph import Capture, expression, is_rows
from streaminfer.parallel.weights import same_memory

__all__ = ["Builder"]


class Builder:
    """Copies nodes in order; their sources come along.

    A source is an input, an earlier copy, a weight, or a value that follows from weights and the
    number of rows alone and is computed anew.
    """

    def __init__(
        self, captured: Capture, inputs: Iterable[fx.Node], written: Collection[fx.Node]
    ) -> None:
        """Begin a graph.

        Args:
            captured: what the nodes are of.
            inputs: what crosses the cut before them.
            written: those inputs that the nodes write, into a copy: the memory is the sender's.
        """
        self._captured, self._written = captured, written
        self._graph = fx.Graph()
        self._inputs = {node: self._graph.placeholder(node.name) for node in inputs}
        self._made: dict[fx.Node, fx.Node] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._tied: dict[tuple[object, ...], str] = {}

    def copy(self, node: fx.Node) -> None:
        """Copy a node."""
        if node not in self._made:
            self._made[node] = self._graph.node_copy(node, self._value)

    def finish(self, outputs: Iterable[fx.Node]) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
        """End the graph with these outputs; return it and the weights that it reads."""
        through = {node: made for node, made in self._inputs.items() if node not in self._written}
        results = tuple(through[n] if n in through else self._value(n) for n in outputs)
        self._graph.output(results)
        self._graph.eliminate_dead_code()
        read = [str(node.target) for node in self._graph.nodes if node.op == "get_attr"]
        return self._graph, {name: self._weights[name] for name in read}

    def origins(self) -> dict[str, fx.Node]:
        """Return, by the name of a copy, what it was copied from."""
        return {made.name: node for node, made in self._made.items() if made.op == node.op}

    def _value(self, node: fx.Node) -> fx.Node:
        if node not in self._made:
            self._made[node] = self._source(node)
        return self._made[node]

    def _source(self, node: fx.Node) -> fx.Node:
        if node in self._inputs:
            return self._input(node)
        if node.op == "get_attr":
            return self._weight(node)
        if is_rows(node, self._captured.batch):
            return self._rows()
        return self._graph.node_copy(node, self._value)

    def _rows(self) -> fx.Node:
        first = next(iter(self._inputs.values()))
        return self._graph.call_function(torch.ops.aten.sym_size.int, (first, 0))

    def _weight(self, node: fx.Node) -> fx.Node:
        name = str(node.target)
        tensor = self._captured.tensors[name]
        kept = self._tied.setdefault(same_memory(tensor), name)
        self._weights[kept] = tensor
        made = self._graph.node_copy(node)
        made.target = kept
        return made

    def _input(self, node: fx.Node) -> fx.Node:
        """Give an input the strides it had in the whole model.

        Tensors travel contiguous. But a linear layer on a transposed tensor takes another kernel
        than on a contiguous one, which sums in another order and gives other last bits.
        """
        value, sent = node.meta["val"], self._inputs[node]
        strides = None if value.is_contiguous() else self._strides(value, sent)
        call = self._graph.call_function
        if strides is not None:
            sizes = [self._size(sent, at, n) for at, n in enumerate(value.shape)]
            options = {"dtype": value.dtype, "device": value.device}
            memory = call(torch.ops.aten.empty_strided.default, (sizes, strides), options)
            return call(torch.ops.aten.copy_.default, (memory, sent))
        return call(torch.ops.aten.clone.default, (sent,)) if node in self._written else sent

    def _size(self, sent: fx.Node, at: int, size: int | torch.SymInt) -> int | fx.Node:
        if isinstance(size, int):
            return size
        if self._captured.varies(size):
            return self._graph.call_function(torch.ops.aten.sym_size.int, (sent, at))
        return self._rows()

    def _strides(self, value: torch.Tensor, sent: fx.Node) -> list[int | fx.Node] | None:
        """Return strides, as numbers or multiples of the rows; None for expanded or odd ones."""
        if any(map(self._captured.varies, value.shape)):
            return self._dense(value, sent)
        batch = self._captured.batch.node.expr
        strides: list[int | fx.Node] = []
        for stride in value.stride():
            symbol = getattr(stride, "node", None)
            factor = symbol.expr / batch if symbol else None
            if stride == 0 or (factor is not None and not factor.is_Integer):
                return None
            call = self._graph.call_function
            strides.append(
                call(operator.mul, (self._rows(), int(factor))) if factor is not None else stride
            )
        return strides

    def _dense(self, value: torch.Tensor, sent: fx.Node) -> list[int | fx.Node] | None:
        """Return strides of memory without gaps in another order of dimensions; None if it isn't.

        Each is the product of the sizes that lie within it: sizes are known when the stage runs.
        """
        sizes = {symbol: given.high for symbol, given in self._captured.sizes.items()}
        sizes[self._captured.batch.node.expr] = 2
        largest = [int(expression(n).subs(sizes)) for n in value.stride()]
        inner: int | fx.Node = 1
        expected = expression(1)
        strides: list[int | fx.Node] = [1] * value.dim()
        for at in sorted(range(value.dim()), key=lambda k: (largest[k], -k)):
            stride, size = value.stride(at), value.shape[at]
            if expression(stride) != expected:
                return None
            strides[at], expected = inner, expected * expression(size)
            inner = self._graph.call_function(operator.mul, (inner, self._size(sent, at, size)))
        return strides
