"""The pipeline file as frozen pydantic models.

PipelineSpec: model, input, batch, stages[], edges{}, output, kafka, delivery, memory, metrics
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    PrivateAttr,
    SecretStr,
    model_validator,
)

from streaminfer.errors import ConfigError
from streaminfer.spec import checks
from streaminfer.spec.checks import Problem, did_you_mean, refuse
from streaminfer.spec.stages import (
    BatchSpec,
    BranchSpec,
    Frozen,
    ModelSpec,
    PartSpec,
    StageSpec,
)
from streaminfer.spec.units import (
    Channels,
    Duration,
    FileName,
    Labels,
    Name,
    Positive,
    Prefix,
    Size,
    Topic,
    at_least,
)

__all__ = [
    "EdgeSpec",
    "EdgesSpec",
    "InputSpec",
    "KafkaSpec",
    "MetricsSpec",
    "OutputSpec",
    "PipelineSpec",
    "json_schema",
]


def _delivery(value: object) -> object:
    if value == "exactly_once":
        raise ValueError(
            "exactly_once needs the transactional sink, which is not in this version: "
            "use at_least_once (the sink still drops the duplicates it sees)"
        )
    return value


class InputSpec(Frozen):
    """How an input record becomes a row. Images: decode, resize, crop, /255, (x - mean) / std."""

    topic: Topic = "images"
    decode: Literal["image", "tensor"] = "image"
    channels: Channels = 3
    resize: Positive | None = None  # of the shorter side, bilinear and antialiased
    crop: Positive | None = None  # square, centred
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    max_bytes: Annotated[Size, at_least(1)] = 16_000_000
    max_pixels: Positive = 50_000_000

    HARMLESS: ClassVar[set[str]] = {"topic", "max_bytes", "max_pixels"}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse(checks.input_problems(self))
        return self

    def numbers(self) -> dict[str, JsonValue]:
        """Return the part that changes the numbers; belongs into the plan's digest."""
        return self.model_dump(mode="json", exclude=self.HARMLESS)


class EdgeSpec(Frozen):
    """What leads into a stage. `local`: the same worker, tensors as they are.

    `dtype` is of floating-point tensors; int8 sends them with a scale for each channel of a row.
    `partitioning`: micro-batches keep their input partition, or are spread over all of them.
    """

    transport: Literal["kafka", "local"] = "kafka"
    dtype: Literal["native", "float16", "bfloat16", "int8"] = "native"
    compress: Literal["none", "zstd", "lz4"] = "none"
    partitioning: Literal["preserve", "balance"] = "preserve"

    @model_validator(mode="after")
    def _local_is_bare(self) -> Self:
        if self.transport == "local" and self.partitioning != "preserve":
            refuse(
                [
                    Problem(
                        ("partitioning",),
                        "a local edge has no partitions to balance",
                        "drop it, or transport: kafka",
                    )
                ]
            )
        if self.transport == "local" and (self.dtype, self.compress) != ("native", "none"):
            key = "dtype" if self.dtype != "native" else "compress"
            refuse([Problem((key,), "a local edge carries tensors as they are", f"drop {key}")])
        return self


EdgesSpec = dict[str, EdgeSpec]  # "default", or the name of the stage it leads into


class OutputSpec(Frozen):
    """Predictions. `top_k` 0 = raw outputs; `labels`: a file, "imagenet", or the words.

    `logits` names the output that top_k ranks; left out, it is the only one, or `logits` or `out`.
    """

    topic: Topic = "predictions"
    top_k: int = Field(default=5, ge=0, le=1000)
    labels: Labels = None
    logits: FileName | None = None


class KafkaSpec(Frozen):
    """The cluster and what we ask of it. No `bootstrap`: everything in one process."""

    bootstrap: str | None = None
    prefix: Prefix = "si"
    partitions: Annotated[int, Field(ge=1, le=10_000)] = 8
    replication: Annotated[int, Field(ge=1, le=32)] = 1
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    sasl_username: str | None = None
    sasl_password: SecretStr | None = None
    ssl_cafile: FileName | None = None
    ssl_certfile: FileName | None = None
    ssl_keyfile: FileName | None = None
    ssl_check_hostname: bool = True
    max_record_bytes: Annotated[Size, at_least(1024)] = 900_000
    history: Duration = 600.0
    history_bytes: Size = 1_000_000_000
    session_timeout: Annotated[Duration, at_least(0.001)] = 30.0

    @model_validator(mode="after")
    def _credentials(self) -> Self:
        refuse(checks.credential_problems(self))
        return self


class MetricsSpec(Frozen):
    """Where Prometheus reads a worker. Port 0 = any free one."""

    host: str = "127.0.0.1"
    port: int = Field(default=9464, ge=0, le=65535)


class PipelineSpec(Frozen):
    """The whole file."""

    pipeline: Name
    model: ModelSpec | None = None  # none where all there is is an ensemble
    input: InputSpec = InputSpec()
    batch: BatchSpec = BatchSpec()
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    edges: EdgesSpec = Field(default={})
    output: OutputSpec = OutputSpec()
    kafka: KafkaSpec = KafkaSpec()
    delivery: Annotated[Literal["at_least_once"], BeforeValidator(_delivery)] = "at_least_once"
    memory: Annotated[Size, at_least(1)] = 512_000_000
    metrics: MetricsSpec = MetricsSpec()

    _path: Path | None = PrivateAttr(default=None)
    _trust: bool = PrivateAttr(default=False)

    @model_validator(mode="after")
    def _hangs_together(self) -> Self:
        refuse(
            chain(
                checks.stage_problems(self),
                checks.fan_problems(self),
                checks.edge_problems(self),
                checks.replica_problems(self),
                checks.example_problems(self),
                checks.range_problems(self),
                checks.topic_problems(self),
            )
        )
        return self

    @property
    def first_model(self) -> ModelSpec:
        """The model that the input is for: the pipeline's, or an ensemble's first."""
        return self.model or self.stages[0].branches[0].model

    @property
    def path(self) -> Path | None:
        """The file it was read from; relative paths in it start at its folder."""
        return self._path

    def at(self, path: Path) -> PipelineSpec:
        """Return the same, as read from `path`."""
        copy = self.model_copy()
        copy._path = path
        return copy

    @property
    def trust(self) -> bool:
        """Whether what can run code when it is read may be read. No file can say so."""
        return self._trust

    def trusted(self, trust: bool = True) -> PipelineSpec:
        """Return the same, with a model.file that may be read, or may not."""
        copy = self.model_copy()
        copy._trust = trust
        return copy

    def resolve(self, name: str) -> Path:
        """Return the path that a file's name in here stands for."""
        return (self._path.parent if self._path else Path()) / name

    def placed(self) -> dict[str, PartSpec | BranchSpec]:
        """Return all that has a place, by path: `trunk`, `vote`, `vote.a`, `vote.a.head`."""
        found: dict[str, PartSpec | BranchSpec] = {}
        for stage in self.stages:
            found[stage.name] = stage
            for branch in stage.branches:
                found[f"{stage.name}.{branch.name}"] = branch
                for part in branch.stages:
                    found[f"{stage.name}.{branch.name}.{part.name}"] = part
        return found

    def stage(self, path: str) -> PartSpec | BranchSpec:
        """Return the stage or branch at a path. Raises ConfigError."""
        placed = self.placed()
        if path in placed:
            return placed[path]
        raise ConfigError(
            f"no stage {path!r} in pipeline {self.pipeline!r}",
            where=str(self._path or ""),
            hint=did_you_mean(path, placed),
        )

    def edge(self, path: str) -> EdgeSpec:
        """Return what leads into a stage: its own edge over the default one. Raises ConfigError.

        What leads into a branch leads into the stage that it is a branch of.
        """
        first = self.stage(path) is self.stages[0] and not self.stages[0].fans
        if first:
            return EdgeSpec()  # it reads the input topic
        key = path.partition(".")[0] if self._opens(path) else path
        default = self.edges.get("default", EdgeSpec())
        own = self.edges.get(key, EdgeSpec())
        edge = default.model_copy(update=own.model_dump(exclude_unset=True))
        return EdgeSpec(transport="local") if edge.transport == "local" else edge

    def _opens(self, path: str) -> bool:
        """Whether a branch begins here."""
        name, _, rest = path.partition(".")
        openings = (
            {branch.name, f"{branch.name}.{branch.stages[0].name}" if branch.stages else ""}
            for stage in self.stages
            if stage.name == name
            for branch in stage.branches
        )
        return any(rest in opening for opening in openings if rest)

    def batch_of(self, path: str) -> BatchSpec:
        """Return a stage's batch: its own, its branch's, or the pipeline's. Raises ConfigError."""
        above = path.rpartition(".")[0]
        return self.stage(path).batch or (self.batch_of(above) if above else self.batch)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of the pipeline file, for editors."""
    schema = PipelineSpec.model_json_schema()
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:streaminfer:pipeline:1",
    }
    return head | schema | {"title": "streaminfer pipeline"}
