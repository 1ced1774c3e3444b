"""Samples of many sizes: which symbols stand for them, and whether one graph is right for all.

torch.export traces one sample, the largest, and notes what it took for granted of its sizes. Where
a size of the range breaks such an assumption, the model and the graph are both run on it: the model
may not take it, the graph may have another road for it, or it was about memory only.

A stage that needs a size of the input behind a cut (to scale its output up to it, say) gets it as
the shape of a tensor without values, `[rows, 0, height, width]`: no byte travels, and as batches
are formed of equal shapes, rows of other sizes are never among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import sympy
import torch
from torch import fx

from streaminfer.errors import CaptureError
from streaminfer.parallel.graph import Varying, expression
from streaminfer.parallel.refusals import first_line, model_line, place_of
from streaminfer.ranges import Range, describe

__all__ = ["Ranges", "check_sizes", "is_open", "keep_sizes", "varying"]

Ranges = Sequence[tuple[Range | None, ...]]  # by input: of each size of a sample; () if all fixed
Sizes = tuple[tuple[int, ...], ...]  # by input: the shape of a sample
Run = Callable[[list[torch.Tensor]], object]

ALL = 64  # sizes of a range that are tried one by one, from the lowest
FEW = 8  # of those above, evenly spaced
STEPS = (2, 4, 8, 16, 32, 64, 128)  # by which networks halve
SAME = 1e-3  # of the largest output: other kernels sum in another order
ONE = "this model needs one size: declare it fixed, with input.resize and input.crop"


def varying(inputs: Sequence[fx.Node], ranges: Ranges) -> Varying:
    """Return the symbols that stand for the sizes of the inputs, each with its range.

    Raises:
        CaptureError: the trace has fixed a size, or made two of unlike ranges one.
    """
    found: dict[Any, Range] = {}
    for node, given in zip(inputs, ranges, strict=True):
        for at, declared in enumerate(given, 1):
            if declared is None or not is_open(declared):
                continue
            size = node.meta["val"].shape[at]
            symbol = expression(size)
            where = f"{node.name!r}, dimension {at - 1} of a sample"
            if not symbol.is_Symbol:
                raise CaptureError(
                    f"the model takes only {size} for input {where}, which {declared} declares",
                    hint=ONE,
                )
            name = str(symbol) if _uses(symbol, inputs) > 1 else ""
            known = found.setdefault(symbol, replace(declared, name=name))
            if replace(known, name="") != declared:
                raise CaptureError(
                    f"input {where} is {declared}, but the model takes samples only where it "
                    f"equals another size, and that is {known}",
                    hint="give both the same range",
                )
    return found


def is_open(declared: Range | None) -> bool:
    """Tell whether there is more than one size."""
    return declared is not None and declared.low < declared.high


def _uses(symbol: object, inputs: Sequence[fx.Node]) -> int:
    sizes = [n for node in inputs for n in node.meta["val"].shape[1:]]
    return sum(bool(expression(n) == symbol) for n in sizes)


# ---- is one graph right for all ------------------------------------------------------------------


@dataclass(frozen=True)
class _Broken:
    """What the trace took for granted, and the first sizes for which it is not so."""

    guard: Any
    at: Mapping[Any, int]


def check_sizes(
    model: Run,
    graph: Run,
    inputs: Sequence[fx.Node],
    example: Sequence[torch.Tensor],
    sizes: Varying,
) -> None:
    """Run the model and its graph wherever the graph may be wrong, and at the smallest sizes.

    Raises:
        CaptureError: the model does not take a size of the range, or the graph is another model
            there; says the place, and the step that would do.
    """
    broken = list(_broken(inputs, sizes))
    tried: set[Sizes] = set()
    lowest = {symbol: given.low for symbol, given in sizes.items()}
    for fault in [*broken, _Broken(None, lowest)]:
        shapes = tuple(_shape(*pair, fault.at) for pair in zip(inputs, example, strict=True))
        if shapes in tried:
            continue
        tried.add(shapes)
        tensors = [_resized(t, shape) for t, shape in zip(example, shapes, strict=True)]
        if message := _difference(model, graph, tensors):
            text = ", ".join(f"{n.name} {list(s)}" for n, s in zip(inputs, shapes, strict=True))
            raise CaptureError(
                f"model.example admits {text}: {message[0]}",
                where=message[1] or (place_of(str(fault.guard.sloc)) if fault.guard else ""),
                hint=_remedy(inputs, sizes, broken),
            )


def _broken(inputs: Sequence[fx.Node], sizes: Varying) -> Iterator[_Broken]:
    """Yield the assumptions of the trace that do not hold for all sizes."""
    shapes = [node.meta["val"].shape for node in inputs]
    environment = next(n.node.shape_env for s in shapes for n in s if isinstance(n, torch.SymInt))
    seen: set[object] = set()
    if environment is None:
        return
    for guard in environment.guards:
        expression = guard.expr.xreplace(environment.replacements)
        if expression in seen:
            continue
        seen.add(expression)
        if (at := _first_failure(expression, sizes)) is not None:
            yield _Broken(guard, at)


def _first_failure(expression: Any, sizes: Varying) -> Mapping[Any, int] | None:
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols or not set(symbols) <= set(sizes):
        return None
    tries = [_tried(sizes[symbol], many=len(symbols) == 1) for symbol in symbols]
    for values in product(*tries):
        at = dict(zip(symbols, values, strict=True))
        if expression.xreplace(_numbers(at)) == False:  # noqa: E712 - sympy's False
            return {symbol: at.get(symbol, given.high) for symbol, given in sizes.items()}
    return None


def _numbers(at: Mapping[Any, int]) -> dict[Any, Any]:
    return {symbol: sympy.Integer(value) for symbol, value in at.items()}


def _tried(given: Range, *, many: bool) -> list[int]:
    """Return sizes of a range, low first: odd ones among them, and the highest."""
    if not many:
        near = [given.low, given.low + given.step, given.between(0.5), given.high]
        return sorted({n for n in near if n in given})
    first = range(given.low, given.high + 1, given.step)[:ALL]
    return sorted({*first, *(given.between(k / FEW) for k in range(FEW + 1))})


def _shape(node: fx.Node, example: torch.Tensor, at: Mapping[Any, int]) -> tuple[int, ...]:
    pairs = zip(node.meta["val"].shape, example.shape, strict=True)
    return tuple(at.get(expression(n), size) for n, size in pairs)[1:]


def _resized(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the beginning of every dimension: what is in range stays in range."""
    return tensor[(slice(None), *(slice(n) for n in shape))].contiguous()


def _difference(model: Run, graph: Run, tensors: list[torch.Tensor]) -> tuple[str, str] | None:
    """Say how the graph is not the model on these tensors, and where; None if it is."""
    with torch.no_grad():
        try:
            whole = _leaves(model(tensors))
        except Exception as error:
            return f"the model does not run on it: {first_line(error)}", model_line(error)
        try:
            found = _leaves(graph(tensors))
        except Exception:  # torch has noted that it is for larger ones only
            found = []
    if len(whole) != len(found) or not all(map(_alike, whole, found)):
        return "the model takes another road there than for the largest sizes", ""
    return None


def _leaves(outputs: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    largest = float(a.double().abs().nan_to_num(0, 0, 0).max()) if a.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=0, atol=SAME * largest, equal_nan=True)


def _remedy(inputs: Sequence[fx.Node], sizes: Varying, broken: Sequence[_Broken]) -> str:
    """Return the ranges with the smallest step at which nothing is broken."""
    for step in STEPS:
        steps = {symbol: _stepped(given, step) for symbol, given in sizes.items()}
        if any(given is None for given in steps.values()):
            break
        fits = {symbol: given for symbol, given in steps.items() if given is not None}
        guards = [fault.guard.expr for fault in broken]
        if broken and all(_first_failure(g, fits) is None for g in guards):
            names = [describe(node.meta["val"].shape[1:], _ranges(node, fits)) for node in inputs]
            return f"{' and '.join(names)} would do: sides are then resized to the nearest"
    return f"{ONE}; or begin the range higher"


def _stepped(given: Range, step: int) -> Range | None:
    low, high = -(-given.low // step) * step, given.high // step * step
    return Range(low, high, max(step, given.step)) if low < high else None


def _ranges(node: fx.Node, sizes: Varying) -> tuple[Range | None, ...]:
    shape = node.meta["val"].shape[1:]
    return tuple(sizes.get(expression(n)) for n in shape)


# ---- sizes behind a cut --------------------------------------------------------------------------


def keep_sizes(graph: fx.Graph, inputs: Sequence[fx.Node], sizes: Varying) -> fx.Node | None:
    """Let what asks for a size of the input ask a tensor that has no values; return that tensor.

    None where nothing asks.
    """
    asking: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            value = node.meta.get("val")
            symbol = expression(value) if isinstance(value, torch.SymInt) else None
            if symbol in sizes:
                asking.setdefault(symbol, []).append(node)
    if not asking:
        return None
    kept = _carrier(graph, inputs, list(asking))
    for at, nodes in enumerate(asking.values(), 2):
        for node in nodes:
            node.args = (kept, at)
    return kept


def _carrier(graph: fx.Graph, inputs: Sequence[fx.Node], symbols: Sequence[Any]) -> fx.Node:
    size, first = torch.ops.aten.sym_size.int, inputs[0]
    anchor = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(anchor):
        numbers: list[Any] = [graph.call_function(size, (first, 0)), 0]
        numbers[0].meta["val"] = first.meta["val"].shape[0]
        for symbol in symbols:
            node, at = _source(inputs, symbol)
            numbers.append(graph.call_function(size, (node, at)))
            numbers[-1].meta["val"] = node.meta["val"].shape[at]
        made = torch.ops.aten.new_zeros.default
        options: dict[str, Any] = {"dtype": torch.uint8}
        kept = graph.create_node("call_function", made, (first, numbers), options, "sizes")
    shape = [n.meta["val"] if isinstance(n, fx.Node) else n for n in numbers]
    kept.meta["val"] = first.meta["val"].new_zeros(shape, dtype=torch.uint8)
    return kept


def _source(inputs: Sequence[fx.Node], symbol: Any) -> tuple[fx.Node, int]:
    for node in inputs:
        for at, size in enumerate(node.meta["val"].shape):
            if expression(size) == symbol:
                return node, at
    raise AssertionError(symbol)
