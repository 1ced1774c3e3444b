"""A stage on disk: JSON of allow-listed operators, run by an interpreter over a list of slots.

    {"version": 1,
     "inputs":  [["x", "F32", [null, 3, 224, 224]]],              as in the plan
     "weights": [["conv1.weight", "F32", [64, 3, 7, 7]], …],      what stage.safetensors must hold
     "nodes":   [["conv2d", "aten.conv2d.default", [{"v": "x"}, {"w": "conv1.weight"}], {}], …],
     "outputs": [["relu", "F32", [null, 64, 112, 112], {"v": "relu"}]]}

A value is null, a bool, a number, a string, a list of values, or one of {"v": an earlier value},
{"w": a weight}, {"dtype": "float32"}, {"float": "inf"}, {"layout": "strided"},
{"format": "contiguous_format"}, {"device": null}: the device the stage is loaded on, whatever
the device of capture was. Nothing in it is executed but what `operators` allows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import fx
from torch._ops import OpOverload

from streaminfer.errors import CaptureError, PlanError
from streaminfer.parallel.calls import Call, Slot
from streaminfer.parallel.inplace import overwriting
from streaminfer.parallel.kernels import quicker, with_quick_stem
from streaminfer.parallel.operators import arguments, name_of, resolve
from streaminfer.parallel.replay import Replay
from streaminfer.parallel.script import Scripted, Steps
from streaminfer.parallel.signature import DTYPES, Port, dtype_name

if TYPE_CHECKING:
    from streaminfer.parallel.pipeline import StageGraph

__all__ = ["Program", "dump", "load"]

VERSION = 1
_TORCH_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_FORMAT_NAMES = {value: name for name, value in _FORMATS.items()}
_TABLES: dict[str, Mapping[str, object]] = {
    "dtype": _TORCH_DTYPES,
    "format": _FORMATS,
    "layout": {"strided": torch.strided},
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}  # by the tag of a value

# ---- out -----------------------------------------------------------------------------------------


def dump(stage: StageGraph) -> bytes:
    """Write a stage's graph.

    Raises:
        CaptureError: an argument has no form in the file.
    """
    nodes = [
        [n.name, name_of(n.target), _encode_all(n.args), _encode_all(n.kwargs)]
        for n in stage.graph.nodes
        if n.op == "call_function"
    ]
    results = stage.graph.output_node().args[0]
    assert isinstance(results, tuple)  # noqa: S101 - as `pipeline` makes it
    document = {
        "version": VERSION,
        "inputs": [port[:3] for port in stage.inputs],
        "weights": [
            [name, dtype_name(t.dtype) or str(t.dtype), list(t.shape)]
            for name, t in stage.weights.items()
        ],
        "nodes": nodes,
        "outputs": [
            [*port[:3], _encode(value)] for port, value in zip(stage.outputs, results, strict=True)
        ],
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _encode_all(values: object) -> object:
    if isinstance(values, Mapping):
        return {name: _encode(value) for name, value in values.items()}
    return _encode(values)


def _encode(value: object) -> object:
    if isinstance(value, fx.Node):
        return {"w": value.target} if value.op == "get_attr" else {"v": value.name}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": None}
    if isinstance(value, torch.memory_format):
        return {"format": _FORMAT_NAMES[value]}
    if value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CaptureError(f"an argument of type {type(value).__name__} has no form in a stage file")


# ---- in ------------------------------------------------------------------------------------------


class Program:
    """A loaded stage: call it, from one thread, with its inputs in order; it gives its outputs."""

    def __init__(
        self,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        calls: Sequence[Call],
        results: Sequence[object],
        names: Mapping[str, Slot],
        device: torch.device,
    ) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._calls, self._results, self._names = calls, results, names
        self._by: Callable[[Sequence[torch.Tensor]], tuple[torch.Tensor, ...]] = self._all
        if device.type == "cuda":
            self._by = Replay(self._all, device)
        elif device.type == "cpu":
            self._by = Scripted(self._run, calls, len(inputs), results)

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stage. The inputs must have passed `check_inputs`; they are not written.

        On a GPU the next run may write over what this one gave.
        """
        return self._by(tensors)

    @property
    def steps(self) -> int:
        """How often a run goes from Python into torch: once per operator, or once per script."""
        return self._by.steps if isinstance(self._by, Scripted) else len(self._calls)

    def _all(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self._run(self._calls, tensors)

    def _run(self, steps: Steps, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        slots = self._slots(tensors)
        with torch.inference_mode():
            for step in steps:
                step.run(slots)
        return self._given(slots)

    def stepped(
        self,
        tensors: Sequence[torch.Tensor],
        step: Callable[[str, Callable[[], None], Values], None],
    ) -> tuple[torch.Tensor, ...]:
        """Run the stage by `step`: it gets each call's name, what runs it, and the values so far.

        What is in the values is what a stage that ends there would give: what is read no more may
        be overwritten.
        """
        slots = self._slots(tensors)
        values = Values(slots, self._names)
        with torch.inference_mode():
            for call in self._calls:
                step(call.name, partial(call.run, slots), values)
        return self._given(slots)

    def _slots(self, tensors: Sequence[torch.Tensor]) -> list[object]:
        return [*tensors, *[None] * (len(self._names) - len(tensors))]

    def _given(self, slots: Sequence[object]) -> tuple[torch.Tensor, ...]:
        return tuple(slots[slot] for slot in self._results)  # type: ignore[call-overload]


class Values:
    """The values of a run by their names."""

    def __init__(self, slots: list[object], names: Mapping[str, Slot]) -> None:
        self._slots, self._names = slots, names

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._slots[self._names[name]]
        assert isinstance(value, torch.Tensor), name  # noqa: S101 - what crosses cuts
        return value

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self._slots[self._names[name]] = value


def load(
    document: bytes, weights: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
) -> Program:
    """Read a stage's graph, bind its weights to a device, resolve every operator once.

    Raises:
        PlanError: the file is not one that `dump` writes, asks for what a stage may not do, or
            is not of these weights.
    """
    try:
        return _Loader(weights, torch.device(device)).load(
            json.loads(document, parse_constant=_no_constant)
        )
    except (ValueError, RecursionError) as error:
        raise PlanError(f"stage.json is no JSON: {error}", hint=_REMEDY) from None


_REMEDY = "the plan is damaged or of another version: build it again"


def _bad(message: str) -> NoReturn:
    raise PlanError(f"stage.json: {message}", hint=_REMEDY)


def _no_constant(text: str) -> NoReturn:
    _bad(f"{text} is no number")


def _fields(row: object, *kinds: type) -> list[object]:
    if not isinstance(row, list) or len(row) != len(kinds):
        _bad(f"expected {len(kinds)} fields, found {str(row)[:60]}")
    for value, kind in zip(row, kinds, strict=True):
        if not isinstance(value, kind):
            _bad(f"expected {kind.__name__}, found {str(value)[:60]}")
    return row


def _port(name: object, dtype: object, shape: object) -> Port:
    dims = shape if isinstance(shape, list) else []
    if any(n is not None and (type(n) is not int or n < 0) for n in dims):
        _bad(f"{name!r} has no shape: {str(shape)[:60]}")
    if dtype not in DTYPES:
        _bad(f"{name!r} has no dtype that crosses a cut: {str(dtype)[:60]}")
    return Port(str(name), str(dtype), tuple(dims))


class _Loader:
    """One reading of one file."""

    def __init__(self, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._given, self._device = weights, device
        self._weights: dict[str, torch.Tensor] = {}
        self._slots: dict[str, Slot] = {}
        self._last_use: dict[Slot, int] = {}
        self._at = 0  # the call that is being read

    def load(self, document: object) -> Program:
        keys = {"version", "inputs", "weights", "nodes", "outputs"}
        if not isinstance(document, dict) or set(document) != keys:
            _bad(f"expected an object of {', '.join(sorted(keys))}")
        if document["version"] != VERSION:
            _bad(f"version {str(document['version'])[:20]}, expected {VERSION}")
        if any(not isinstance(document[key], list) for key in keys - {"version"}):
            _bad("expected lists")
        inputs = [_port(*_fields(row, str, str, list)) for row in document["inputs"]]
        for port in inputs:
            self._define(port.name)
        self._bind(document["weights"])
        calls = [self._call(i, row) for i, row in enumerate(document["nodes"])]
        self._at = len(calls)
        outputs = [_fields(row, str, str, list, dict) for row in document["outputs"]]
        results = [self._decode(row[3]) for row in outputs]
        if not inputs or not results or not all(isinstance(r, Slot) for r in results):
            _bad("a stage needs inputs, and outputs that are values")
        calls = with_quick_stem(overwriting(calls, results), results, self._device)
        return Program(
            tuple(inputs),
            tuple(_port(*row[:3]) for row in outputs),
            self._with_deaths(calls),
            results,
            self._slots,
            self._device,
        )

    def _define(self, name: str) -> Slot:
        if name in self._slots:
            _bad(f"{name!r} is defined twice")
        self._slots[name] = slot = Slot(len(self._slots))
        return slot

    def _bind(self, rows: Iterable[object]) -> None:
        for row in rows:
            name, dtype, shape = _fields(row, str, str, list)
            tensor = self._given.get(str(name))
            if tensor is None:
                _bad(f"weight {name!r} is not in stage.safetensors")
            kind = dtype_name(tensor.dtype) or str(tensor.dtype)
            if kind != dtype or list(tensor.shape) != shape:
                _bad(f"weight {name!r} is {kind} {list(tensor.shape)}, expected {dtype} {shape}")
            self._weights[str(name)] = tensor.to(self._device)

    def _call(self, at: int, row: object) -> Call:
        self._at = at
        name, operator, given, named = _fields(row, str, str, list, dict)
        assert isinstance(given, list) and isinstance(named, dict)  # noqa: S101 - _fields
        function = resolve(str(operator))
        if function is None:
            _bad(f"operator {str(operator)[:60]!r} is not allowed in a stage")
        args = [self._decode(value) for value in given]
        kwargs = {key: self._decode(value) for key, value in named.items()}
        if isinstance(function, OpOverload):
            if arguments(function, args, kwargs) is None:
                _bad(f"{name!r}: these are not the arguments of {operator}")
        elif kwargs or not all(_is_size(arg) for arg in args):
            _bad(f"{name!r}: {operator} takes sizes only")
        return Call(
            str(name),
            function,
            quicker(function, self._device),
            args,
            tuple((i, arg) for i, arg in enumerate(args) if _has_hole(arg)),
            {key: arg for key, arg in kwargs.items() if not _has_hole(arg)},
            tuple((key, arg) for key, arg in kwargs.items() if _has_hole(arg)),
            self._define(str(name)),
        )

    def _with_deaths(self, calls: list[Call]) -> list[Call]:
        """Give every call the values that nobody reads after it, its own included if unread."""
        deaths: dict[int, list[Slot]] = {}
        for slot, at in self._last_use.items():
            deaths.setdefault(at, []).append(slot)
        return [
            call._replace(
                dead=(*deaths.get(i, ()), *(() if call.slot in self._last_use else (call.slot,)))
            )
            for i, call in enumerate(calls)
        ]

    def _decode(self, value: object) -> object:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, dict):
            return self._decode_tagged(value)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            _bad("an integer beyond 64 bits")
        return value

    def _decode_tagged(self, value: dict[str, object]) -> object:
        if len(value) != 1:
            _bad(f"no value: {str(value)[:60]}")
        ((tag, content),) = value.items()
        if tag == "device" and content is None:
            return self._device
        if not isinstance(content, str):
            _bad(f"no value: {str(value)[:60]}")
        if tag == "v" and content in self._slots:
            self._last_use[self._slots[content]] = self._at
            return self._slots[content]
        table = self._weights if tag == "w" else _TABLES.get(tag, {})
        if content not in table:
            _bad(f"unknown here: {str(value)[:60]}")
        return table[content]


def _has_hole(value: object) -> bool:
    if isinstance(value, list):
        return any(_has_hole(item) for item in value)
    return isinstance(value, Slot)


def _is_size(value: object) -> bool:
    if isinstance(value, list):
        return all(_is_size(item) for item in value)
    return isinstance(value, int | float)
