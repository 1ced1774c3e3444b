"""What a captured model may not do in stages, each with the line of the model and the remedy.

A stage computes batches that workers merged, anywhere and anew: so no state, no chance, no road
that only some batch sizes take, nothing made of the values of a whole batch but tensors with rows.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from streaminfer.errors import CaptureError
from streaminfer.parallel.graph import Capture, is_batched
from streaminfer.parallel.mutation import written
from streaminfer.parallel.operators import draws_random_numbers, name_of

__all__ = ["first_line", "model_line", "place_of", "refuse", "source_line"]

# Batch sizes at which a model's conditions on its rows are tried; the example has 2.
SIZES = (*range(2, 65), 100, 128, 256, 512, 1024)
PUBLIC = "stages hold torch's public ATen operators only"
FOREIGN = {
    "wrap_with_autocast": "capture keeps no autocast block: convert with x.to(dtype), or give the "
    "whole model that dtype in its factory",
    "cond": "rows of one batch go one road: compute both and choose with torch.where",
    "while_loop": "rows of one batch take the same steps: a loop over a fixed range()",
    "as_strided": f"{PUBLIC}, and none that reads memory by its layout: unfold, view or slices",
}
BY_VALUE = "every batch must take the same road: torch.where or masks instead of an index or a size"


def first_line(error: BaseException) -> str:
    """Return what an error of torch's says, without the explanations that follow."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split("  (Size-like")[0].strip()


def model_line(error: BaseException) -> str:
    """Return file:line of the innermost frame that is neither torch's nor ours; "" if none is."""
    skip = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if not name.startswith(skip):
            code = linecache.getline(name, line).strip()
            found = f"{name}:{line}" + (f" ({code})" if code else "")
    return found


def refuse(captured: Capture) -> None:
    """Raise CaptureError if a stage could not give what the model gives."""
    for check in (_foreign, _random, _stateful, _by_value, _lost_rows, _by_size):
        check(captured)


def source_line(node: fx.Node) -> str:
    """Return file:line of the innermost line of the model that made a node; "" if unknown.

    Torch keeps the lines of `forward` methods: of a function called there, it is the call's line.
    """
    skip = (str(Path(torch.__file__).parent), "torch/", "<")
    found = ""
    for line in str(node.meta.get("stack_trace") or "").splitlines():
        name, _, rest = line.strip().removeprefix('File "').partition('", line ')
        if line.strip().startswith('File "') and not name.startswith(skip):
            found = f"{name}:{rest.split(',')[0]}"
    return found or next(filter(None, map(source_line, _inside(node))), "")


def _inside(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes of graphs that a higher-order operator is given."""
    module = node.graph.owning_module
    for argument in node.all_input_nodes if module is not None else ():
        inner = getattr(module, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            yield from (n for n in inner.graph.nodes if n.op == "call_function")


def _foreign(captured: Capture) -> None:
    for node in captured.nodes:
        if name_of(node.target) is None:
            name = str(node.target)
            custom = getattr(node.target, "namespace", "aten") not in ("aten", "higher_order")
            own = "write it with torch's own operators" if custom else "write it with others"
            hint = FOREIGN.get(name.removeprefix("aten.").partition(".")[0], f"{PUBLIC}: {own}")
            _bad(f"operator {name} cannot be part of a stage", node, hint)


def _random(captured: Capture) -> None:
    for node in captured.nodes:
        if draws_random_numbers(node.target, node.args, node.kwargs):
            _bad(
                f"{node.target} draws random numbers, so no two runs agree",
                node,
                "in eval mode a model is a function: F.dropout(x, training=self.training)",
            )


def _stateful(captured: Capture) -> None:
    for node in captured.nodes:
        for value in written(node):
            if any(m.op == "get_attr" for m in captured.aliases.members(value)):
                _bad(
                    f"{node.target} writes into a parameter or buffer: the model keeps state",
                    node,
                    "a stage may run anywhere and anew: it must not depend on earlier batches",
                )


def _by_value(captured: Capture) -> None:
    """Refuse numbers and sizes that follow from the values of a batch: workers merge batches."""
    constant: set[fx.Node] = set()
    for node in captured.nodes:
        if all(n.op == "get_attr" or n in constant for n in node.all_input_nodes):
            constant.add(node)  # a weight's own value is the same for every batch
            continue
        leaves = pytree.tree_leaves(node.meta.get("val"))
        if any(free_unbacked_symbols(leaf) for leaf in leaves if leaf is not None):
            what = "the size of what" if isinstance(leaves[0], torch.Tensor) else "the number that"
            _bad(
                f"{what} {node.target} gives depends on the values of the whole batch, and "
                "workers merge and split batches",
                node,
                BY_VALUE,
            )


def _lost_rows(captured: Capture) -> None:
    for node in captured.inputs:
        if not isinstance(node.meta["val"].shape[0], torch.SymInt):
            raise CaptureError(
                f"the model has fixed the batch size of {node.name!r}",
                hint="use x.shape[0] or -1 instead of a number in view, reshape, expand, zeros …; "
                "an archive: torch.export.export(…, dynamic_shapes=({0: Dim.AUTO},))",
            )
    for name, node in captured.outputs.items():
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            hint = "return tensors only"
            _bad(f"output {name!r} is {type(val).__name__}, no tensor", node, hint)
        if not is_batched(node, captured.batch):
            _bad(
                f"output {name!r} has no row per sample: its shape is {list(val.shape)}",
                node,
                "dimension 0 of every output must be the batch",
            )
    for node in captured.inputs:
        if not is_batched(node, captured.batch):
            raise CaptureError(f"input {node.name!r} may have another batch size than the others")


def _by_size(captured: Capture) -> None:
    """Refuse a model that asks how many rows there are: the graph has the road for 2 only."""
    rows = captured.batch.node
    for guard in rows.shape_env.guards if rows.shape_env else ():
        if guard.expr.free_symbols != rows.expr.free_symbols:
            continue
        (symbol,) = guard.expr.free_symbols
        for size in SIZES:
            if guard.expr.subs(symbol, size) == False:  # noqa: E712 - sympy's False
                raise CaptureError(
                    f"a batch of {size} rows takes another road than one of 2",
                    where=place_of(str(guard.sloc)),
                    hint="a model must not ask for its batch size: workers merge batches",
                )


def place_of(shortened: str) -> str:
    """Return file:line of a guard, of which torch keeps what its own folder's path has not."""
    name, _, rest = shortened.strip("() ").partition(":")
    base = Path(torch.__file__).parent
    if not rest or (base / name).is_file():
        return ""
    found = [folder / name for folder in base.parents if (folder / name).is_file()]
    return f"{found[0] if found else Path(name).name}:{rest.partition(' ')[0]}"


def _bad(message: str, node: fx.Node, hint: str) -> NoReturn:
    raise CaptureError(message, where=source_line(node), hint=hint)
