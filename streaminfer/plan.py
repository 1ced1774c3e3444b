"""The plan directory: what makes the numbers, as files that any worker reads without torch.

    <plan>/plan.json                   this module
    <plan>/<stage>/stage.json          the stage's graph: allow-listed ATen operators, nothing else
    <plan>/<stage>/stage.safetensors   the stage's own weights

A plan is a graph of stages with one beginning and one end. What the user declared as one stage is
one of them, or, where it is split or an ensemble, several:

    stem ──▶ trunk.scatter ──▶ trunk.0 ──▶ trunk.gather ──▶ head
                          └──▶ trunk.1 ──┘

`planning/build.py` writes it; `digest` is the SHA-256 over everything in it that changes a number,
and travels in every envelope.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from streaminfer.errors import PlanError
from streaminfer.ranges import Range
from streaminfer.spec import InputSpec

__all__ = [
    "PRESENT",
    "Edge",
    "Exit",
    "Plan",
    "Source",
    "StagePlan",
    "TensorSpec",
    "exit_files",
    "scaled",
    "stage_files",
]

VERSION = 1
ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}  # every dtype that may cross a cut, by safetensors' name
FLOATS = ("F64", "F32", "F16", "BF16")
# edge dtype → wire dtype of floats
CAST = {"native": None, "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
WORTH = 8  # values that a scale of its own is worth: 1.5 bytes each, at the least


PRESENT = "present"  # input of a gather that does without some: F32 [rows, sources], 1 or 0


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Frozen):
    """A tensor at a cut. Dimension 0 is the batch; None = any size, settled by the data.

    `ranges`: between what the sizes of a row lie, None where it is one size; () where all are.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    ranges: tuple[Range | None, ...] = ()

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a plan of fixed sizes is written, and named by its digest, as before there were ranges
        fields: dict[str, Any] = dump(self)
        return fields if self.ranges else {k: v for k, v in fields.items() if k != "ranges"}

    def sizes(self, *, smallest: bool = False) -> tuple[int, ...]:
        """Return the shape of a row, at its largest; a size that nothing bounds is 1."""
        ranges = self.ranges or (None,) * len(self.shape[1:])
        return tuple(
            (given.low if smallest else given.high) if given else 1 if n is None else n
            for n, given in zip(self.shape[1:], ranges, strict=True)
        )

    def row_bytes(self, dtype: str = "native") -> int:
        """Bytes of one sample, at its largest, on an edge of this dtype."""
        shape = (1, *self.sizes())
        size, values = ITEMSIZE[self.dtype], prod(shape)
        if not (cast := CAST[dtype]) or self.dtype not in FLOATS:
            return values * size
        if cast != "I8":
            return values * min(size, ITEMSIZE[cast])
        dims = scaled(shape, size)
        scales = prod(shape[1:dims])
        return values + scales * ITEMSIZE["F32"] if dims else values * size


def scaled(shape: Sequence[int | None], itemsize: int) -> int:
    """Return how many leading dimensions have scales of their own on an int8 edge.

    2: each row's channels; 1: each row; 0: it is not smaller as int8, and stays as it is.
    """
    values = prod(n or 1 for n in shape[1:])
    if len(shape) > 2 and values >= WORTH * (shape[1] or 1):
        return 2
    return int(values + ITEMSIZE["F32"] < values * itemsize)


class Edge(_Frozen):
    """What comes into a stage, and how: `dtype` and `compress` change the numbers and the bytes."""

    dtype: Literal["native", "float16", "bfloat16", "int8"] = "native"
    compress: Literal["none", "zstd", "lz4"] = "none"


class Source(_Frozen):
    """What a stage takes of another one."""

    stage: str
    tensors: tuple[str, ...]


class Exit(_Frozen):
    """A head behind a stage; rows whose best class has this share of its softmax leave there."""

    threshold: float


class StagePlan(_Frozen):
    """One cut-out of a model's graph, or what stands around the parts of a split one."""

    name: str
    path: str  # of the declared stage or branch that it is of
    kind: Literal["stage", "scatter", "part", "gather"] = "stage"
    part: int | None = None  # number of a part within its split
    layers: tuple[str, ...] = ()  # as the user knows them, first to last
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sources: tuple[Source, ...] = ()  # none: the pipeline's input
    gather: str = ""  # the gather that answers for samples that fail here; "": none, the sink
    pixels: bool = False  # its first input comes as pixels, to be normalised here
    exit: Exit | None = None
    edge: Edge = Edge()  # into this stage; the first stage's is unused
    weight_bytes: int = 0

    @property
    def moves(self) -> bool:
        """Whether it only moves rows of any dtype: it cuts pixels before they are normalised."""
        return self.kind == "scatter" and not self.pixels


class Plan(_Frozen):
    """All stages, in order, and what stands before the first and behind the last."""

    version: Literal[1] = 1
    pipeline: str
    digest: str
    source: str  # key of what it was built from: the spec's part and the model's files
    model: str
    model_version: str
    input: InputSpec
    stages: tuple[StagePlan, ...]
    top_k: int  # 0 = raw outputs
    logits: str = ""  # of several outputs, the one that top_k ranks
    labels: tuple[str, ...] = ()
    random_weights: bool = False

    def stage(self, name: str) -> StagePlan:
        """Return the stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PlanError(
            f"no stage {name!r} in the plan",
            hint=f"stages are: {', '.join(s.name for s in self.stages)}",
        )

    def consumers(self, name: str) -> list[tuple[StagePlan, tuple[str, ...]]]:
        """Return the stages that take something of this one, and what."""
        return [(s, o.tensors) for s in self.stages for o in s.sources if o.stage == name]

    def voice(self, name: str) -> str:
        """Return which source the gather around a stage takes it for: itself, or what follows.

        "" where no gather is around.
        """
        gather = self.stage(name).gather
        while gather:
            following = [stage.name for stage, _ in self.consumers(name)]
            if gather in following:
                return name
            name = following[0]
        return ""

    def save(self, folder: Path) -> None:
        """Write plan.json, last of all and in one step: a folder with it is whole."""
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        part = folder / "plan.json.part"
        part.write_text(text + "\n")
        part.replace(folder / "plan.json")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan directory. Raises PlanError."""
        path = folder / "plan.json"
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise PlanError(
                "no plan here", where=str(path), hint="build it: streaminfer build PIPELINE"
            ) from None
        except ValidationError as error:
            raise PlanError(
                f"not a plan of this version: {error.errors()[0]['msg']}",
                where=str(path),
                hint="build it again: streaminfer build PIPELINE",
            ) from None


def stage_files(folder: Path, stage: str) -> tuple[Path, Path]:
    """Return where a stage's graph and weights are."""
    return folder / stage / "stage.json", folder / stage / "stage.safetensors"


def exit_files(folder: Path, stage: str) -> tuple[Path, Path]:
    """Return where the graph and the weights of a stage's exit are."""
    return folder / stage / "exit.json", folder / stage / "exit.safetensors"
