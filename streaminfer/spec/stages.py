"""What a stage is made of: a model, its layers on devices, parts, branches, an exit.

ModelSpec   where a model comes from, and what it takes
StageSpec   layers on a device; split in parts, or branches that are fused; an exit
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from streaminfer.ranges import Range
from streaminfer.spec import checks
from streaminfer.spec.checks import refuse
from streaminfer.spec.units import (
    Devices,
    DType,
    Duration,
    Factory,
    FileName,
    Name,
    Positive,
    Shares,
    Sides,
    Version,
    at_least,
)

__all__ = [
    "BatchSpec",
    "BranchSpec",
    "ExitSpec",
    "Frozen",
    "ModelSpec",
    "PartSpec",
    "SplitSpec",
    "StageSpec",
    "TensorExample",
]


class Frozen(BaseModel):
    """A part of the file: never changed, no unknown keys, no yes or no for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError(
                "true or false is no value here (YAML reads yes, no, on and off as such: "
                "put a word in quotes)"
            )
        return value


class TensorExample(Frozen):
    """One input of a model: a sample's shape without the batch, and what may be in it.

    A size may be a range, "64..512" or "64..512/32": what is measured is measured at the largest.
    Floats are random normal; whole numbers are random from 0 to below `max`.
    """

    shape: tuple[Sides, ...]
    dtype: DType = "float32"
    max: Positive | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        refuse(checks.bound_problems(self))
        return self

    @property
    def ranges(self) -> tuple[Range | None, ...]:
        """The range of each size; None where it is one size. () where all are."""
        found = tuple(n if isinstance(n, Range) else None for n in self.shape)
        return found if any(found) else ()

    def sizes(self, shares: Sequence[float] = (1.0,)) -> tuple[int, ...]:
        """Return a sample's shape; its ranges by turns at a share of the way from the lowest."""
        share = cycle(shares)
        return tuple(n.between(next(share)) if isinstance(n, Range) else n for n in self.shape)


def _shape_alone(value: object) -> object:
    return {"shape": value} if isinstance(value, list | tuple) else value


_Shape = Annotated[tuple[Sides, ...], Field(min_length=1)]
_OneInput = Annotated[
    TensorExample, BeforeValidator(_shape_alone, json_schema_input_type=_Shape | TensorExample)
]


def _form(value: object) -> str:
    if isinstance(value, dict):
        return "named"
    several = (
        isinstance(value, list | tuple) and value and not isinstance(value[0], int | str | Range)
    )
    return "several" if several else "one"


Example = Annotated[
    Annotated[_Shape, Tag("one")]
    | Annotated[tuple[_OneInput, ...], Tag("several"), Field(min_length=1)]
    | Annotated[dict[str, _OneInput], Tag("named"), Field(min_length=1)],
    Discriminator(_form),
]


class ModelSpec(Frozen):
    """Where the model comes from. `example` is the shape of one sample, without the batch.

    A size may be a range, as in [3, "64..512", "64..512/32"]; images of many sizes then go through
    as they are, and with a step their sides are resized to the nearest size of the range.

    Of a model with several inputs, `example` is a list of them (given by position), or a mapping by
    the names of the forward's arguments (given as keywords): {shape, dtype, max} each.

    `factory` makes it, or `file` holds it: a .pt2 of torch.export, read only with --trust.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["factory"]}, {"required": ["file"]}]}
    )

    file: FileName | None = None
    factory: Factory = Field(default="", validate_default=True)
    kwargs: dict[str, JsonValue] = {}
    weights: FileName | None = None
    example: Example
    version: Version = "1"

    @field_validator("factory", mode="wrap")
    @classmethod
    def _one_source(
        cls, value: object, check: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> object:
        file = info.data.get("file")
        if value == "":
            if not file:
                raise ValueError("is missing")
            return value
        if file:
            raise ValueError("factory and file exclude each other: drop one")
        return check(value)

    @model_validator(mode="after")
    def _whole_file(self) -> Self:
        refuse(checks.file_problems(self))
        return self

    @property
    def varies(self) -> bool:
        """Whether its samples may differ in size."""
        return any(one.ranges for one in self.examples().values())

    def examples(self) -> dict[str, TensorExample]:
        """Return every input by the forward's argument, or by "0", "1", … where it has no name."""
        if isinstance(self.example, dict):
            return self.example
        given = [e for e in self.example if isinstance(e, TensorExample)]
        if not given:
            shape = tuple(n for n in self.example if isinstance(n, int | Range))
            given = [TensorExample(shape=shape)]
        return {str(i): one for i, one in enumerate(given)}


class BatchSpec(Frozen):
    """At most `max` samples in one device call, waiting at most `wait` seconds for them."""

    max: int = Field(default=16, ge=1, le=1024)
    wait: Duration = 0.004


class SplitSpec(Frozen):
    """A stage as parts that run side by side and are joined by one gather.

    channels: `parts` shards of the layers' channels; form `in` splits the first layer by its input
    channels, so that each part is sent its own only. tiles: `grid` rows and columns of the image;
    `reduce` exact gives the whole's numbers, the others take each tile for an image of its own.
    """

    by: Literal["channels", "tiles"]
    parts: Annotated[int, Field(ge=2, le=64)] | None = None
    form: Literal["auto", "in"] = "auto"
    grid: tuple[Positive, Positive] | None = None
    reduce: Literal["exact", "mean", "sum", "vote"] = "exact"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse(checks.split_problems(self))
        return self

    @property
    def count(self) -> int:
        """How many parts."""
        return self.grid[0] * self.grid[1] if self.grid else self.parts or 1


class ExitSpec(Frozen):
    """A head behind a stage: rows whose best class has this share of the softmax leave there."""

    factory: Factory
    kwargs: dict[str, JsonValue] = {}
    weights: FileName | None = None
    threshold: float = Field(default=0.9, gt=0, le=1)


class _Placed(Frozen):
    """Where layers run.

    `device`: one for all replicas, or a list with one for each (of a split stage: for each part).
    `shares`: what part of the partitions each replica gets, as relative speeds; "measured" lets
    each time itself when it starts. By default measured if the devices are unlike, else equal.
    """

    name: Name
    device: Devices = "cpu"
    replicas: Positive = 1
    shares: Shares | None = None
    threads: Positive | None = None
    batch: BatchSpec | None = None

    @property
    def places(self) -> int:
        """How many devices a list of them has to name."""
        return self.replicas

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each place."""
        return (self.device,) * self.places if isinstance(self.device, str) else self.device

    def devices_of(self, part: int | None = None) -> tuple[str, ...]:
        """Return the device of every replica of a part, or of what is not a part."""
        return self.devices


class PartSpec(_Placed):
    """Consecutive layers of a model on one device; `until` is the last one, inclusive."""

    until: FileName | None = None
    split: SplitSpec | None = None
    exit: ExitSpec | None = None
    deadline: Annotated[Duration, at_least(0.001)] = 30.0  # of a gather, for what is missing

    @property
    def places(self) -> int:
        """How many devices a list of them has to name: one for each part, or for each replica."""
        return self.split.count if self.split else self.replicas

    def devices_of(self, part: int | None = None) -> tuple[str, ...]:
        """Return the device of every replica of a part, or of what is not a part."""
        return (self.devices[part or 0],) * self.replicas if self.split else self.devices


class BranchSpec(_Placed):
    """A member of an ensemble: a model of its own, whole or in stages."""

    model: ModelSpec
    weight: float = Field(default=1.0, gt=0)
    stages: tuple[PartSpec, ...] = ()


class StageSpec(PartSpec):
    """A stage: layers of the model, or (the last one) an ensemble of other models.

    `fuse` joins the branches' outputs: mean (by `weight`), max or vote of their probabilities, or a
    module that takes them all. With `quorum` an answer needs that many of them by the `deadline`.
    """

    branches: tuple[BranchSpec, ...] = ()
    fuse: Literal["mean", "max", "vote"] | Factory = "mean"
    quorum: Positive | None = None

    @property
    def fans(self) -> bool:
        """Whether it is more than one thing side by side."""
        return bool(self.split or self.branches)
