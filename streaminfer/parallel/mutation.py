"""In-place operators: made pure where nobody looks on, and who shares memory where somebody does.

A cut may send two views of one tensor as two tensors. That is only right as long as neither is
written afterwards. So every in-place operator that can be replaced by its pure twin is, and for
the rest the alias classes say where a cut would part a writer from a reader:

    y = zeros(…)      {y}             cut here: fine, y travels alone
    v = y[:, 0]       {y, v}          cut here: y and v would part, and v is written below
    v.copy_(x)        {y, v} written  cut here: fine, v is dead
    use(y)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

__all__ = ["Aliases", "settle", "written"]


def _flagged(node: fx.Node, write: bool) -> Iterator[fx.Node]:
    """Yield the arguments that the schema says the operator aliases (or writes)."""
    if not isinstance(node.target, OpOverload):
        return
    for i, argument in enumerate(node.target._schema.arguments):
        info = argument.alias_info
        if info is None or (write and not info.is_write):
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        yield from (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node))


def written(node: fx.Node) -> list[fx.Node]:
    """Return the arguments whose memory the node writes."""
    return list(_flagged(node, write=True))


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {
        leaf.untyped_storage()._cdata
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    }


class Aliases:
    """Classes of nodes that may share memory, as the schemas say and as the trace has seen.

    Schemas are not enough (`dropout` in eval mode returns its input and does not declare it), the
    trace neither (`reshape` is a view or a copy, by layout): either one joins two nodes.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        self._storages = {node: _storages(node) for node in graph.nodes}

    def root(self, node: fx.Node) -> fx.Node:
        """Return the representative of a node's class."""
        while (parent := self._parent[node]) is not node:
            node = parent
        return node

    def members(self, node: fx.Node) -> list[fx.Node]:
        """Return the class of a node, in no order."""
        return self._members[self.root(node)]

    def add(self, node: fx.Node, pure: bool = False) -> None:
        """Put a node, whose arguments are in already, into its class.

        `pure`: it was in-place when traced, so that what the trace saw of it no longer holds.
        """
        self._parent[node], self._members[node] = node, [node]
        for other in _flagged(node, write=False):
            self._join(node, other)
        if not pure:
            for other in node.all_input_nodes:
                if self._storages[node] & self._storages[other]:
                    self._join(node, other)

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self.root(a), self.root(b)
        if a is not b:
            self._parent[a] = b
            self._members[b] += self._members.pop(a)


def _pure_twin(target: OpOverload) -> OpOverload | None:
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name[:-1], None) if name.endswith("_") else None
    twin = getattr(packet, target._overloadname, None)
    return twin if isinstance(twin, OpOverload) and not twin._schema.is_mutable else None


def _gives_the_same(twin: OpOverload, node: fx.Node) -> bool:
    """Tell whether the twin keeps dtype and layout: `x.add_(y)` keeps x's, `x.add(y)` may not."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    mode = detect_fake_mode(pytree.tree_leaves((args, kwargs)))
    if mode is None:
        return False
    with mode, torch.no_grad():
        result = twin(*args, **kwargs)
    val = node.meta["val"]
    # Strides, too: kernels choose by them how they sum, and a sum in another order is another sum.
    return bool(result.dtype == val.dtype) and _layout(result) == _layout(val)


def _layout(value: torch.Tensor) -> tuple[str, str]:
    return str(value.shape), str(value.stride())


def _purify(node: fx.Node, aliases: Aliases, order: dict[fx.Node, int]) -> bool:
    """Replace x_(v) by x(v), and v by the result in all that follows, if that changes no value."""
    targets, twin = written(node), None
    if isinstance(node.target, OpOverload) and len(targets) == 1 and targets[0] is node.args[0]:
        twin = _pure_twin(node.target)
    if twin is None:
        return False
    value = targets[0]
    family = aliases.members(value)
    looked_at = any(
        order[user] > order[node] for other in family if other is not value for user in other.users
    )
    state = any(other.op == "get_attr" for other in family)
    if looked_at or state or not _gives_the_same(twin, node):
        return False
    for user in list(value.users):
        if order[user] > order[node]:
            user.replace_input_with(value, node)
    node.target = twin
    return True


def settle(graph: fx.Graph) -> Aliases:
    """Make in-place operators pure where that changes no value; return who shares memory."""
    aliases = Aliases(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        pure = bool(written(node)) and _purify(node, aliases, order)
        aliases.add(node, pure)
    return aliases
