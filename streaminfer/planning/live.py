"""What a running pipeline measures: looks at its /metrics → what happened between them. Pure.

looks at /metrics    │◀── first half ──▶│◀── second half ──▶│
of each cell         seconds a sample, samples, queue, bytes
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streaminfer.errors import ConfigError
from streaminfer.metrics import Reading

__all__ = ["CellRate", "Live", "Look", "Place", "between", "together"]

STAGE = "streaminfer_stage_"
KINDS = ("busy_seconds_total", "codec_duration_seconds_sum")  # of which one kind alone is read
COMPUTE = "compute_duration_seconds_sum"
TO_TENSORS = "codec_duration_seconds_sum decode"
TO_WIRE = "codec_duration_seconds_sum encode"
DECODED = "busy_seconds_total decode"  # by the decoders and the event loop; TO_TENSORS is in it


class Look(NamedTuple):
    """What all workers said at a time."""

    at: float  # seconds of a monotonic clock
    readings: Sequence[Reading]


class Place(NamedTuple):
    """Where a cell of the plan runs."""

    name: str
    path: str  # as declared; of what joins parts, that of its worker
    worker: str
    replicas: int
    threads: int = 1
    on_cpu: bool = True
    plain: bool = True  # layers in a row, that may be cut elsewhere
    layers: tuple[str, ...] = ()
    fixed: bool = False  # of one replica always: a worker that only joins parts


@dataclass(frozen=True)
class CellRate:
    """A cell between two looks, all its replicas together."""

    samples: float
    batches: float
    seconds: float  # of its devices' threads: wire to tensors, compute, tensors to wire
    queue: float  # samples that wait for it, at the second look
    beside: float = 0.0  # seconds of its decoders and event loop, while its devices compute
    bytes_in: float = 0.0  # of its worker, where it is the first there
    bytes_out: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of a sample; nan if none came."""
        return self.seconds / self.samples if self.samples else math.nan


@dataclass(frozen=True)
class Live:
    """What happened between two looks."""

    span: float  # seconds
    answered: float  # samples
    lag: float  # records behind, of all workers, at the second look
    growth: float  # of it
    cells: Mapping[str, CellRate]


def between(before: Look, after: Look, pipeline: str, places: Sequence[Place]) -> Live:
    """Return what happened between two looks.

    Raises:
        ConfigError: a cell of the plan is missing, the metrics are another pipeline's, or a worker
            was started anew meanwhile.
    """
    old, new = _sums(before.readings, pipeline), _sums(after.readings, pipeline)
    if missing := [p.name for p in places if (p.name, "batches_total") not in new]:
        raise ConfigError(
            f"nobody measures {', '.join(missing)}",
            where="--from-metrics",
            hint="name every worker's address, or the file that `streaminfer run` wrote of them",
        )

    def gain(stage: str, *names: str) -> float:
        found = sum(new.get((stage, n), 0.0) - old.get((stage, n), 0.0) for n in names)
        if found < 0:
            raise ConfigError(
                f"{stage} was started anew while it was measured",
                where="--from-metrics",
                hint="measure again once it runs",
            )
        return found

    cells = {
        p.name: CellRate(
            samples=gain(p.name, "batch_size_samples_sum"),
            batches=gain(p.name, "batches_total"),
            seconds=gain(p.name, COMPUTE, TO_TENSORS, TO_WIRE),
            queue=new.get((p.name, "queue_samples"), 0.0),
            beside=max(0.0, gain(p.name, DECODED) - gain(p.name, TO_TENSORS)),
            bytes_in=gain(p.name, "received_bytes_total") if p.name == p.worker else 0.0,
            bytes_out=gain(p.name, "sent_bytes_total") if p.name == p.worker else 0.0,
        )
        for p in places
    }
    lag = sum(value for (_, name), value in new.items() if name == "lag")
    behind = sum(value for (_, name), value in old.items() if name == "lag")
    span = max(1e-9, after.at - before.at)
    return Live(span, gain("sink", "samples_total"), lag, lag - behind, cells)


def _sums(readings: Iterable[Reading], pipeline: str) -> dict[tuple[str, str], float]:
    """Return each stage's numbers, summed over its replicas."""
    found: dict[tuple[str, str], float] = {}
    others: set[str] = set()
    for name, labels, value in readings:
        if labels.get("pipeline", pipeline) != pipeline:
            others.add(labels["pipeline"])
            continue
        if name == "streaminfer_consumer_lag_records":
            short = "lag"
        elif name.startswith(STAGE) and "le" not in labels:
            short = name.removeprefix(STAGE)
        else:
            continue
        kind = labels.get("activity") or labels.get("direction") or ""
        key = labels["stage"], f"{short} {kind}" if short in KINDS else short
        found[key] = found.get(key, 0.0) + value
    if others and not found:
        raise ConfigError(
            f"these are the metrics of {', '.join(sorted(others))}, not of {pipeline}",
            where="--from-metrics",
        )
    return found


def together(halves: Sequence[Live]) -> Live:
    """Return consecutive measurements as one."""
    cells = {
        name: CellRate(
            samples=sum(half.cells[name].samples for half in halves),
            batches=sum(half.cells[name].batches for half in halves),
            seconds=sum(half.cells[name].seconds for half in halves),
            queue=halves[-1].cells[name].queue,
            beside=sum(half.cells[name].beside for half in halves),
            bytes_in=sum(half.cells[name].bytes_in for half in halves),
            bytes_out=sum(half.cells[name].bytes_out for half in halves),
        )
        for name in halves[0].cells
    }
    return Live(
        sum(half.span for half in halves),
        sum(half.answered for half in halves),
        halves[-1].lag,
        sum(half.growth for half in halves),
        cells,
    )
