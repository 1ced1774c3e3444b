"""Any model that torch.export takes → one flat graph of ATen operators that may be cut.

Export's training IR (no decompositions: they bake strides into views), dynamic in dimension 0 and
wherever a sample may have sizes of a range.
The graph is then made fit for cutting: assertions about the tracing machine are dropped, a
`getitem` stands right behind the operator whose list it reads, in-place operators are pure where
they can be, and every node knows the module it came from.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from streaminfer.errors import CaptureError
from streaminfer.parallel.archive import Archive
from streaminfer.parallel.graph import Capture, Varying, is_batched, is_rows
from streaminfer.parallel.layers import Layers
from streaminfer.parallel.mutation import settle
from streaminfer.parallel.refusals import first_line, model_line, refuse
from streaminfer.parallel.sizes import Ranges, check_sizes, is_open, keep_sizes, varying
from streaminfer.ranges import Range

__all__ = ["Capture", "capture", "is_batched", "is_rows", "model_line"]

# They check what export saw (device, layout, value ranges); a stage checks its inputs itself.
_ASSERTIONS = ("aten._assert_", "aten.sym_constrain_range")


def capture(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    ranges: Ranges = (),
) -> Capture:
    """Capture a model, in eval mode, from an example of at least 2 rows.

    Args:
        model: any module; it is put into eval mode.
        args: its positional inputs; dimension 0 of every tensor is the batch.
        kwargs: its keyword inputs.
        ranges: the sizes that a sample may have, for each tensor of `args` and `kwargs`, of which
            the example has the largest; none: the example's alone.

    Raises:
        CaptureError: the model does not run on the example; export does not take it; its rows
            cannot be told apart; it is another for some sizes of a range; or it uses an operator
            that a stage may not hold.
    """
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not inputs or any(t.dim() == 0 or t.shape[0] < 2 for t in inputs):
        raise CaptureError(
            "the example needs tensors of at least 2 rows: 1 is taken for a constant"
        )
    model.eval()
    given, named = tuple(args), dict(kwargs or {})
    if isinstance(model, Archive):
        exported = model.exported
    else:
        exported = _export(model, given, named, dict(zip(map(id, inputs), ranges, strict=False)))
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)  # noqa: S101 - says torch, its types do not
    graph = module.graph
    _drop_assertions(graph)
    sizes: Varying = {}
    kept = None
    if any(is_open(one) for given in ranges for one in given):
        sizes = _sizes(model, module, given, named, ranges)
        kept = keep_sizes(graph, _tensor_inputs(graph), sizes)
    _hoist_getitem(graph)
    aliases = settle(graph)
    graph.eliminate_dead_code()
    captured = Capture(
        nodes=tuple(n for n in graph.nodes if n.op == "call_function"),
        inputs=_tensor_inputs(graph),
        outputs=_outputs(graph, exported.call_spec.out_spec),
        tensors=_tensors(module),
        layers=Layers([n for n in graph.nodes if n.op == "call_function"]),
        aliases=aliases,
        sizes=sizes,
        kept=kept,
    )
    refuse(captured)
    return captured


def _sizes(
    model: torch.nn.Module,
    module: fx.GraphModule,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranges: Ranges,
) -> Varying:
    """Return the symbols of the sizes, once the graph was found to be right for all of them."""
    module.recompile()
    inputs = _tensor_inputs(module.graph)
    leaves, tree = pytree.tree_flatten((args, kwargs))
    # by place, or by name: torch may have put keywords into another order
    places = {name: len(leaves) - len(kwargs) + i for i, name in enumerate(kwargs)}
    rest = iter(range(len(leaves) - len(kwargs)))
    order = [places[n.name] if n.name in places else next(rest) for n in inputs]

    def run(called: torch.nn.Module, tensors: list[torch.Tensor]) -> object:
        given = list(leaves)
        for at, tensor in zip(order, tensors, strict=True):
            given[at] = tensor
        positional, named = pytree.tree_unflatten(given, tree)
        return called(*positional, **named)

    sizes = varying(inputs, [ranges[at] for at in order])
    with _quiet():
        example = [leaves[at] for at in order]
        check_sizes(partial(run, model), partial(run, module), inputs, example, sizes)
    return sizes


def _export(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranges: Mapping[int, tuple[Range | None, ...]],
) -> torch.export.ExportedProgram:
    shapes = ", ".join(str(list(t.shape)) for t in pytree.tree_leaves((args, kwargs)) if _is(t))
    with torch.no_grad(), _quiet():
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example {shapes}: {first_line(error)}",
                where=model_line(error),
                hint="model.example is the shape of one sample, without the batch"
                + (
                    "; this is the largest, so end the range elsewhere"
                    if any(ranges.values())
                    else ""
                ),
            ) from error
        try:
            return _traced(model, args, kwargs, ranges)
        except Exception as error:
            raise CaptureError(
                f"torch.export does not take this model: {first_line(error)}",
                where=model_line(error),
                hint=_export_hint(error),
            ) from error


def _is(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _traced(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ranges: Mapping[int, tuple[Range | None, ...]],
) -> torch.export.ExportedProgram:
    """Export with dimension 0 of every tensor open, and those of `ranges` by the tensor's id.

    Several inputs are given one dimension by name: nothing in a model need say that the rows of a
    mask are those of the words. But a name also forbids what `AUTO` infers, so that is the second.
    """
    sizes: list[object] = [torch.export.Dim.AUTO]
    if sum(map(_is, pytree.tree_leaves((args, kwargs)))) > 1:
        sizes.insert(0, torch.export.Dim("batch"))
    for size in sizes:
        shapes = _dynamic(model, args, kwargs, size, ranges)
        try:
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception:
            if size is sizes[-1]:
                raise
    raise AssertionError


def _dynamic(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    size: object,
    ranges: Mapping[int, tuple[Range | None, ...]],
) -> Any:
    def mark(leaf: object) -> dict[int, object] | None:
        if not _is(leaf):
            return None
        declared = enumerate(ranges.get(id(leaf), ()), 1)
        auto = torch.export.Dim.AUTO
        return {0: size} | {
            at: auto(min=one.low, max=one.high) for at, one in declared if one and is_open(one)
        }

    # as torch sees them: what *args takes is one tuple
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if not kwargs:
        return pytree.tree_map(mark, tuple(bound.arguments.values()))
    return pytree.tree_map(mark, dict(bound.arguments))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch while it traces: what matters is in the error we raise."""
    logger = logging.getLogger("torch")
    children = [logger, *(logging.getLogger(n) for n in logging.root.manager.loggerDict)]
    noisy = [c for c in children if c.name.startswith("torch") and not c.disabled]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for child in noisy:
            child.disabled = True
        try:
            # it prints the graph so far when it meets a branch on a value
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                yield
        finally:
            for child in noisy:
                child.disabled = False


def _export_hint(error: BaseException) -> str:
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        return (
            "this line branches or indexes by a tensor's value: write it with torch.where or "
            "masks, so that every batch takes the same road"
        )
    return "see that line; https://docs.pytorch.org/docs/stable/export.html says what export takes"


def _drop_assertions(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op == "call_function" and str(node.target).startswith(_ASSERTIONS):
            graph.erase_node(node)


def _hoist_getitem(graph: fx.Graph) -> None:
    """Move every getitem behind its operator: what lives across a cut is then never a list."""
    for node in list(graph.nodes):
        anchor = node
        for user in [u for u in node.users if u.target is operator.getitem]:
            user.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            anchor.append(user)
            anchor = user


def _tensor_inputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    return tuple(n for n in graph.nodes if n.op == "placeholder" and _is(n.meta.get("val")))


def _outputs(graph: fx.Graph, spec: pytree.TreeSpec) -> dict[str, fx.Node]:
    """Name the outputs by their place in what the model returns: `a.0`, `a.1`, `b`."""
    leaves = pytree.tree_leaves(graph.output_node().args[0], is_leaf=lambda leaf: leaf is None)
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = {}
    for path, i in pytree.tree_flatten_with_path(tree)[0]:
        keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", ""))) for k in path]
        names[i] = ".".join(map(str, keys)) or "output"
    return {names[i]: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)}


def _tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Collect the tensors that `get_attr` nodes read, detached."""
    found = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in node.target.split("."):
                value = getattr(value, part)
            if _is(value):
                found[node.target] = value.detach()
    return found
