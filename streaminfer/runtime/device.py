"""The device's side of a stage: envelopes onto the device as one batch, and each one's rows back.

    bytes ─▶ load ─▶ before ─▶ check ─▶ program ─▶ exit ─▶ after ─▶ cast ─▶ unload ─▶ bytes
                     pixels                        rows that leave       of the edge

Everything here runs in the device's own thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from streaminfer.cast import cast, uncast
from streaminfer.errors import (
    ComputeError,
    ConfigError,
    OutOfMemory,
    SampleError,
    SchemaError,
    StreaminferError,
)
from streaminfer.metrics import StageMetrics
from streaminfer.parallel import Program, check_inputs
from streaminfer.plan import StagePlan, TensorSpec
from streaminfer.runtime.rows import DTYPES, NAMES, as_bytes, select, view
from streaminfer.runtime.speed import measured
from streaminfer.runtime.staging import off, onto
from streaminfer.spec import BatchSpec
from streaminfer.wire import SCALE, Envelope, Failure, Tensor, compress, decompress

__all__ = ["Device", "Done", "ExitHead", "Outputs", "Stage"]

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ExitHead:
    """Answers for rows that need no more layers: logits [N, classes] of the stage's one output."""

    load: Callable[[], Program]
    threshold: float  # of the best class' softmax
    answer: Callable[[torch.Tensor], Outputs]  # from logits to what the sink publishes


@dataclass(frozen=True, slots=True)
class Stage:
    """What a device runs: the cut-out and all that stands around it."""

    plan: StagePlan
    load: Callable[[], Program]
    device: torch.device
    threads: int
    batch: BatchSpec
    out_dtype: str = "native"  # of the edge that its outputs take
    compress: Literal["none", "zstd", "lz4"] = "none"
    before: Callable[[torch.Tensor], torch.Tensor] | None = None
    after: Callable[[Mapping[str, torch.Tensor]], Outputs] | None = None
    exit: ExitHead | None = None


@dataclass(slots=True)
class Done:
    """What the device made of one envelope. Rows that failed or left are not in `tensors`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)  # by offset
    left: list[int] = field(default_factory=list)  # offsets of rows with an answer
    answers: dict[str, Tensor] = field(default_factory=dict)  # theirs
    compute_us: int = 0
    batch: int = 0


class Device:
    """One stage on its device. Called from one thread."""

    def __init__(self, stage: Stage, metrics: StageMetrics, *, timed: bool = False) -> None:
        self._stage, self._metrics, self._timed = stage, metrics, timed
        self.speed: float | None = None  # samples per second of full batches, if `timed`
        self.limit = stage.batch.max  # falls when the device's memory was not enough
        self._program: Program | None = None
        self._exit: Program | None = None

    @property
    def steps(self) -> int:
        """How often a batch goes from Python into its program."""
        return self._program.steps if self._program is not None else 0

    def warm(self) -> None:
        """Load the weights and run batches of zeros; a batch that finds no room is halved.

        Raises ConfigError if the device's memory is not enough for the weights and one sample.
        """
        torch.set_num_threads(self._stage.threads)
        inputs = self._stage.plan.inputs
        try:
            self._program = self._stage.load()
            if self._stage.exit is not None:
                self._exit = self._stage.exit.load()
            if any(n is None for s in inputs if not s.ranges for n in s.shape[1:]):
                return  # sizes that only the data settles
            if any(s.ranges for s in inputs):
                self._forward(self._zeros(1, smallest=True))
            self._forward(self._zeros(1))  # the first batch of a size makes the kernels choose
        except torch.OutOfMemoryError as error:
            name, device = self._stage.plan.path, self._stage.device
            raise ConfigError(
                f"stage {name!r}: {device} has no room for its weights and one sample: {error}",
                where="stages.device",
                hint="cut it into smaller stages (streaminfer plan --memory), or split it",
            ) from error
        self._find_room()
        if self._timed:
            rows = self.limit
            self.speed = measured(rows, lambda: self._forward(self._zeros(rows)))

    def _find_room(self) -> None:
        """Run the largest batch that the memory is enough for, and remember its size."""
        while self.limit > 1:
            try:
                self._forward(self._zeros(self.limit))
                return
            except torch.OutOfMemoryError:
                self.limit //= 2

    def _zeros(self, rows: int, *, smallest: bool = False) -> Outputs:
        return {
            spec.name: torch.zeros(
                (rows, *spec.sizes(smallest=smallest)), dtype=DTYPES[spec.dtype]
            ).to(self._stage.device)
            for spec in self._stage.plan.inputs
        }

    def drop(self) -> None:
        """Free the weights."""
        self._program = self._exit = None

    def compute(self, envelopes: Sequence[Envelope]) -> list[Done]:
        """Compute envelopes of equal shapes as one batch; what fails is in the results."""
        results = self._attempt(envelopes)
        if self._stage.device.type == "cuda":
            self._metrics.torch_allocated.set(torch.cuda.memory_allocated(self._stage.device))
            self._metrics.torch_reserved.set(torch.cuda.memory_reserved(self._stage.device))
        return results

    def _attempt(self, envelopes: Sequence[Envelope]) -> list[Done]:
        """Compute envelopes together; on failure apart, then in halves, down to single samples."""
        rows = sum(len(e.samples) for e in envelopes)
        if rows > self.limit and rows > 1:
            return self._apart(envelopes)
        try:
            return self._together(envelopes)
        except StreaminferError as error:
            if isinstance(error, OutOfMemory) and rows > 1:
                self.limit = max(1, min(self.limit, rows // 2))
            if rows == 1 or isinstance(error, SampleError):
                return [self._poisoned(e, error) for e in envelopes]
            self._metrics.retries["compute"].inc()
            return self._apart(envelopes)

    def _apart(self, envelopes: Sequence[Envelope]) -> list[Done]:
        if len(envelopes) > 1:
            return [done for e in envelopes for done in self._attempt([e])]
        (envelope,) = envelopes
        half = len(envelope.samples) // 2
        n = len(envelope.samples)
        parts = [select(envelope, range(half)), select(envelope, range(half, n))]
        return [_join([done for part in parts for done in self._attempt([part])])]

    def _poisoned(self, envelope: Envelope, error: StreaminferError) -> Done:
        failure = Failure("error", self._stage.plan.name, error.kind, str(error)[:1000])
        self._metrics.samples["error"].inc(len(envelope.samples))
        self._metrics.errors[error.kind].inc(len(envelope.samples))
        return Done(failures={s.offset: failure for s in envelope.samples})

    def _together(self, envelopes: Sequence[Envelope]) -> list[Done]:
        stage, began = self._stage, time.perf_counter()
        inputs = {spec.name: self._load(spec, envelopes) for spec in stage.plan.inputs}
        if stage.before is not None:
            first = stage.plan.inputs[0].name
            inputs[first] = stage.before(inputs[first])
        if not stage.plan.moves:
            check_inputs(stage.plan.inputs, inputs)
        loaded = time.perf_counter()
        try:
            outputs, leaving = self._forward(inputs)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        except SampleError:
            raise
        except Exception as error:
            raise ComputeError(f"{type(error).__name__}: {error}") from error
        computed = time.perf_counter()
        results = self._unload(outputs, leaving, envelopes)
        ended = time.perf_counter()
        rows = sum(len(e.samples) for e in envelopes)
        for done in results:
            done.compute_us, done.batch = int((computed - loaded) * 1e6), rows
        self._measure(rows, loaded - began, computed - loaded, ended - computed)
        return results

    def _forward(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Outputs, _Leaving | None]:
        """Run the batch; rows that leave at the exit are not in the outputs."""
        if self._program is None:
            raise ComputeError("the stage is stopped")
        stage = self._stage.plan
        with torch.inference_mode():
            values = self._program(*[inputs[spec.name] for spec in stage.inputs])
            outputs = dict(zip((spec.name for spec in stage.outputs), values, strict=True))
            leaving = self._leave(outputs)
            if leaving is not None:
                outputs = {name: value[~leaving.rows] for name, value in outputs.items()}
            if self._stage.after is not None:
                outputs = self._stage.after(outputs)
            return off(cast(outputs, self._stage.out_dtype)), leaving

    def _leave(self, outputs: Outputs) -> _Leaving | None:
        head = self._stage.exit
        if head is None or self._exit is None:
            return None
        (logits,) = self._exit(*outputs.values())
        rows = logits.float().softmax(1).amax(1) >= head.threshold
        if not rows.any():
            return None
        return _Leaving(rows, off(head.answer(logits[rows])))

    def _load(self, spec: TensorSpec, envelopes: Sequence[Envelope]) -> torch.Tensor:
        """Bring one input of all envelopes onto the device, as one batch, in the model's dtype."""
        there = {spec.name: self._batch(spec.name, envelopes)}
        if (scales := spec.name + SCALE) in envelopes[0].tensors:
            there[scales] = self._batch(scales, envelopes)
        return uncast(spec.name, there, DTYPES[spec.dtype])

    def _batch(self, name: str, envelopes: Sequence[Envelope]) -> torch.Tensor:
        if missing := [e for e in envelopes if name not in e.tensors]:
            found = ", ".join(missing[0].tensors) or "none"
            raise SchemaError(f"the envelope has no tensor {name!r}; it has: {found}")
        parts = [view(decompress(envelope.tensors[name])) for envelope in envelopes]
        return onto(parts, self._stage.device)

    def _unload(
        self, outputs: Outputs, leaving: _Leaving | None, envelopes: Sequence[Envelope]
    ) -> list[Done]:
        """Give every envelope its own rows of the batch back, as bytes."""
        results = [Done() for _ in envelopes]
        staying = [len(e.samples) for e in envelopes]
        if leaving is not None:
            masks = torch.split(leaving.rows.cpu(), staying)
            for done, envelope, mask in zip(results, envelopes, masks, strict=True):
                done.left = [envelope.samples[i].offset for i in mask.nonzero()[:, 0].tolist()]
            gone = [len(done.left) for done in results]
            staying = [n - m for n, m in zip(staying, gone, strict=True)]
            for done, answers in zip(results, _split(leaving.answers, gone), strict=True):
                done.answers = {name: _packed(part) for name, part in answers.items()}
            self._metrics.exits.inc(sum(gone))
        codec = self._stage.compress
        for done, tensors in zip(results, _split(outputs, staying), strict=True):
            packed = {name: _packed(part) for name, part in tensors.items()}
            done.tensors = (
                packed if codec == "none" else {n: compress(t, codec) for n, t in packed.items()}
            )
        return results

    def _measure(self, rows: int, decode: float, compute: float, encode: float) -> None:
        metrics = self._metrics
        metrics.batches.inc()
        metrics.batch_size.observe(rows)
        metrics.compute_time.observe(compute)
        metrics.codec_time["decode"].observe(decode)
        metrics.codec_time["encode"].observe(encode)
        metrics.busy["decode"].inc(decode)
        metrics.busy["compute"].inc(compute)
        metrics.busy["encode"].inc(encode)


@dataclass(frozen=True, slots=True)
class _Leaving:
    """Rows of a batch that have their answer: a mask over it, and what the sink publishes."""

    rows: torch.Tensor
    answers: Outputs


def _split(tensors: Outputs, rows: Sequence[int]) -> list[Outputs]:
    """Cut a batch into consecutive runs of rows; a run of none has no tensors."""
    parts: list[Outputs] = [{} for _ in rows]
    for name, value in tensors.items():
        for part, piece in zip(parts, torch.split(value, list(rows)), strict=True):
            if len(piece):
                part[name] = piece
    return parts


def _packed(value: torch.Tensor) -> Tensor:
    return Tensor(NAMES[value.dtype], tuple(value.shape), as_bytes(value))


def _join(parts: Sequence[Done]) -> Done:
    """Put the halves of a split envelope together again; rows that failed or left are missing."""
    return Done(
        _stacked([part.tensors for part in parts if part.tensors]),
        {offset: f for part in parts for offset, f in part.failures.items()},
        [offset for part in parts for offset in part.left],
        _stacked([part.answers for part in parts if part.answers]),
        sum(part.compute_us for part in parts),
        max(part.batch for part in parts),
    )


def _stacked(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    tensors = {}
    for name, first in parts[0].items() if parts else ():
        pieces = [decompress(part[name]) for part in parts]
        shape = (sum(piece.shape[0] for piece in pieces), *first.shape[1:])
        data = memoryview(b"".join(piece.data for piece in pieces))
        tensors[name] = Tensor(first.dtype, shape, data)
    return tensors
